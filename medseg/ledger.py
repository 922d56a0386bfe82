"""The ledger: one row per case of a batch job, whatever became of it."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from medseg.files import UserError, read_rows, write_rows

Status = Literal["done", "flagged", "rejected", "failed"]
USABLE: tuple[Status, ...] = ("done", "flagged")


@dataclass(frozen=True)
class Row:
    """What became of one case.

    Attributes:
        case_id: names the case's folder; a pseudonym where the scan was DICOM or the cohort's names are keyed.
        status: `done`; `flagged`: done, but look at it; `rejected`: the scan cannot be used; `failed`: an error.
        reason: why it is not simply done; holds no path.
        source_kind: dicom, nifti or png; empty when unknown.
        seconds: reading, network and writing together.
        input_sha256, output_sha256, bundle_sha256: of the scan, of the mask or the probabilities, of the model.
        expected_dice: of the structure that can be trusted least; None where the model was not calibrated for it.
        verdict: refer, do not refer or not assessable; empty where the model gives none.
        probability: calibrated, of the class to refer, as text; score: 0 to 100; threshold: of the probability.
            Empty without an assessable verdict.
        feature_distance: from the training cohort, see `medseg.feature_distance`; distance_limit: beyond it a scan is
            flagged. None where the model cannot tell.
        air_windows: of a segmentation, windows that the network did not see since they hold air (`predict.air_below`).
    """

    case_id: str
    status: Status
    reason: str = ""
    source_kind: str = ""
    seconds: float = 0.0
    input_sha256: str = ""
    output_sha256: str = ""
    bundle_sha256: str = ""
    expected_dice: float | None = None
    verdict: str = ""
    probability: str = ""
    score: str = ""
    threshold: str = ""
    feature_distance: float | None = None
    distance_limit: float | None = None
    air_windows: int = 0

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> "Row":
        """The row that follows from a case's `result.json`."""
        distance = result.get("feature_distance") or {}  # older results have no such fields
        return cls(
            **{name: result[name] for name in _COLUMNS if name not in _DERIVED},
            expected_dice=result.get("expected_dice"),
            feature_distance=distance.get("value"),
            distance_limit=distance.get("limit"),
            air_windows=(result.get("windows") or {}).get("air", 0),
            seconds=round(sum(result["seconds"].values()), 3),
            bundle_sha256=result["bundle"]["sha256"],
            **_verdict_cells(result.get("verdict")),  # type: ignore[arg-type]
        )


_COLUMNS = tuple(f.name for f in fields(Row))
_VERDICT = ("verdict", "probability", "score", "threshold")
_OPTIONAL = ("expected_dice", "feature_distance", "distance_limit")  # numbers that older tables have no column for
_DERIVED = ("seconds", "bundle_sha256", "air_windows", *_OPTIONAL, *_VERDICT)


def _verdict_cells(verdict: Mapping[str, Any] | None) -> dict[str, str]:
    if not verdict:
        return {}
    cells = {name: "" if verdict[name] is None else f"{verdict[name]:.6g}" for name in _VERDICT[1:]}
    return {"verdict": verdict["call"], **cells}


class Ledger:
    """Collects rows and keeps `ledger.csv` on disk, whole at any moment, at most `every_s` seconds behind."""

    def __init__(self, path: Path, every_s: float = 5.0) -> None:
        self.path, self._every_s = path, every_s
        self._rows: dict[str, Row] = {}
        self._written = time.monotonic()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, in order of case_id."""
        return tuple(self._rows[case_id] for case_id in sorted(self._rows))

    def add(self, row: Row) -> None:
        """Add the row of a case, in place of an earlier one of the same case."""
        self._rows[row.case_id] = row
        if time.monotonic() - self._written >= self._every_s:
            self.write()

    def write(self) -> Path:
        """Write the table now."""
        write_ledger(self.path, self.rows)
        self._written = time.monotonic()
        return self.path

    def counts(self) -> dict[str, int]:
        """Number of cases by status, every status named."""
        return count_statuses(self._rows.values())


def count_statuses(rows: Iterable[Row]) -> dict[str, int]:
    """Number of rows by status, every status named."""
    found = Counter(row.status for row in rows)
    return {status: found[status] for status in get_args(Status)}


def write_ledger(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as `ledger.csv`, atomically."""
    return write_rows(path, _COLUMNS, (asdict(row) for row in rows))


def read_ledger(path: Path) -> tuple[Row, ...]:
    """Read `ledger.csv`. Raises UserError when it is missing or no ledger."""
    rows = read_rows(path)
    try:
        return tuple(_row(row) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no ledger ({error}); run `medseg predict` again.") from error


def _row(cells: Mapping[str, str]) -> Row:
    numbers: dict[str, float | None] = {name: float(cells[name]) if cells.get(name) else None for name in _OPTIONAL}
    counts = {"seconds": float(cells["seconds"]), "air_windows": int(cells.get("air_windows") or 0)}
    return Row(**{**cells, **numbers, **counts})  # type: ignore[arg-type]
