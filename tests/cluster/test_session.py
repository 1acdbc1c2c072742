"""Signals that come while Ray starts, and whose session is whose. Ray itself is not needed for it."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from asyncrl import cli
from asyncrl.cluster.session import deaf_to_hangups, heed_signals, join_or_start, ray_session, reach
from asyncrl.config import Deployment
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.processes import ENDING, undisturbed
from asyncrl.scratch import traces


class Hook:
    """Python drops what is raised while it calls this, as in the hooks of a fork."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def leave(number: int, frame: object) -> None:
    raise SystemExit(15)  # as Ray's handler does


@pytest.fixture
def own_handler():
    """Of all; a shell has its jobs in the background ignore SIGINT."""
    former = {number: signal.signal(number, signal.default_int_handler) for number in ENDING}
    yield signal.default_int_handler
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", ENDING)
def test_an_interrupt_that_python_drops_is_raised_at_the_end(own_handler: object, number: signal.Signals) -> None:
    went_on = False

    @heed_signals()
    def start() -> None:
        nonlocal went_on
        signal.signal(signal.SIGTERM, leave)
        Hook(number)
        went_on = True

    with pytest.raises(KeyboardInterrupt):
        start()
    assert went_on
    assert signal.getsignal(signal.SIGTERM) is own_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_an_exit_of_rays_handler_is_an_interrupt(own_handler: object) -> None:
    @heed_signals()
    def start() -> None:
        signal.signal(signal.SIGTERM, leave)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert signal.getsignal(signal.SIGTERM) is own_handler


def test_other_signals_and_other_errors_pass() -> None:
    @heed_signals()
    def start() -> None:
        signal.raise_signal(signal.SIGCHLD)
        raise RuntimeError("no cluster")

    with pytest.raises(RuntimeError, match="no cluster"):
        start()


@pytest.mark.parametrize("numbers", [[], [signal.SIGINT], [signal.SIGHUP, signal.SIGINT]])
def test_signals_are_handled_once_it_is_over(own_handler: object, numbers: list[signal.Signals]) -> None:
    """Each by the handler that is there by then: a first one may have changed it."""
    done, handled = [], []

    def first(number: int, frame: object) -> None:
        handled.append("first")
        for each in ENDING:
            signal.signal(each, second)
        raise KeyboardInterrupt

    def second(number: int, frame: object) -> None:
        handled.append("second")
        raise KeyboardInterrupt

    for each in ENDING:
        signal.signal(each, first)
    with pytest.raises(KeyboardInterrupt) if numbers else nullcontext(), undisturbed():
        for number in numbers:
            signal.raise_signal(number)
        done.append("all of it")
    assert done == ["all of it"]
    assert handled == ["first", "second"][: len(numbers)]


def test_the_session_of_an_own_ray_is_in_use_until_it_is_shut_down_and_anothers_is_let_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tmp_path / "ray" / "session_1"
    session.mkdir(parents=True)
    seen: list[bool] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by another test
    monkeypatch.setattr("ray.init", lambda **options: SimpleNamespace(address_info={"session_dir": str(session)}))
    monkeypatch.setattr("asyncrl.cluster.session.reach", lambda address: None)
    monkeypatch.setattr("ray.shutdown", lambda: seen.extend(trace.in_use for trace in traces(tmp_path, tmp_path)))
    with ray_session(Deployment(ray_address="10.0.0.1:6379")) as here:
        assert not here
    assert seen == []  # a cluster's
    with ray_session(Deployment()) as here:
        assert here
        assert [trace.in_use for trace in traces(tmp_path, tmp_path)] == [True]
    assert seen == [True]
    assert [(trace.path, trace.in_use) for trace in traces(tmp_path, tmp_path)] == [(session, False)]


def test_a_terminal_that_closes_ends_no_process_of_rays(own_handler: object) -> None:
    """Those that are started meanwhile, and what these start, never get a SIGHUP; this process does."""
    sleeping = "import subprocess, sys; print(flush=True); sys.exit(subprocess.run(['sh', '-c', 'kill -HUP $$']).returncode)"
    with deaf_to_hangups():
        process = subprocess.Popen([sys.executable, "-c", sleeping], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
    with process:
        assert process.wait(30) == 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (None, "Connection refused"),
        (b"HTTP/1.0 400 Bad Request", "something else listens there"),
        (b"", "something else listens there"),  # which takes the connection, and closes it
    ],
)
def test_a_cluster_that_is_not_there_is_named_at_once(
    first: bytes | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)

    def serve() -> None:
        with contextlib.suppress(OSError), server.accept()[0] as peer:
            peer.recv(1000)
            peer.sendall(first or b"")

    began = time.monotonic()
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        answering = threading.Thread(target=serve)
        if first is None:
            server.close()
        else:
            answering.start()
        assert cli.main(["doctor", "--cluster", "--address", address]) == 1
        if first is not None:
            answering.join(10)
    assert time.monotonic() - began < 15
    error = capsys.readouterr().err
    assert f"no Ray cluster can be joined at '{address}'" in error
    assert f"{said}; expected HOST:PORT of the head's" in error


def test_a_listener_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncrl.cluster.session._REACH_S", 0.05)
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(Unavailable, match=r"nothing answers within 0\.05 s; expected HOST:PORT"),
    ):
        reach(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head", "head:port"])
def test_what_is_no_address_of_a_cluster_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT of the head's `ray start --head --port`"):
        reach(address)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (Exception("The current node timed out."), Unavailable, "Ray did not start: The current node timed out. Try again"),
        (ValueError("a defect"), ValueError, "a defect"),
    ],
)
def test_a_ray_that_does_not_start_is_told_in_a_line(
    error: Exception, raised: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(raised, match=said):
        join_or_start("", {})
