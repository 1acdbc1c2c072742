"""`asyncrl samples`: what it prints of a small run, and what it says where there is nothing to print."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncrl.cli import main
from asyncrl.jobs import samples as job


@pytest.fixture
def run(small_run: Callable[[], Any]) -> str:
    """Update 1: groups 0 and 1. Update 2: group 2. Not trained: 3. Held out: 4."""
    made = small_run()
    made.group(0, (1.0, 0.0), text="\x1b[2Jclear \u202eevil [red]text[/red] :smile:")
    made.group(1, (0.75, None))
    made.train(1, 0, 1)
    made.group(2, (0.5, 0.25))
    made.train(2, 2)
    made.group(3, (0.125, 0.875))
    made.group(4, (1.0,), purpose="eval")
    return str(made.close())


def _names(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    assert main(["samples", *args]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [f"{line['group']}/{line['rollout']}" for line in lines]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ["2/0", "2/1"]),  # the newest update
        ("--update 1", ["0/0", "0/1", "1/0", "1/1"]),
        ("--group 3", ["3/0", "3/1"]),
        ("--group 4", ["4/0"]),
        ("--eval", ["4/0"]),
        ("--status invalid", ["1/1"]),
        ("--worst 2", ["0/1", "3/0"]),
        ("--best 2 --worst 1", ["0/1", "0/0", "3/1"]),
        ("--sort gain --best 1 --update 2", ["2/0"]),
        ("--sort surprise --group 2", ["2/1", "2/0"]),
        ("--sort reward --limit 3", ["0/0", "3/1", "1/0"]),
    ],
)
def test_which_are_shown(run: str, capsys: pytest.CaptureFixture[str], flags: str, names: list[str]) -> None:
    assert _names(capsys, run, *flags.split()) == names


def test_json_lines_say_all_and_tokens_where_asked(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["samples", run, "--group", "2", "--tokens"])
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["token_ids"] == [5, 6, 7, 8, 0]
    assert first["logprobs"] == [-0.5] * 5
    assert first["spans"] == [{"start": 0, "end": 2, "update": 0}, {"start": 2, "end": 5, "update": 1}]
    assert (first["gain"], first["surprise"], first["lag"], first["parts"]) == (0.125, 0.5, 1, {"format": 0.5})
    main(["samples", run, "--group", "2"])
    assert first.keys() - json.loads(capsys.readouterr().out.splitlines()[0]).keys() == {"token_ids", "logprobs", "chosen"}


def test_parts_of_many_are_read_one_after_the_other(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_AT_ONCE", 1)
    assert _names(capsys, run, "--sort", "reward", "--update", "1") == ["0/0", "1/0", "0/1", "1/1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--update 9", "--update 9 trained no rollout; updates that did: 1 to 2"),
        ("--update 2 --group 0", "--update 2 trained no rollout of group 0; updates that did: 1 to 1"),
        ("--group 77", "no rollout of group 77; there are groups 0 to 4"),
        ("--worst -1", "--worst -1 < 0"),
        ("--update -2", "--update -2 < 0"),
        ("--data-source maths", "no rollout of --data-source maths; there are 9 sums"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_is(
    run: str, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    assert main(["samples", run, *flags.split()]) == 2
    assert words in capsys.readouterr().err


def test_a_filter_that_nothing_passes_says_what_there_is(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", run, "--status", "timeout"]) == 0
    assert "9 rollouts (status: 8 ok, 1 invalid; data source: 9 sums)" in capsys.readouterr().err


def test_an_empty_run_says_so(small_run: Callable[[], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["samples", str(small_run().close())]) == 2
    assert "no rollout yet" in capsys.readouterr().err
    assert main(["samples", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err


def _on_terminal(*args: str) -> str:
    """What the command writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "asyncrl.cli", "samples", *args], stdout=theirs, env=env)
    os.close(theirs)
    data = b""
    while chunk := _read(ours):
        data += chunk
    assert process.wait() == 0
    os.close(ours)
    return data.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_a_terminal_gets_panels_in_which_texts_do_nothing(run: str) -> None:
    written = _on_terminal(run, "--update", "1")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert "\x1b" not in plain  # nothing but colours
    assert "\\x1b[2Jclear \\u202eevil [red]text[/red] :smile:" in plain
    assert "no [bold]number[/bold]" in plain
    assert plain.count("╭") == 2
    assert re.search(r"group 0 · trained by update 1 · sums · row 0", plain)
    assert re.search(r"0/0/0 ok .*\n.*reward 1 · gain \+0.5 · 5 tokens", plain)


def test_a_pipe_that_closes_ends_it_quietly(run: str) -> None:
    command = f"{sys.executable} -m asyncrl.cli samples {run} --sort reward | head -1"
    done = subprocess.run(["bash", "-c", command + "; echo ${PIPESTATUS[0]}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[0])["group"] == 0
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] in ("0", "141")  # few lines fit the pipe
