"""Find the pixels of a predicted case again: in the cohort, or among the sources that were handed to `predict`."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medseg.cohort import Cohort
from medseg.config import IngestConfig
from medseg.files import UserError
from medseg.images import read_image
from medseg.ingest.scan import Refused, Source
from medseg.ingest.sources import discover, hash_source, read_source
from medseg.volume import Volume


@dataclass(frozen=True)
class Found:
    """The scan of a case.

    Attributes:
        channels: on the scan's own grid.
        radiograph: the DICOM file, when it is a radiograph that came as DICOM.
    """

    channels: tuple[Volume, ...]
    radiograph: Path | None = None


class Scans:
    """Scans by case, read when asked for. Archives stay unpacked for as long as this object lives.

    Args:
        given: the cohort, or the paths from which the predictions were made.
        config: how those were read; `radiograph_window` counts.
    """

    def __init__(self, given: Cohort | Sequence[Path], config: IngestConfig | None = None) -> None:
        window = config.radiograph_window if config else "none"
        self._config = IngestConfig(min_slices=1, radiograph_window=window)
        self._cohort = given if isinstance(given, Cohort) else None
        self._paths = () if isinstance(given, Cohort) else tuple(given)

    def channels(self, case_id: str, result: Mapping[str, Any]) -> tuple[Volume, ...]:
        """The channels of one case, on the scan's own grid; see `find`."""
        return self.find(case_id, result).channels

    def find(self, case_id: str, result: Mapping[str, Any]) -> Found:
        """Read the scan of one case.

        Args:
            result: the case's `result.json`; its `input_sha256` tells a source again whose pseudonym differs.

        Raises:
            UserError: the scan is gone, has changed, or cannot be read.
        """
        if self._cohort is not None:
            for case in self._cohort.cases:
                if case.case_id == case_id:
                    return Found(tuple(read_image(path) for path in self._cohort.image_paths(case)))
            raise UserError(
                f"case {case_id!r} is not in {self._cohort.folder / 'cohort.csv'}; predict this cohort again."
            )
        digest = str(result.get("input_sha256"))
        source = self._by_id.get(case_id) or self._by_digest.get(digest)
        if source is None:
            raise UserError(f"case {case_id!r} was not found again among the scans given; give the same ones.")
        try:
            scan = read_source(source)
        except Refused as error:
            raise UserError(f"case {case_id!r} cannot be read: {error.reason}") from error
        if scan.source_sha256 != digest:
            raise UserError(f"the scan of case {case_id!r} has changed since it was predicted; predict it again.")
        from_dicom = (scan.kind, scan.source_kind) == ("radiograph", "dicom") and scan.source_files
        return Found(scan.channels, scan.source_files[0] if from_dicom else None)

    @cached_property
    def _by_id(self) -> dict[str, Source]:
        unpack_dir = Path(tempfile.mkdtemp(prefix="medseg-"))
        weakref.finalize(self, shutil.rmtree, unpack_dir, ignore_errors=True)
        sources, _ = discover(self._paths, self._config, unpack_dir=unpack_dir)
        return {source.case_id: source for source in sources}

    @cached_property
    def _by_digest(self) -> dict[str, Source]:
        return {hash_source(source): source for source in self._by_id.values()}
