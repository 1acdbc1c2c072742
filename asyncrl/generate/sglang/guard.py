"""Runs a command that must not outlive its owner: `python guard.py LIFELINE COMMAND…`, as leader of its own session.

LIFELINE is the read end of a pipe whose other end the owner holds. When the owner ends, however it ends, the pipe closes,
and everything in this process group is killed; likewise when the command ends, so that none of its children stays behind.
It is two processes, of which the inner one does all this when the outer one is killed too: a Ray worker that exits kills its
direct children, and only these. Standard library only, and never imported: it must start in milliseconds.
"""

import os
import select
import signal
import subprocess
import sys


def main(lifeline: int, command: list[str]) -> None:
    os.set_inheritable(lifeline, False)
    outer = os.pidfd_open(os.getpid())
    if os.fork():
        signal.pause()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(process.pid)
    select.select([lifeline, ended, outer], [], [])
    if (code := process.poll()) is not None:
        print(f"guard: {command[0]} ended with exit code {code}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
