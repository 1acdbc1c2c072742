"""The terminal under a live view: drawn in place below the log, keys read as they are pressed, and given back as it was.

It is given back at the end, at an error or a signal that is told as one, and while the program is stopped (Ctrl-Z).
"""

import atexit
import os
import select
import signal
import sys
import termios
import threading
import tty
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment


class TerminalView:
    """For `Progress` what `CellView` is in a notebook. Use from one thread."""

    def __init__(self, stream: TextIO, keys: bool) -> None:
        """keys: whether any are read, from standard input if it is a terminal."""
        # Long lines of the log stay whole: the terminal wraps them, and they can be copied.
        self._console = Console(file=stream, markup=False, highlight=False, soft_wrap=True)
        self._keys = Keys() if keys else None
        self._live: Live | None = None
        self._drawn: list[int] = []  # the width of each line of the view that stands there
        self._width = 0
        self._drawing = self._stopped_while_drawing = False

    def start(self) -> None:
        """From now on what is written to standard output and standard error goes above the view."""
        if self._live is not None:
            return
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()
        self._drawn = []
        atexit.register(self.stop)
        if self._keys is not None:
            self._keys.take()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._suspend)

    def update(self, view: Any, *, refresh: bool = True) -> None:
        """Draws a renderable of rich's in place of the one before."""
        if self._live is None:
            return
        self._drawing = True
        try:
            lines = _Lines(self._console.render_lines(view, pad=False))
            self._make_room()
            self._live.update(lines, refresh=refresh)
            self._drawn, self._width = lines.widths, self._console.width
        finally:
            self._drawing = False
        if self._stopped_while_drawing:
            self._stopped_while_drawing = False
            self._suspend()

    def pressed(self) -> str:
        """The keys that were pressed since the last call. Never waits."""
        return self._keys.pressed() if self._keys is not None and self._live is not None else ""

    def stop(self) -> None:
        """Leaves the view where it is, and gives the terminal back. Idempotent."""
        live, self._live = self._live, None
        if self._keys is not None:
            self._keys.give_back()
        if live is not None:
            live.stop()
            atexit.unregister(self.stop)
            if signal.getsignal(signal.SIGTSTP) == self._suspend:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _make_room(self) -> None:
        """A terminal that became narrower has broken the lines of the view into more: the cursor goes to where rich takes the
        last of them to be, and what stands below is erased."""
        width = self._console.width
        if (more := sum(max(0, -(-drawn // width) - 1) for drawn in self._drawn)) and width < self._width:
            up = Control()
            up.segment = Segment(f"\r\x1b[{more}A\x1b[J", None, [(ControlType.CURSOR_UP, more)])
            self._console.control(up)

    def _suspend(self, *signalled: Any) -> None:
        """At Ctrl-Z: gives the terminal to the shell, stops, and draws anew with the next `update` after that."""
        if self._drawing:
            self._stopped_while_drawing = True
            return
        self.stop()
        os.kill(os.getpid(), signal.SIGTSTP)
        self.start()


class Keys:
    """What is typed at standard input, key by key and not echoed, where that is a terminal and this program's turn."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._before: list[Any] | None = None

    def take(self) -> None:
        if self._ours() and self._before is None:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd, termios.TCSANOW)

    def pressed(self) -> str:
        self.take()  # it may have come to the foreground since
        try:
            if self._ours() and select.select([self._fd], [], [], 0)[0]:
                return os.read(self._fd, 64).decode(errors="ignore")
        except OSError:  # the terminal is gone
            self._fd = -1
        return ""

    def give_back(self) -> None:
        if self._ours() and self._before is not None:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)
        self._before = None

    def _ours(self) -> bool:
        """In the background a program that touches its terminal is stopped."""
        try:
            return self._fd >= 0 and os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False


class _Lines:
    """Lines as they were rendered."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self._lines = lines
        self.widths = [sum(cell_len(segment.text) for segment in line) for line in lines]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, line in enumerate(self._lines):
            if number:
                yield Segment.line()
            yield from line
