"""The live view in a notebook's cell: one output that is drawn anew, which needs no ipywidgets, unlike rich's own."""

import sys
from typing import Any


def in_notebook() -> bool:
    """Whether this process shows rich output in cells: Jupyter, Colab and their like."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


class CellView:
    """For `Progress` what `rich.live.Live` is for a terminal."""

    def __init__(self) -> None:
        self._output: Any = None

    def start(self) -> None:
        """The first `update` makes the output."""

    def update(self, view: Any, *, refresh: bool = True) -> None:
        """Shows a renderable of rich's in place of the one before."""
        from IPython.display import display

        if self._output is None:
            self._output = display(view, display_id=True)
        else:
            self._output.update(view)

    def pressed(self) -> str:
        """A cell has no keys."""
        return ""

    def stop(self) -> None:
        """Leaves the last view where it is; another one would get an output of its own."""
        self._output = None
