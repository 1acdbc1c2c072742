"""Ray workers that are forks of one process which has imported what they need: torch and transformers, once, not per actor.

    driver ─► server: imports, then waits        Ray ─► stand-in (this file, as a script) ─► server ─► fork: the Ray worker

Ray starts its `py_executable`, the stand-in, in the place of Python. That hands its arguments, environment and files to the
server, and ends as soon as the worker does. The server ends with the driver. Standard library only; nothing is unpickled.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

_REQUEST_BYTES = 1 << 20
_TAKEN = b"\n"  # there is a fork from now on: the stand-in must not become a second worker


@contextlib.contextmanager
def forkserver(modules: Sequence[str]) -> Iterator[str]:
    """The command for Ray's `py_executable`: who runs it waits until the modules are imported, and without the server is Python
    itself. The end ends the server.

    Not for modules that import Ray, which reads settings from the environment then, nor for what starts threads or a GPU.
    """
    from asyncrl.processes import OwnedProcess  # here, as the stand-in must start in milliseconds
    from asyncrl.scratch import ScratchFolder

    folder = ScratchFolder()  # nobody else can ask in there
    address = str(folder.path / "socket")
    command = [sys.executable, "-m", __name__, address, *modules]
    # OMP: importing starts no threads; who computes says how many it wants.
    server = OwnedProcess(command, stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield shlex.join([sys.executable, "-I", "-S", __file__, address])
    finally:
        server.kill()
        folder.close()


def _serve(address: str, modules: Sequence[str]) -> tuple[list[str], dict[str, str], str]:
    """Forks for ever. Returns in each fork: the arguments, environment and folder of the worker that it is to be."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        for module in modules:
            importlib.import_module(module)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
        while True:
            files: list[int] = []
            # Of a stand-in that died, or a worker that ended at once.
            with listener.accept()[0] as stand_in, contextlib.suppress(ConnectionError, ProcessLookupError):
                data, files, _, _ = socket.recv_fds(stand_in, _REQUEST_BYTES, 3)
                while not data.endswith(b"\n"):
                    if not (more := stand_in.recv(_REQUEST_BYTES)):
                        raise ConnectionResetError
                    data += more
                stand_in.sendall(_TAKEN)
                if (pid := os.fork()) == 0:
                    break
                ended = os.pidfd_open(pid)
                socket.send_fds(stand_in, [b"\n"], [ended])
                os.close(ended)
            for file in files:
                os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray kills the whole group of a worker
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    request: Any = json.loads(data)
    return request


def _stand_in(address: str, arguments: Sequence[str]) -> None:
    """Has the server fork a worker, and waits until that ends; becomes the worker itself if there is no server."""
    request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode() + b"\n"
    with socket.socket(socket.AF_UNIX) as server:
        taken = b""
        with contextlib.suppress(OSError):
            server.connect(address)
            if rest := request[socket.send_fds(server, [request], [0, 1, 2]) :]:
                server.sendall(rest)
            taken = server.recv(1)
        if not taken:
            os.execv(sys.executable, [sys.executable, *arguments])
        _, (ended,), _, _ = socket.recv_fds(server, 1, 1)
    select.select([ended], [], [])


def _main(address: str, arguments: Sequence[str]) -> None:
    if sys.flags.isolated:
        _stand_in(address, arguments)
        return
    from asyncrl.processes import end_with_owner

    end_with_owner(int(arguments[-1]))
    sys.argv, environment, folder = _serve(address, arguments[:-1])
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
