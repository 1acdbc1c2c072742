"""`asyncrl run … --detach`: a run in a session of its own, which a terminal that closes does not end. Standard library only."""

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from asyncrl.rundir import RunDir

LOOK_S = 0.2  # how often what it prints is shown here, until it is up


def detach(command: Sequence[str], paths: RunDir) -> int:
    """Starts `command` and waits until it tells that it is up; then says on standard output where it is, and returns 0.

    Until then what it prints, all of which goes to `driver.log` in the run directory, is shown here as well. Returns its exit
    status if it ends before; SIGINT or SIGTERM ends it too. To `command` is added `--ready FD`, the pipe for `tell_ready`.
    """
    paths.create(paths.path)
    reader, writer = os.pipe()
    with paths.driver_log.open("ab") as output:
        shown = output.tell()
        process = subprocess.Popen(
            [*command, "--ready", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(writer,),
        )
    os.close(writer)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with open(reader, "rb", buffering=0) as pipe:
        try:
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            while not poll.poll(1000 * LOOK_S):
                shown = _show(paths.driver_log, shown)
            ready = pipe.read(1)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            _show(paths.driver_log, shown)
    if not ready:
        return process.wait()
    run = shlex.quote(str(paths.path))
    print(f"run     {paths.path}\npid     {process.pid}\nlog     {paths.driver_log}")
    print(f"follow  asyncrl attach {run}\nstop    asyncrl stop {run}    (in order, with a checkpoint)", flush=True)
    return 0


def tell_ready(descriptor: int) -> None:
    """Called by the detached run when it is up; once."""
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        os.write(descriptor, b".")
    os.close(descriptor)


def _show(log: Path, shown: int) -> int:
    """Copies what is new in the log since byte `shown` to standard error, and returns where it ends."""
    with log.open("rb") as file:
        file.seek(shown)
        sys.stderr.write(file.read().decode(errors="replace"))
        return file.tell()
