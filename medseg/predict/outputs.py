"""The folder of one case: what is written into it, in which order, and when it counts as finished.

`result.json` comes last. A folder without it is unfinished, whatever else it holds, and is begun anew.
"""

import hashlib
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle
from medseg.cohort import Finding
from medseg.files import UserError, dump_json, read_json, sha256_file, write_json, write_text
from medseg.ingest.scan import Refused, Scan
from medseg.ledger import Row, Status
from medseg.predict.export_dicom import REPORT, SEGMENTATION, write_segmentation, write_verdict_report
from medseg.predict.export_nifti import write_mask
from medseg.predict.jobs import Job
from medseg.predict.predictor import Prediction
from medseg.predict.preview import write_preview
from medseg.predict.priors import Earlier, Prior
from medseg.tracking.failure import scrub

_OUTPUTS = ("mask.nii.gz", "mask.png", SEGMENTATION, REPORT, "preview.png", "failure.txt")
_MAX_REASON = 500


@dataclass(frozen=True)
class CaseFolder:
    """Where the results of one case go.

    Attributes:
        path: `<out>/<case_id>`.
        input_sha256: of the scan; empty when it cannot be read.
        earlier: the examination whose mask the network is shown, if it takes one and there is one.
    """

    path: Path
    job: Job
    bundle: Bundle
    input_sha256: str = ""
    earlier: Earlier | None = None

    def finished(self) -> Row | None:
        """The ledger row, if nothing is left to do: same scan, model and prior, outputs in place, not failed."""
        file = self.path / "result.json"
        if not file.is_file():
            return None
        try:
            result = read_json(file)
            row = Row.from_result(result)
            outputs = [self.path / name for name in result["outputs"]]
            prior = {name: result["prior"][name] for name in ("case_id", "mask_sha256")} if result.get("prior") else {}
        except (UserError, KeyError, TypeError, AttributeError):
            return None  # of another layout, so made anew
        same = (row.input_sha256, row.bundle_sha256) == (self.input_sha256, self.bundle.sha256)
        same = same and prior == (self.earlier.facts() if self.earlier else {})
        return row if same and row.status != "failed" and all(output.is_file() for output in outputs) else None

    def write(self, scan: Scan, prediction: Prediction, seconds: dict[str, float], prior: Prior | None = None) -> Row:
        """Write mask, DICOM SEG and SR (of a scan that came as DICOM), preview and, last, the result."""
        start = time.monotonic()
        self._clear()
        flags, outputs = list(prediction.flags), [self.path / "preview.png"]
        write_preview(outputs[0], scan.channels[0], prediction.mask)
        digest = hashlib.sha256(dump_json(prediction.probs).encode()).hexdigest()
        if prediction.mask is not None:
            outputs.append(write_mask(self.path, prediction.mask))
            digest = sha256_file(outputs[-1])
        if scan.source_kind == "dicom" and scan.source_files:
            outputs += self._write_dicom(scan, prediction, flags)
        first = scan.channels[0]
        return self._finish(
            "flagged" if flags else "done",
            " ".join(flag.message for flag in flags),
            {**seconds, "write": round(time.monotonic() - start, 3)},
            volumes_ml=prediction.volumes_ml,
            probs=prediction.probs,
            predicted=None if prediction.predicted == "" else prediction.predicted,
            confidence=prediction.confidence,
            expected_dice=_lowest(prediction),
            verdict=prediction.verdict,
            feature_distance=self._distance(prediction),
            windows=prediction.windows,
            flags=flags,
            output_sha256=digest,
            outputs=[path.name for path in outputs],
            spacing_mm=first.spacing_mm,
            shape=first.array.shape,
            **({"prior": prior.facts} if prior else {}),
        )

    def write_rejection(self, refused: Refused) -> Row:
        """Write that the scan cannot be used, and why."""
        self._clear()
        flags = [Finding(refused.code, "error", refused.reason)]
        outputs: list[Path] = []
        verdict, source = self.bundle.verdict, self.job.dicom_radiograph
        told = verdict.as_result(None) if verdict is not None else None
        if told is not None and source is not None:
            outputs = write_verdict_report(
                self.path, source, told, self.bundle, [refused.code], flags, seed_uid=self._seed_uid
            )
        names = [path.name for path in outputs]
        return self._finish("rejected", self._public(refused.reason), {}, flags=flags, verdict=told, outputs=names)

    def write_failure(self, error: Exception) -> Row:
        """Write what went wrong; the whole traceback, which may name paths, stays in `failure.txt`."""
        self._clear()
        write_text(self.path / "failure.txt", "".join(traceback.format_exception(error)))
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "out of memory" in message.lower():
            message = "The scan does not fit into memory; free some, or use a machine with more."
        elif not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message}" if message else type(error).__name__
        return self._finish("failed", self._public(message), {}, outputs=["failure.txt"])

    @property
    def _seed_uid(self) -> str:
        return f"{self.input_sha256}/{self.bundle.sha256}"

    def _write_dicom(self, scan: Scan, prediction: Prediction, flags: list[Finding]) -> list[Path]:
        """The objects for the PACS; what cannot be written becomes a flag."""
        if prediction.mask is not None and scan.kind == "volume":
            return write_segmentation(
                self.path,
                scan.source_files,
                prediction.mask,
                prediction.volumes_ml,
                self.bundle,
                flags,
                seed_uid=self._seed_uid,
            )
        verdict = self.bundle.verdict
        if verdict is None or prediction.verdict is None or scan.kind != "radiograph":
            return []
        reasons = [finding.code for finding in scan.findings if finding.code in verdict.withhold]
        return write_verdict_report(
            self.path, scan.source_files[0], prediction.verdict, self.bundle, reasons, flags, seed_uid=self._seed_uid
        )

    def _clear(self) -> None:
        """Remove what an earlier attempt left; the result goes first, since it vouches for the rest."""
        for name in ("result.json", *_OUTPUTS):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "explanation", ignore_errors=True)
        for part in self.path.glob(".part-*"):
            part.unlink(missing_ok=True)

    def _finish(self, status: Status, reason: str, seconds: dict[str, float], **more: Any) -> Row:
        result: dict[str, Any] = {
            "case_id": self.job.case_id,
            "status": status,
            "reason": reason,
            "patient_id": self.job.patient_id,
            "source_kind": self.job.source_kind,
            "volumes_ml": {},
            "probs": {},
            "predicted": None,
            "confidence": {},
            "expected_dice": None,
            "verdict": None,
            "feature_distance": None,
            "windows": {},
            "flags": [],
            "seconds": seconds,
            "input_sha256": self.input_sha256,
            "output_sha256": "",
            "bundle": self.bundle.identity(),
            "prior": self.earlier.facts() if self.earlier else None,
            "image": self.job.images,
            "outputs": [],
            **more,
        }
        write_json(self.path / "result.json", result)
        return Row.from_result(result)

    def _distance(self, prediction: Prediction) -> dict[str, float | None] | None:
        """The distance from the training cohort and its limit, which is None where too few cases were unseen."""
        known = self.bundle.distance
        if prediction.feature_distance is None or known is None:
            return None
        limit = None if known.limit is None else round(known.limit, 4)
        return {"value": round(prediction.feature_distance, 4), "limit": limit}

    def _public(self, text: str) -> str:
        """Without paths, which may name the patient: the ledger goes to MLflow."""
        return scrub(" ".join(text.split()), self.path.parent)[:_MAX_REASON]


def _lowest(prediction: Prediction) -> float | None:
    """The lowest expected Dice of the structures, None without a calibration."""
    found = [trust.expected_dice for trust in prediction.confidence.values() if trust.expected_dice is not None]
    return min(found, default=None)
