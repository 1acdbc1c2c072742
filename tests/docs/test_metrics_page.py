"""docs/metrics.md is what docs/metrics.py makes of the table today."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def metrics(root: Path, script: Callable[[Path], ModuleType]) -> ModuleType:
    return script(root / "docs" / "metrics.py")


def test_the_page_is_up_to_date(metrics) -> None:
    assert metrics.main(["--check"]) == 0, "run `python docs/metrics.py`"


def test_a_stale_page_is_noticed_and_not_written(metrics, tmp_path, monkeypatch, capsys) -> None:
    stale = tmp_path / "metrics.md"
    stale.write_text("something else")
    monkeypatch.setattr(metrics, "PAGE", stale)
    assert metrics.main(["--check"]) == 1
    assert "python docs/metrics.py" in capsys.readouterr().err
    assert stale.read_text() == "something else"


def test_every_metric_is_on_the_page(metrics, pages) -> None:
    rows = [line for line in pages["docs/metrics.md"].splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [row.name for row in metrics.table()]
