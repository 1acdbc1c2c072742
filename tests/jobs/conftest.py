"""A small run's log, as its store would have written it: times are made up. A browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import asyncrl.replay.log.events as ev
import asyncrl.replay.log.log as log_module
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.rows import encode_rollouts, from_ipc
from asyncrl.types import EvalResult, Prompt, Rollout, Span, Version

LONG = 5  # tokens
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


class SmallRun:
    """Groups of two rollouts, one per update; a step a second: reserved at t, generated in 0.2 s, scored 0.1 s later, trained
    from 0.5 to 0.9 s. `at` is the clock."""

    def __init__(self, folder: Path, clock: dict[str, float]) -> None:
        self.path, self._clock = folder, clock
        self._log = ReplayLog(folder / "replay")
        self.write(ev.LearnerFenced(1, 0, self.at))

    @property
    def at(self) -> float:
        return self._clock["now"]

    def write(self, *events: ev.Event, after_s: float = 0.0) -> None:
        self._clock["now"] += after_s
        self._log.append_events(events)

    def group(self, group: int, rewards: tuple[float | None, ...] = (1.0, 0.0), **changes: Any) -> None:
        """Reserves, generates and scores it."""
        purpose = changes.get("purpose", "train")
        self.write(ev.GroupReserved(group, purpose, group, 0, len(rewards), 0, "generator-0", 1))
        rows = [self.rollout(group, i, **changes) for i in range(len(rewards))]
        first = self._log.append_rows(from_ipc(encode_rollouts(rows, "small")))
        submitted = [ev.RolloutSubmitted(group, i, 0, first + i, 0, 1, LONG) for i in range(len(rewards))]
        self.write(*submitted, after_s=0.2)
        self.write(*(self._verdict(group, i, reward) for i, reward in enumerate(rewards)), after_s=0.1)

    def rollout(self, group: int, index: int, **changes: Any) -> Rollout:
        fields: dict[str, Any] = {
            "prompt": Prompt(row=group, ids=(7,), data_source="sums", ground_truth='"4"'),
            "response_ids": [5, 6, 7, 8, 0],
            "logprobs": [-0.5 - index] * LONG,
            "kept_logmass": None,
            "loss_mask": [1] * LONG,
            "turns": (0,),
            "spans": (Span(Version(1, 0), 2), Span(Version(1, 1), 3)),
            "finish_reason": "stop",
            "worker": "generator-0",
            "times": {"reserved": self.at, "started": self.at, "finished": self.at + 0.1},
            "prompt_text": "2+2=",
            "text": f"answer {index} of {group}",
        }
        return Rollout(**fields | changes, group=group, rollout=index, attempt=0)

    def _verdict(self, group: int, index: int, reward: float | None) -> ev.Event:
        if reward is None:
            return ev.RolloutScored(group, index, 0, "invalid", None, error="no [bold]number[/bold]")
        return ev.RolloutScored(group, index, 0, "ok", reward, {"format": 0.5})

    def train(self, update: int, *groups: int, incarnation: int = 1, **metrics: float) -> None:
        self.write(ev.BatchLeased(update, update - 1, groups, False), after_s=0.2)
        self.write(after_s=0.4)
        self.write(ev.BatchCommitted(update, Version(incarnation, update), groups, metrics, self.at))

    def close(self) -> Path:
        self._log.close()
        return self.path


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], SmallRun]:
    clock = {"now": 1000.0}
    monkeypatch.setattr(log_module, "time", SimpleNamespace(time=lambda: clock["now"]))
    return lambda: SmallRun(tmp_path / "small", clock)


def evaluated(update: int) -> EvalResult:
    return EvalResult(version=Version(1, update), score=0.5, count=1, invalid=0, by_source={}, mean_length=5.0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        missing = "no chromium and chromedriver here (Debian: apt install chromium chromium-driver)"
        if os.environ.get("ASYNCRL_REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in [*SWITCHES.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_page_load_timeout(120)
    try:
        yield chrome
    finally:
        chrome.quit()
