"""The live view at a terminal (pyte's, on a pseudo-terminal): nothing is torn, keys, other sizes, and how it is left."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyte
import pytest

PROGRAM, ROOT = Path(__file__).with_name("shown_live.py"), Path(__file__).parents[2]
KEYS = "s newest samples"
SIZELESS = {
    name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")
}  # which go before a terminal's


class Terminal:
    """A pseudo-terminal of a size, and what stands on it."""

    def __init__(self, width: int, height: int) -> None:
        self.screen = pyte.HistoryScreen(width, height, history=2000)
        self.stream = pyte.ByteStream(self.screen)
        self.master, slave = os.openpty()
        self.resize(width, height)
        orders, self._orders = os.pipe()
        self._done, done = os.pipe()

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.shell = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(orders), str(done)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            pass_fds=(orders, done),
            env={**SIZELESS, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "LOG_LEVEL": "INFO"},
            preexec_fn=own_terminal,
        )
        for descriptor in (slave, orders, done):
            os.close(descriptor)
        self._told = os.fdopen(self._done)
        self.pid = int(self.hears("pid").split()[1])

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.screen.resize(height, width)

    def hears(self, what: str) -> str:
        """The next that is told, after which all that was written stands on the screen."""
        told = self._read_line()
        assert told.startswith(what), told
        return told

    def _read_line(self) -> str:
        """Reads the terminal meanwhile: who writes to one that nobody reads, waits."""
        while not select.select([self._told], [], [], 0.02)[0]:
            self._feed()
        line = self._told.readline().strip()
        self._feed()
        return line

    def _feed(self) -> None:
        while select.select([self.master], [], [], 0)[0]:
            try:
                self.stream.feed(os.read(self.master, 1 << 16))
            except OSError:  # everybody has left it
                return

    def order(self, *orders: str) -> str:
        told = ""
        for order in orders:
            os.write(self._orders, f"{order}\n".encode())
            told = self.hears(order.split()[0])
        return told

    def say(self, order: str) -> None:
        os.write(self._orders, f"{order}\n".encode())

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def all(self) -> list[str]:
        """What has scrolled away, too."""
        above = ["".join(line[x].data for x in range(self.screen.columns)).rstrip() for line in self.screen.history.top]
        return [*above, *self.shown]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.shell.kill()
        self.shell.wait()
        for descriptor in (self.master, self._orders):
            os.close(descriptor)
        self._told.close()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(80, 24)
    yield made
    made.close()


def heads(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("sums ") and "/200" in line]


def test_the_log_scrolls_above_the_view_and_neither_is_torn(terminal: Terminal) -> None:
    long = "x" * 150 + "."
    terminal.order("update 1")
    for i in range(30):
        terminal.order(f"log line-{i:02d}", f"update {i + 2}")
        assert len(heads(terminal.all)) == 1
        assert KEYS in terminal.shown
    terminal.order(f"print {long}", "update 40")
    everything = terminal.all
    assert [int(n) for n in re.findall(r"line-(\d\d)", "\n".join(everything))] == [*range(30)], "each once, in order"
    assert long in "".join(everything), "whole, broken only by the terminal's edge"
    assert len(heads(everything)) == 1
    view = terminal.shown[terminal.shown.index(heads(everything)[0]) :]
    assert view[-1] == KEYS or not any(view[view.index(KEYS) + 1 :])
    assert [line.split()[0] for line in view if line][:4] == ["sums", "reward", "samples/s", "lag"]


def test_keys_show_the_newest_samples_and_are_not_echoed(terminal: Terminal) -> None:
    assert terminal.order("update 1", "update 2").endswith("taken")
    terminal.press(b"s")
    for step in range(3, 200):
        terminal.order(f"update {step}")
        if "  › 1+1=" in terminal.shown:
            break
    shown = terminal.shown
    assert shown[1:4] == ["7/0/1  ok 0.5, 3 tokens, lag 2", "  › 1+1=", "  ‹ two\\nlines"]
    assert not any(line.startswith("reward ") for line in shown)
    terminal.press(b"q")
    terminal.order("update 199")
    assert any(line.startswith("reward ") for line in terminal.shown)
    assert "  › 1+1=" not in terminal.shown


@pytest.mark.parametrize(("width", "height"), [(50, 24), (132, 40), (30, 8), (80, 12)])
def test_another_size_gets_another_view(terminal: Terminal, width: int, height: int) -> None:
    terminal.order("update 1", "log before", "update 2")
    terminal.resize(width, height)
    terminal.order("update 3", "log after", "update 4")
    assert len(heads(terminal.shown)) == 1
    assert "INFO asyncrl.test: after" in "".join(terminal.all)
    assert KEYS in terminal.shown
    assert ("held-out" in next(line for line in terminal.shown if line.startswith("reward"))) == (width >= 76)


@pytest.mark.parametrize("how", [b"\x03", signal.SIGTERM, "end"])
def test_the_terminal_is_given_back(terminal: Terminal, how: Any) -> None:
    assert terminal.order("update 1").endswith("taken")
    assert terminal.screen.cursor.hidden
    if isinstance(how, bytes):
        terminal.press(how)
    elif how == "end":
        terminal.say("end")
    else:
        os.kill(terminal.pid, how)
    if how != "end":
        terminal.hears("interrupted")
    assert terminal.hears("ended") == "ended 0, as it was"
    assert not terminal.screen.cursor.hidden
    assert len(heads(terminal.all)) == 1


def test_a_stopped_program_leaves_the_terminal_to_the_shell(terminal: Terminal) -> None:
    terminal.order("update 1")
    terminal.press(b"\x1a")  # Ctrl-Z
    assert terminal.hears("stopped") == "stopped, as it was"
    assert not terminal.screen.cursor.hidden
    terminal.say("go on")
    terminal.hears("going on")
    assert terminal.order("update 2").endswith("taken")
    terminal.order("log later", "update 3")
    assert terminal.screen.cursor.hidden
    assert len(heads(terminal.all)) == 2, "the one that it was left with, and the new one"
    terminal.say("end")
    assert terminal.hears("ended") == "ended 0, as it was"
