"""An SGLang server's processes: the command that starts them, its port, its log, and whether all of them live."""

import contextlib
import functools
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.processes import OwnedProcess, under_guard

OWN_PACKAGES = {"PYTHONPATH": ""}  # in the environment of a Python of another environment
LOG_TAIL = 15  # lines of its log that an error about a server shows


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now.

    A server binds it many seconds later. So it is one that nobody else is given meanwhile: neither by Linux, which takes
    those of connections from 32768 on, nor by Ray, whose workers have 10002 to 19999.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class ServerProcess(OwnedProcess):
    """The command, and every process that it starts. Standard output and error go to `log`, appended.

    env is added to this process's environment. A command that can't be started shows as one that has died, its log says why.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        program = find_program(command[0]) or command[0]
        # SGLang may print its arguments, of which one is its key.
        with open(log, "ab", opener=functools.partial(os.open, mode=0o600)) as output:
            self._log_start = output.tell()
            environment = {**os.environ, **env}
            super().__init__(under_guard([program, *command[1:]]), stdout=output, stderr=output, env=environment)

    def alive(self) -> bool:
        """Whether the command runs, and no process under it was ended by a signal (SGLang itself needs seconds to notice)."""
        return self.exit_code() is None and not any(_crashed(pid) for pid in self.pids())

    def pids(self) -> list[int]:
        """Every process of the server, on Linux; its guard comes first."""
        found = [self.pid]
        for pid in found:  # grows meanwhile
            with contextlib.suppress(OSError):  # it has ended
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        with open(self._log, "rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL:])


def _crashed(pid: int) -> bool:
    """Whether a signal has ended a process, and nobody has reaped it. One that ended by itself waits for its parent, which may
    be busy for seconds: that is no crash."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # reaped
        return False
    return fields[0] == "Z" and os.WIFSIGNALED(int(fields[49]))


def find_program(name: str) -> str | None:
    """Where a command is: this Python, on PATH, or beside this Python, whose environment may not be activated."""
    if name == "python":
        return sys.executable
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def sglang_of(python: str) -> str:
    """The version of SGLang in the environment of another Python, which is started for that; some 0.1 s.

    Raises ConfigError if there is no such Python on this machine, or no SGLang in its environment.
    """
    ask = "from importlib.metadata import version; print(version('sglang'))"
    try:
        command, environment = [python, "-c", ask], {**os.environ, **OWN_PACKAGES}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except subprocess.CalledProcessError as error:
        problem = (error.stderr.strip().splitlines() or [f"it ended with status {error.returncode}"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    raise ConfigError(
        f"engine.sglang.python={python!r} could not start a server: {problem}; name the Python of an environment with SGLang: "
        "python -m venv DIR && DIR/bin/pip install sglang, then DIR/bin/python"
    )


def require_command(command: Sequence[str]) -> None:
    """Raises ConfigError unless the program that starts a server can be found on this machine."""
    if find_program(command[0]) is None:
        raise ConfigError(
            f"engine.sglang: the program {command[0]!r} is not on PATH, nor beside {sys.executable}, so no SGLang server could "
            "be started; on a CPU run deploy/sglang-cpu/install, with GPUs pip install 'asyncrl[sglang]' and leave the command "
            "out"
        )
