"""What all verbs of the command line share: their options, how they end, and the command to run next."""

import json
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from medseg import screen
from medseg.files import UserError, default_workspace, disk_trouble, dump_json
from medseg.result import EXIT_INTERNAL, EXIT_USAGE, Result

EXIT_INTERRUPTED = 130  # the shell's convention for Ctrl-C

Workspace = Annotated[
    Path | None, typer.Option("--workspace", help="Where medseg keeps everything [MEDSEG_WORKSPACE, else ./workspace].")
]
Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one field of the config.")]
CohortDir = Annotated[Path, typer.Option("--cohort", help="Cohort folder.")]
ConfigArg = Annotated[str, typer.Argument(metavar="CONFIG", help="Path, or name of a file in configs/.")]
ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="Bundle folder, run id, or models:/NAME@ALIAS.")]
Split = Annotated[Literal["train", "val", "test"], typer.Option(help="Which cases of the cohort.")]


def finish(step: Callable[[], Result], as_json: bool, then: str = "") -> None:
    """Run a step, print its result and the command to run `then`, exit with its code."""
    try:
        with redirect_stdout(sys.stderr), _sigterm_interrupts():  # stdout is for the result alone
            result = step()
    except UserError as error:
        _fail("usage", str(error), EXIT_USAGE, as_json)
    except KeyboardInterrupt:
        message = "interrupted; what is finished is kept, see `--resume` for training, else run the same command again."
        _fail("interrupted", message, EXIT_INTERRUPTED, as_json)
    except ChildProcessError as error:
        _fail("internal", str(error), EXIT_INTERNAL, as_json)
    except Exception as error:  # the last line of defence: the cause is shown whole
        if trouble := disk_trouble(error):
            _fail("usage", trouble, EXIT_USAGE, as_json)
        traceback.print_exc()
        _fail("internal", f"{type(error).__name__}: {error}", EXIT_INTERNAL, as_json)
    else:
        print(dump_json(screen.as_tree(result)) if as_json else screen.as_text(result, then))
        sys.exit(result.exit_code)


def _fail(kind: str, message: str, code: int, as_json: bool) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"status": "error", "kind": kind, "error": message}))
    sys.exit(code)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM stops a step as Ctrl-C does, so that it cleans up; steps with an own way to stop keep it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def next_command(verb: str, subject: str, workspace: Path | None, *more: str, **options: object) -> str:
    """A command to run next, quoted for the shell, in the same workspace."""
    words = ["medseg", verb, subject, *more]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return shlex.join([*words, "--workspace", str(workspace)] if workspace else words)


def workspace_of(given: Path | None) -> Path:
    return (given or default_workspace()).absolute()
