"""The mask of a patient's earlier examination, for networks that take it beside the image.

It is always read from the folder that the batch writes, never handed over in memory: a batch that was killed and
started again gives every case the prior that the uninterrupted one gives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from medseg.cohort import Finding
from medseg.data.alignment import align
from medseg.data.preprocess import Prepared
from medseg.data.prior import move_codes
from medseg.exams import previous
from medseg.files import UserError, read_json
from medseg.images import read_image
from medseg.ingest.scan import Scan
from medseg.ledger import USABLE
from medseg.predict.jobs import Job


@dataclass(frozen=True)
class Earlier:
    """A patient's latest earlier examination that was segmented.

    Attributes:
        job: the scan. mask: what was found in it. mask_sha256: of its bytes.
    """

    job: Job
    mask: Path
    mask_sha256: str

    def facts(self) -> dict[str, str]:
        """What a result was made with, to tell a result that would now be another."""
        return {"case_id": self.job.case_id, "mask_sha256": self.mask_sha256}


@dataclass(frozen=True)
class Prior:
    """What the network is shown.

    Attributes:
        codes: (D, H, W) on the network's grid (see `medseg.data.prior`); None where the examinations do not align.
        facts: for `result.json`. findings: why there are no codes.
    """

    codes: NDArray[Any] | None
    facts: dict[str, Any]
    findings: tuple[Finding, ...] = ()


def find_earlier(job: Job, jobs: Sequence[Job], out: Path) -> Earlier | None:
    """The latest earlier examination of the batch whose mask is there; None without."""
    earlier = previous(job, jobs)
    while earlier is not None:
        file = out / earlier.case_id / "result.json"
        result = read_json(file) if file.is_file() else {}
        mask = file.with_name("mask.nii.gz")
        if result.get("status") in USABLE and mask.is_file():
            return Earlier(earlier, mask, str(result["output_sha256"]))
        earlier = previous(earlier, jobs)
    return None


def load_prior(earlier: Earlier, scan: Scan, prepared: Prepared, min_similarity: float) -> Prior:
    """Bring an earlier mask to the network's grid of a later scan, by a rigid alignment of the two scans.

    Args:
        min_similarity: below it the alignment is not believed, and there is no prior.
    """
    try:
        found = align(earlier.job.read().channels[0], scan.channels[0])
    except UserError as error:  # the earlier scan is gone or damaged since it was segmented
        finding = Finding("prior_unreadable", "warning", f"Segmented without the earlier examination: {error}")
        return Prior(None, earlier.facts(), (finding,))
    facts = {**earlier.facts(), "similarity": round(found.similarity, 4)}
    if found.similarity < min_similarity:
        message = (
            f"Segmented without the earlier examination {earlier.job.case_id}: aligned, the two have a correlation of "
            f"{found.similarity:.2f} only ({min_similarity:g} is asked for)."
        )
        finding = Finding("prior_unaligned", "warning", message, round(found.similarity, 4), min_similarity)
        return Prior(None, facts, (finding,))
    shape = prepared.image.shape[1:]
    return Prior(move_codes(read_image(earlier.mask), found.to_later, shape, prepared.affine), facts)
