"""What asyncrl leaves on a machine: what somebody uses stays, what nobody holds goes, and nothing else is touched."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncrl.cli import main
from asyncrl.scratch import ScratchFolder, remove, session_in_use, traces

HOLDER = """
import mmap, sys
from pathlib import Path
from asyncrl.scratch import ScratchFolder, session_in_use

session, segment = map(Path, sys.argv[1:])
scratch = ScratchFolder()
(scratch.path / "key").write_text("secret")
file = segment.open("w+b")
file.truncate(4096)
pages = mmap.mmap(file.fileno(), 4096)
file.close()  # mapped it stays in use
with session_in_use(session):
    print(scratch.path, flush=True)
    input()
"""


class Machine:
    """A machine's temporary folder and shared memory, and a process that has something of everything there."""

    def __init__(self, folder: Path) -> None:
        self.temporary, self.shm = folder / "tmp", folder / "shm"
        self.session = self.temporary / "ray" / "session_1"
        for made in (self.session, self.shm):
            made.mkdir(parents=True)
        self.segment = self.shm / "sglang_loads_1.shm"
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, self.session, self.segment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )
        assert self.process.stdout is not None
        self.scratch = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def states(self) -> dict[Path, bool]:
        return {trace.path: trace.in_use for trace in traces(self.temporary, self.shm)}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.kill()


def test_what_a_living_process_uses_stays_and_what_a_dead_one_left_goes(machine: Machine) -> None:
    things = {machine.scratch, machine.session, machine.segment}
    assert machine.states() == dict.fromkeys(things, True)
    assert not any(remove(trace) for trace in traces(machine.temporary, machine.shm))
    assert all(thing.exists() for thing in things)
    seen_living = traces(machine.temporary, machine.shm)
    machine.kill()
    assert machine.states() == dict.fromkeys(things, False)
    assert all(remove(trace) for trace in seen_living)  # it is looked again, whatever was seen
    assert machine.states() == {}


def test_what_was_left_and_is_used_again_meanwhile_stays(machine: Machine) -> None:
    machine.kill()
    (left,) = (trace for trace in traces(machine.temporary, machine.shm) if trace.path == machine.session)
    with session_in_use(machine.session):
        assert not remove(left)
    assert remove(left)


def test_nothing_else_is_touched(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, pipes, sessions of another's Ray, other users' things."""
    machine.kill()
    for left in traces(machine.temporary, machine.shm):
        assert remove(left)
    precious = machine.temporary.parent / "precious"
    precious.mkdir()
    (machine.temporary / "asyncrl-link").symlink_to(precious)
    (machine.shm / "sglang_loads_link").symlink_to("/etc/hostname")
    os.mkfifo(machine.shm / "sglang_loads_pipe")  # opening it would wait for a writer
    os.mkfifo(machine.temporary / "asyncrl-pipe")
    (machine.shm / "sglang_loads_folder").mkdir()
    (machine.temporary / "ray" / "session_of_others").mkdir(parents=True)
    (machine.temporary / "asyncrl-runs").mkdir()  # of a user, who may have runs in it
    assert machine.states() == {}
    (machine.temporary / "asyncrl-ours").mkdir()
    (machine.temporary / "asyncrl-ours" / "asyncrl").touch()
    assert len(machine.states()) == 1
    monkeypatch.setattr(os, "getuid", lambda: os.stat("/").st_uid + 1)
    assert machine.states() == {}
    assert precious.is_dir()


def test_a_scratch_folder_is_private_and_goes_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = ScratchFolder()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "model").mkdir()
    assert [trace.in_use for trace in traces(tmp_path, tmp_path)] == [True]
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_and_removes_only_when_told(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asyncrl.jobs.clean.traces", lambda: traces(machine.temporary, machine.shm))
    lists: Callable[[], str] = lambda: capsys.readouterr().out  # noqa: E731
    assert main(["clean", "--yes"]) == 0
    assert lists().splitlines()[-1] == "0 left by dead runs, 0 B; 3 in use by living ones"
    machine.kill()
    assert main(["clean"]) == 0
    told = lists()
    assert f"left        4.0 KiB  SGLang's shared memory  {machine.segment}" in told
    assert told.splitlines()[-1].endswith("; `asyncrl clean --yes` removes what is left")
    assert len(machine.states()) == 3
    assert main(["clean", "--yes"]) == 0
    assert lists().splitlines()[-1].endswith("; 0 in use by living ones; 3 removed")
    assert machine.states() == {}
