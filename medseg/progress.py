"""Progress on everything longer than two seconds: a bar on a terminal, a line now and then in a log.

All of it goes to stderr, so that stdout stays free for results.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_LOG_EVERY_S = 20.0
_SILENT_S = 2.0


class Progress:
    """Counts finished parts of one job; `advance(text=…)` may carry the latest figures."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar = _terminal_bar(description, total) if sys.stderr.isatty() else None

    def advance(self, count: int = 1, text: str = "") -> None:
        """Count `count` more parts as done."""
        self._done += count
        if self._bar is not None:
            bar, task = self._bar
            if not bar.live.is_started and time.monotonic() - self._start > _SILENT_S:
                bar.start()
            bar.update(task, completed=self._done, text=text)
        elif time.monotonic() - self._last_line > _LOG_EVERY_S:
            self._last_line = time.monotonic()
            print(
                f"{self._description}: {self._done}/{self._total} {text}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None and self._bar[0].live.is_started:
            self._bar[0].stop()


@contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """Show the progress of a job of `total` parts while the block runs."""
    shown = Progress(description, total)
    try:
        yield shown
    finally:
        shown.close()


def tracked(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate with a progress bar."""
    with progress(description, total) as shown:
        for item in items:
            yield item
            shown.advance()


def _terminal_bar(description: str, total: int):  # type: ignore[no-untyped-def]  # rich is imported late
    from rich import progress as rich_progress
    from rich.console import Console

    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=30),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
        transient=True,
    )
    return bar, bar.add_task(description, total=total, text="")
