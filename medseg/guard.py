"""Run as a script: one server in a folder, of which nothing is left when the one who started it is gone.

    python -m medseg.guard FOLDER COMMAND...

Standard input is a pipe from the starter. When it closes, for whatever reason, the server and all processes of its
group are asked to end, and killed if they do not.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

GRACE_S = 10.0  # between asking a server to end and killing it


def living(group: int) -> list[int]:
    """The processes of a process group, without zombies that nobody has reaped yet."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def _guard(folder: str, command: Sequence[str]) -> int:
    """Run `command` in `folder` until it ends or standard input closes; its exit code, as a shell gives it."""
    signal.signal(signal.SIGTERM, lambda _signal, _frame: None)  # the group's SIGTERM is for the server
    server = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL)
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 1024):
            break
    deadline = time.monotonic() + GRACE_S
    os.killpg(0, signal.SIGTERM)
    while server.poll() is None or _companions():
        if time.monotonic() > deadline:
            for pid in _companions():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _companions() -> list[int]:
    """The other living processes of this process group."""
    return [pid for pid in living(os.getpgrp()) if pid != os.getpid()]


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1], sys.argv[2:]))
