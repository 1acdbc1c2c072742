"""`asyncrl report`: a run as a few calls of the log left it, read, and opened in a browser."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

import asyncrl.replay.log.events as ev
from asyncrl.cli import main
from asyncrl.jobs.report import is_running, make_report
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.rows import encode_rollouts, read_submitted
from asyncrl.types import Prompt, Rollout, Span, Status, Version

BAD = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
Verdict = tuple[Status, float | None]


def rollout(group: int, index: int, spans: tuple[tuple[int, int], ...], text: str) -> Rollout:
    """spans: update and length."""
    length = sum(n for _, n in spans)
    return Rollout(
        group=group,
        rollout=index,
        attempt=0,
        prompt=Prompt(row=group, ids=(1, 2), data_source="odd" if group % 2 else "even", ground_truth=json.dumps(BAD)),
        response_ids=list(range(3, 3 + length)),
        logprobs=[-0.1 * i for i in range(length)],
        kept_logmass=None,
        loss_mask=[1] * length,
        turns=(0,),
        spans=tuple(Span(Version(1, update), n) for update, n in spans),
        finish_reason="stop",
        worker="generator-0",
        times={"reserved": 1.0},
        text=text,
        prompt_text=f"question {group}",
    )


def generate(log: ReplayLog, group: int, spans: tuple[tuple[int, int], ...], verdicts: tuple[Verdict, ...]) -> None:
    """A group, from its reservation to its verdicts; rollout i ends with `i`."""
    rollouts = [rollout(group, i, spans, f"answer {group}.{i} {BAD}") for i in range(len(verdicts))]
    first = log.append_rows(read_submitted(encode_rollouts(rollouts, "run")))
    log.append_events([ev.GroupReserved(group, "train", group, 0, len(verdicts), 0, "generator-0", 1)])
    log.append_events([ev.RolloutSubmitted(group, i, 0, first + i, 0, 0, 4) for i in range(len(verdicts))])
    log.append_events(
        [ev.RolloutScored(group, i, 0, status, reward, {"exact": reward or 0.0}) for i, (status, reward) in enumerate(verdicts)]
    )


def commit(log: ReplayLog, update: int, *groups: int) -> None:
    log.append_events([ev.BatchCommitted(update, Version(1, update), groups, {}, 1000.0 + 10 * update)])


def write_run(folder: Path, **settings: Any) -> Path:
    """Three updates; the learner dies after the second, and a generator; one group fails, one is never trained."""
    log = ReplayLog(folder / "replay")
    ok: tuple[Verdict, ...] = (("ok", 1.0), ("ok", 0.0))
    log.append_events([ev.LearnerFenced(1, 0, 1000.0)])
    generate(log, 0, ((0, 4),), ok)
    commit(log, 1, 0)
    generate(log, 1, ((0, 2), (1, 2)), (("ok", 0.5), ("invalid", None)))
    generate(log, 2, ((1, 4),), ok)
    commit(log, 2, 2)
    log.append_events([ev.HolderDied("generator-0", 1, (4,)), ev.LearnerFenced(2, 2, 1021.0)])
    commit(log, 3, 1)
    generate(log, 3, ((3, 4),), (("timeout", None), ("timeout", None)))
    log.append_events([ev.GroupSettled(3, "failed", True), ev.Ended()])
    log.close()
    recipe = {"name": folder.name, "model": {"path": "nowhere/at-all"}, "sampling": {"n": 2}, "evaluation": {"n": 1}} | settings
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "deployment.yaml").write_text("generators: {count: 1}\nhf_token: hf_aaaaaaaaaaaaaaaaaaaaaaaa\n")
    (folder / "logs").mkdir()
    log_lines = [
        "12:00:00 INFO x: fine",
        "12:00:01 ERROR asyncrl.learn: api_key=sk-aaaaaaaaaaaaaaaaaaaa refused",
        "  a line of it",
    ]
    (folder / "logs" / "reward-0.log").write_text("\n".join(log_lines))
    (folder / "logs" / "learner.error").write_text(f"Traceback\nValueError: {BAD}\n")
    lines = [{"kind": "eval", "step": 0, "time": 1000.0, "eval/score": 0.5, "eval/count": 8}]
    for update in (1, 2, 3):
        lag = {"staleness/lag_0": 0.5, "staleness/lag_1": 0.5, "staleness/lag_mean": 0.5, "staleness/lag_max": 1.0}
        figures = {"actor/entropy": 1.0 / update, "actor/ppo_kl": 0.0, "samples": 2.0, "tokens/trained": 8.0, BAD: 1.0, **lag}
        lines.append({"kind": "step", "step": update, "time": 1000.0 + 10 * update, **figures})
        actors = {"learner/busy_s": 5.0 * update, "learner/wait:store_s": 5.0 * update, "generator-0/busy_s": 10.0 * update}
        lines.append({"kind": "actors", "step": update, "time": 1000.0 + 10 * update, **actors})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The second says that it was forked from the first."""
    folder = tmp_path_factory.mktemp("runs")
    first, second = write_run(folder / "first"), write_run(folder / "second", staleness={"max_lag": 4})
    (second / "forked.json").write_text(json.dumps({"source": str(first.resolve()), "update": 1}))
    return first, second


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_what_is_read_of_a_run(runs: tuple[Path, Path]) -> None:
    (run,) = data_of(make_report([runs[0]]))["runs"]
    assert (run["name"], run["state"]) == ("first", "finished")
    split = run["tables"]["split"]
    # Update 3 trained 2 tokens of update 0 and 2 of update 1, submitted after update 1.
    assert split["update"] == [1, 2, 3]
    assert split["columns"] == {"flight": [0.0, 0.0, 0.5], "queue": [0.0, 0.0, 1.0]}
    assert run["tables"]["rewards"]["columns"]["reward"] == [0.5, 0.5, 0.5]
    assert run["lags"]["share"] == [[0.5, 0.5]] * 3
    assert [mark["text"] for mark in run["marks"] if mark["kind"] == "restart"] == [
        "generator-0 died with 1 groups in flight, which are generated again",
        "the learner started again from update 2 (incarnation 2)",
    ]
    errors = {mark["text"] for mark in run["marks"] if mark["kind"] == "error"}
    assert errors == {f"learner: ValueError: {BAD}", "reward-0: asyncrl.learn: api_key=[redacted] refused"}
    lost = {name: sum(counts) for name, counts in run["tables"]["lost"]["columns"].items()}
    assert lost == {"failed": 1, "invalid": 1, "timeout": 2}
    assert run["tables"]["waits/learner"]["columns"]["wait:store"] == [0.5, 0.5, 0.5]
    assert dict(run["tiles"])["learner busy"] == "50%"


