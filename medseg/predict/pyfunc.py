"""The bundle as MLflow serves it: by reference. Paths of scans come in, paths of masks and numbers go out."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.bundle import Bundle, load_bundle
from medseg.files import UserError, read_json
from medseg.label_sets import EMPTY, SEPARATOR
from medseg.ledger import USABLE, Row, read_ledger
from medseg.predict import step
from medseg.predict.predictor import Predictor

if TYPE_CHECKING:
    import pandas as pd


class PathModel:
    """Predicts scans that are named by their paths on the machine that serves."""

    def __init__(self, bundle: Bundle) -> None:
        self._predictor = Predictor(bundle)

    def predict(self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Predict the scans below each path.

        Args:
            model_input: column `path`: a file, folder or archive that `medseg predict` takes.
            params: `out`: folder for masks and ledgers; by default a new temporary folder, which is kept.

        Returns:
            One row per case: `path`, `case_id`, `status`, `reason`, `mask` (path or empty), `predicted` (of labels that
            are not exclusive all that are called, joined by `|`, or `none`), one column per label: `volume_ml_<label>`
            or `prob_<class>`, and of a calibrated classifier `verdict`, `score`, `threshold`, the bounds of sensitivity
            and specificity, `calibration` and `bundle_sha256`.

        Raises:
            UserError: there is no column `path`, or a path holds no scan.
        """
        import pandas as pd

        if "path" not in model_input:
            raise UserError(f"the input has columns {list(model_input)}; give the scans' paths in a column 'path'.")
        given = (params or {}).get("out")
        out = Path(given) if given else Path(tempfile.mkdtemp(prefix="medseg-predict-"))
        rows = [
            row
            for number, path in enumerate(model_input["path"])
            for row in self._predict_path(Path(str(path)), out / f"{number:04d}")
        ]
        return pd.DataFrame(rows)

    def _predict_path(self, path: Path, out: Path) -> Iterator[dict[str, Any]]:
        step.run(self._predictor.bundle, [path], out, predictor=self._predictor)
        for entry in read_ledger(out / "ledger.csv"):
            row = {"path": str(path), "case_id": entry.case_id, "status": entry.status, "reason": entry.reason}
            row |= {"mask": "", "predicted": ""}
            if entry.status in USABLE:
                row |= _figures(out / entry.case_id)
            if entry.verdict:
                row |= _verdict(self._predictor.bundle, entry)
            yield row


def _figures(folder: Path) -> dict[str, Any]:
    result = read_json(folder / "result.json")
    called = result["predicted"]
    masks = [name for name in result["outputs"] if name in ("mask.nii.gz", "mask.png")]
    return {
        "mask": str(folder / masks[0]) if masks else "",
        "predicted": (SEPARATOR.join(called) or EMPTY) if isinstance(called, list) else called or "",
        **{f"volume_ml_{name}": value for name, value in result["volumes_ml"].items()},
        **{f"prob_{name}": value for name, value in result["probs"].items()},
    }


def _verdict(bundle: Bundle, row: Row) -> dict[str, Any]:
    verdict = bundle.verdict
    assert verdict is not None, "a row with a verdict comes from a bundle with one"
    told: dict[str, Any] = {"verdict": row.verdict, "score": int(row.score) if row.score else None}
    told |= {"threshold": verdict.threshold, "calibration": verdict.id, "bundle_sha256": bundle.sha256}
    for name in ("sensitivity", "specificity"):
        figure = verdict.point.get(name) or {}
        told |= {f"{name}_{bound}": figure.get(bound) for bound in ("ci_low", "ci_high")}
    return told


def _load_pyfunc(data_path: str) -> PathModel:
    """Called by MLflow with the folder of the bundle."""
    return PathModel(load_bundle(data_path))
