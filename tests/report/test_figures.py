"""Which plots a page has, and the page itself."""

import html.parser
import re

import msgspec
import pytest

from asyncrl.report.figures import flattened, page_figures, settings_table
from asyncrl.report.page import report_page


def test_every_column_is_in_exactly_one_plot() -> None:
    """Columns of either run; a name that no plot knows too."""
    names = [
        "actor/entropy",
        "actor/grad_norm",
        "staleness/lag_0",
        "gap/k3_lag_1",
        "own/metric",
        "timing_s/step",
        "timing_s/commit",
    ]
    one = {"steps": {"columns": {name: [1.0] for name in names}}, "waits/learner": {"columns": {"busy": [1.0], "sync": [0.0]}}}
    two = {"steps": {"columns": {"actor/entropy": [2.0], "critic/vf_loss": [1.0]}}, "evals": {"columns": {"eval/score": [0.5]}}}
    figures = page_figures([one, two])
    shown = [(table, name) for figure in figures for table, name, _ in figure["series"]]
    assert sorted(shown) == sorted(
        (table, name)
        for of in (one, two)
        for table in of
        for name in of[table]["columns"]
        if (of, name) != (two, "actor/entropy")
    )
    sections = {series[1]: figure["section"] for figure in figures for series in figure["series"]}
    assert sections["actor/entropy"] == "Learning"
    assert sections["own/metric"] == "All other metrics"
    assert sections["staleness/lag_0"] == sections["gap/k3_lag_1"] == "By lag"
    assert [figure["title"] for figure in figures if figure["kind"] == "stack"] == ["learner"]
    (timing,) = [figure for figure in figures if figure["title"] == "Seconds of an update"]
    assert timing["series"] == [("steps", "timing_s/step", "step"), ("steps", "timing_s/commit", "commit")]


def test_settings_that_differ() -> None:
    one = flattened({"a": {"b": 1, "c": [1, 2]}, "d": {}}) | flattened({"x": None}, "deploy")
    assert one == {"a.b": 1, "a.c": [1, 2], "d": {}, "deploy.x": None}
    assert settings_table([one, {"a.b": 2, "a.c": [1, 2]}]) == [
        {"name": "a.b", "values": [1, 2], "differs": True},
        {"name": "a.c", "values": [[1, 2], [1, 2]], "differs": False},
        {"name": "d", "values": [{}, None], "differs": True},
        {"name": "deploy.x", "values": [None, None], "differs": False},
    ]


class Scripts(html.parser.HTMLParser):
    """The scripts of a page, as a browser would cut them, and all addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.scripts and self.get_starttag_text() and self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)</script>", "<!-- <script>", "{{report.js}} {{data}}", "\u2028 \x00 \\u003c ü"]
)
def test_text_of_a_run_stays_text(text: str) -> None:
    page = report_page({"runs": [{"name": text, text: [text]}]})
    found = Scripts()
    found.feed(page)
    assert len(found.scripts) == 3  # data, library, own
    assert msgspec.json.decode(found.scripts[0]) == {"runs": [{"name": text, text: [text]}]}


def test_a_page_needs_nothing_else() -> None:
    page = report_page({})
    found = Scripts()
    found.feed(page)
    assert found.addresses == ["data:,"]
    assert re.search(r"default-src 'none'", page)  # and so a browser would refuse the rest
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket", page)
    assert "{{" not in page.replace("{{data}}", "").partition("<script>")[0]