def test_samples_are_whole(runs: tuple[Path, Path]) -> None:
    """Their tokenizer is nowhere: texts are shown as they are, without colours."""
    (run,) = data_of(make_report([runs[0]]))["runs"]
    groups = {group["group"]: group for group in run["samples"]}
    assert {number: group["why"] for number, group in groups.items()} == {
        1: "newest",
        2: "widest spread",
        0: "widest spread",
        3: "failed",
    }
    best, failed = groups[1]["rollouts"]
    assert (best["reward"], best["status"], best["parts"], best["lag"], best["update"]) == (0.5, "ok", {"exact": 0.5}, 2, 3)
    assert best["spans"] == [[0, 2, 0], [2, 4, 1]]
    assert best["logprobs"] == [-0.0, -0.1, -0.2, -0.3]
    assert (best["tokens"], best["response"]) == (None, f"answer 1.0 {BAD}")
    assert failed["status"] == "invalid"
    assert groups[0]["rollouts"][0]["gain"] == 0.5
    assert groups[1]["truth"] == BAD


def test_runs_side_by_side(runs: tuple[Path, Path]) -> None:
    data = data_of(make_report(runs))
    assert [run["name"] for run in data["runs"]] == ["first", "second"]
    assert {line["name"] for line in data["settings"] if line["differs"]} == {"name", "staleness.max_lag"}
    assert "hf_aaaa" not in json.dumps(data)
    (pair,) = data["paired"]
    assert (pair["source"], pair["fork"], pair["update"]) == ("first", "second", 1)
    (entropy,) = [of for of in pair["metrics"] if of["metric"] == "actor/entropy"]
    assert entropy["source"] == entropy["fork"] == pytest.approx((1 / 2 + 1 / 3) / 2)  # of updates 2 and 3
    assert (entropy["rollouts"], entropy["updates"], entropy["difference"], entropy["error"]) == ("live", 2, 0.0, 0.0)
    assert data_of(make_report([runs[1]]))["paired"] == []
    twice = data_of(make_report([runs[0], runs[0]]))
    assert [run["name"] for run in twice["runs"]] == [str(runs[0])] * 2


