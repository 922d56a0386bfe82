"""A process that waits for another to die: `python -m medseg.watch WORKSPACE RUN_ID`.

Its standard input is a pipe that the working process holds. That process writes a word before it ends in order; when
the pipe closes without one, the process is dead and its run is marked FAILED. Until then this one only sleeps, so it
imports next to nothing.
"""

import signal
import sys
from pathlib import Path


def main(workspace: str, run_id: str) -> None:
    """Wait for the end of the input; without a word of a clean end, close the run."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read():
        return

    from medseg.config import TrackingConfig
    from medseg.runs import RunFolder
    from medseg.tracking import close_dead_run

    run = RunFolder(run_id, Path(workspace) / "runs" / run_id, Path(workspace))
    close_dead_run(run, TrackingConfig())  # the address of the store stands in the environment


if __name__ == "__main__":
    main(*sys.argv[1:])
