"""One HTML page that needs nothing else: the template, uPlot (MIT) and the data of runs. Pure but for reading package data."""

from importlib import resources
from typing import Any

import msgspec


def report_page(data: dict[str, Any]) -> str:
    """`data` as web/report.js reads it. Whatever is in it, code too, is shown as text."""
    web = resources.files("asyncrl.report") / "web"
    parts = {
        name: (web / name).read_text()
        for name in ("report.html", "report.css", "report.js", "samples.js", "uPlot.js", "uPlot.css")
    }
    page = parts.pop("report.html")
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    # Inside <script> only `</script` and `<!--` mean anything, and JSON has `<` nowhere but in strings.
    embedded = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    before, after = page.split("{{data}}")
    return before + embedded + after