def test_a_page_and_a_line_for_it(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(runs[0]), "--out", str(out)]) == 2
    assert f"{out.parent} is not a folder that can be written to; make it" in capsys.readouterr().err
    out.parent.mkdir()
    assert main(["report", str(runs[0]), "--out", str(out), "--watch"]) == 0  # nothing goes on: once is enough
    assert re.fullmatch(rf"{out}: 0\.\d\d MB of 1 run in \d+\.\d s\n", capsys.readouterr().out)
    assert data_of(out.read_text())["renew_s"] is None
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]  # nothing is left beside it


def test_a_running_run_is_watched_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leader is this process, which leaves while the first page is shown."""
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    (run / ".lock").write_text(f"pid {os.getpid()} on {socket.gethostname()}\n")
    waited: list[float] = []

    def shown(seconds: float) -> None:
        waited.append(seconds)
        assert data_of(out.read_text())["renew_s"] == 7.0
        (run / ".lock").write_text("")

    monkeypatch.setattr("asyncrl.jobs.report.time.sleep", shown)
    assert main(["report", str(run), "--out", str(out), "--watch", "--every", "7"]) == 0
    assert len(waited) == 1
    assert waited[0] >= 7
    assert data_of(out.read_text())["renew_s"] is None


def test_who_leads_a_run(tmp_path: Path) -> None:
    assert not is_running(tmp_path)  # it never had a lock
    for holder, running in [
        (f"{os.getpid()} on {socket.gethostname()}", True),
        (f"{1 << 30} on {socket.gethostname()}", False),
    ]:
        (tmp_path / ".lock").write_text(f"pid {holder}\n")
        assert is_running(tmp_path) is running
    (tmp_path / ".lock").write_text("pid 1 on another.host\n")  # which can't be asked
    assert is_running(tmp_path)


def test_an_old_run_has_what_it_has(tmp_path: Path) -> None:
    """No metrics, settings or logs, and no update."""
    ReplayLog(tmp_path / "replay").close()
    (run,) = data_of(make_report([tmp_path]))["runs"]
    assert run["state"] == "stopped before its last update"
    assert (run["tables"], run["samples"], run["marks"], run["advice"], run["lags"]) == ({}, [], [], [], None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{missing}"], "{missing} is no run directory of asyncrl"),
        (["{run}", "--every", "0"], "--every 0: a page can't be written all the time"),
        (["{run}", "--out", "{run}"], "--out {run} is a folder"),
        (["{broken}"], "its recipe.json or deployment.yaml can't be read"),
    ],
)
def test_what_cannot_work(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"run": str(tmp_path / "run"), "missing": str(tmp_path / "missing"), "broken": str(tmp_path / "broken")}
    for name in ("run", "broken"):
        ReplayLog(tmp_path / name / "replay").close()
    (tmp_path / "broken" / "recipe.json").write_text("{")
    assert main(["report", *(argument.format(**named) for argument in arguments)]) == 2
    assert said.format(**named) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(make_report(runs))
    return out.as_uri()


def opened(browser: Any, address: str, width: int = 1400, scheme: str = "light") -> Any:
    """All of the page in view, and every plot drawn that is not folded."""
    from selenium.webdriver.support.ui import WebDriverWait

    def view(height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    view(900)
    browser.get("about:blank")  # another fragment alone would load nothing
    browser.get(address)
    view(browser.execute_script("return document.documentElement.scrollHeight"))
    shown = "[...document.querySelectorAll('.plot')].filter(plot => !plot.closest('details:not([open])'))"
    undrawn = f"return {shown}.filter(plot => !plot.dataset.drawn).length"
    WebDriverWait(browser, 60).until(lambda chrome: chrome.execute_script(undrawn) == 0)
    return browser


INKED = """return [...document.querySelectorAll('.plot canvas')].map(canvas =>
    canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.filter((v, i) => i % 4 == 3 && v).length)"""


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "dark")])
def test_a_page_in_chromium(browser: Any, page: str, width: int, scheme: str) -> None:
    chrome = opened(browser, page, width, scheme)
    inked = chrome.execute_script(INKED)
    assert len(inked) == 15
    assert min(inked) > 500  # axes and a line at least
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
    assert "actor/entropy live 2 0.4167 0.4167 0 ± 0" in texts(chrome, "tr")
    background = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 21, 26)"}[scheme]
    assert chrome.execute_script("return window.broken") is None
    assert chrome.get_log("browser") == []


def texts(chrome: Any, selector: str) -> list[str]:
    return [element.text for element in chrome.find_elements("css selector", selector)]


def press(chrome: Any, label: str) -> None:
    next(button for button in chrome.find_elements("tag name", "button") if button.text == label).click()


def test_filters_sorting_and_what_a_reload_keeps(browser: Any, page: str) -> None:
    from selenium.webdriver.support.ui import Select

    chrome = opened(browser, page)
    assert "8 of 8 groups" in chrome.find_element("id", "filters").text
    Select(chrome.find_element("id", "by-status")).select_by_value("invalid")
    assert "2 of 8 groups" in chrome.find_element("id", "filters").text
    assert [text.splitlines()[-1] for text in texts(chrome, "#found .side > .card")] == ["1/1/0", "1/1/0"]
    Select(chrome.find_element("id", "by-status")).select_by_value("")
    chrome.find_element("id", "by-text").send_keys("ANSWER 2.0")
    Select(chrome.find_element("id", "by-sort")).select_by_value("worst")
    assert "2 of 8 groups" in chrome.find_element("id", "filters").text
    press(chrome, "time")
    chrome.refresh()
    assert "2 of 8 groups" in chrome.find_element("id", "filters").text
    assert texts(chrome, "button.on") == ["time"]
    chrome.find_element("id", "by-text").clear()
    chrome.find_element("id", "by-text").send_keys("answer")
    rewards = [chip for chip in texts(chrome, "#found .chip") if chip.startswith("reward")]
    lowest_first = ["reward 0", "reward 1"]
    assert rewards == [*lowest_first * 4, "reward 0.5", "reward 0.5"]  # groups by their lowest, too
    assert chrome.get_log("browser") == []


def test_the_toggle_and_a_run_left_out(browser: Any, page: str) -> None:
    chrome = opened(browser, page)
    legend = "return [...document.querySelectorAll('#learning .u-series:not(.band) th')].map(e => e.textContent)"
    assert "second" in chrome.execute_script(legend)
    chrome.find_elements("css selector", "#controls input")[1].click()
    opened(chrome, chrome.current_url)
    assert "second" not in chrome.execute_script(legend)
    press(chrome, "☾ dark")
    assert chrome.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"


def test_a_watched_page_loads_itself_again(browser: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    path = tmp_path / "watched.html"
    path.write_text(make_report([runs[0]], renew_s=0.2))
    browser.get(path.as_uri() + "#colour=version")
    path.write_text(make_report([runs[1]]))
    told = "return document.getElementById('overview')?.textContent ?? ''"  # in one step: a page may go at any time
    WebDriverWait(browser, 60).until(lambda chrome: "second" in chrome.execute_script(told))
    assert browser.current_url.endswith("#colour=version")
