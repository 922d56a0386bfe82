"""What every step returns, and the exit code that follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medseg.files import write_json

EXIT_DONE, EXIT_INTERNAL, EXIT_USAGE, EXIT_PARTIAL = 0, 1, 2, 3


@dataclass(frozen=True)
class Result:
    """Paths and figures of one finished step; also written as JSON beside what the step made.

    Attributes:
        step: the verb: ingest, plan, train, evaluate, predict, explain, report.
        status: `done`, or `partial` when some cases were rejected or failed and a table says which and why.
        paths: what was written, by name.
        figures: the numbers that matter, by name with unit.
        run_id: the run that this step belongs to, if any.
        rows: a table to show, one mapping a line, all with the same keys.
        text: prose to show, a model card say.
    """

    step: str
    status: Literal["done", "partial"]
    paths: Mapping[str, Path] = field(default_factory=dict)
    figures: Mapping[str, object] = field(default_factory=dict)
    run_id: str = ""
    rows: Sequence[Mapping[str, object]] = ()
    text: str = ""

    @property
    def exit_code(self) -> int:
        """0 all done, 3 finished but some cases were rejected or failed."""
        return EXIT_PARTIAL if self.status == "partial" else EXIT_DONE

    def numbers(self) -> dict[str, float]:
        """The figures that are numbers, for MLflow."""
        return {
            name: float(value)
            for name, value in self.figures.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }

    def write(self, folder: Path) -> "Result":
        """Write `folder/<step>.json` atomically and return self."""
        write_json(folder / f"{self.step}.json", self)
        return self
