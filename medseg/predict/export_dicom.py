"""The DICOM objects of one case, beside its other results; an object that cannot be written becomes a flag instead."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg.bundle import Bundle
from medseg.cohort import Finding
from medseg.files import UserError
from medseg.ingest.dicom_derived import read_source_headers, why_not
from medseg.ingest.scan import Refused
from medseg.predict.export_seg import write_seg
from medseg.predict.export_sr import write_sr
from medseg.predict.export_verdict import write_verdict_sr
from medseg.volume import Volume

SEGMENTATION, REPORT = "mask.dcm", "report.dcm"


def write_segmentation(
    folder: Path,
    files: Sequence[Path],
    mask: Volume,
    volumes_ml: Mapping[str, float],
    bundle: Bundle,
    flags: list[Finding],
    *,
    seed_uid: str,
) -> list[Path]:
    """Write a mask as DICOM SEG and its volumes as SR.

    Args:
        files: the series that was segmented.
        flags: gets `no_dicom_seg` or `no_dicom_sr`.
        seed_uid: what the UIDs follow from.

    Returns:
        What was written.
    """
    written: list[Path] = []
    with _or_flag("SEG", flags):
        sources = read_source_headers(files)
        made = write_seg(folder / SEGMENTATION, mask, sources, bundle, seed_uid=seed_uid)
        written.append(folder / SEGMENTATION)
        with _or_flag("SR", flags):
            written.append(write_sr(folder / REPORT, made, sources, volumes_ml, bundle, seed_uid=seed_uid))
    return written


def write_verdict_report(
    folder: Path,
    radiograph: Path,
    verdict: Mapping[str, Any],
    bundle: Bundle,
    reasons: Sequence[str],
    flags: list[Finding],
    *,
    seed_uid: str,
) -> list[Path]:
    """Write the verdict on a radiograph as SR.

    Args:
        verdict: as `Verdict.as_result` gives it.
        reasons: codes of the findings for which it is not assessable.
        flags: told in the report; gets `no_dicom_sr`.
        seed_uid: what the UIDs follow from.

    Returns:
        What was written.
    """
    written: list[Path] = []
    others = [flag.code for flag in flags if flag.code not in reasons]
    with _or_flag("SR", flags):
        sources = read_source_headers([radiograph])
        told = {"reasons": reasons, "flags": others}
        written.append(write_verdict_sr(folder / REPORT, sources, verdict, bundle, **told, seed_uid=seed_uid))
    return written


@contextmanager
def _or_flag(kind: str, flags: list[Finding]) -> Iterator[None]:
    """Turn what the source's headers forbid into a flag; raise what concerns the disk."""
    try:
        yield
        return
    except Refused as error:  # the source changed after it was read
        reason = error.reason
    except UserError:
        raise
    except Exception as error:  # headers that no object may refer to; the other results are good
        reason = why_not(error)
    flags.append(Finding(f"no_dicom_{kind.lower()}", "warning", f"No DICOM {kind} was written ({reason})."))
