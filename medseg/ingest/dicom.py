"""Group DICOM files into series, split these into volumes, and pick; radiographs stand alone."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from medseg.cohort import Reject
from medseg.config import IngestConfig
from medseg.files import sha256_file
from medseg.ingest.channels import join_series
from medseg.ingest.dicom_geometry import tilt_of
from medseg.ingest.dicom_headers import UNKNOWN_MOSAIC, Header
from medseg.ingest.dicom_volumes import Stack, split_series
from medseg.ingest.pseudonyms import pseudonym
from medseg.ingest.scan import Refused, Source
from medseg.volume import Affine

RADIOGRAPH_MODALITIES = ("CR", "DX", "RG")
_NO_SCANS = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO", "REG", "DOC", "FID")
_PLANES = ("sagittal", "coronal", "axial")  # by the world axis that the normal is closest to


def group(
    headers: Iterable[Header], config: IngestConfig, key: bytes
) -> tuple[list[Source], list[Reject], dict[str, Path]]:
    """One Source per volume of each series, or per radiograph, and a Reject with its reason for every other one.

    Also returns the folder of each by its case id, which rejects carry in their name; this identifies patients.
    """
    series: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        single = header.modality in RADIOGRAPH_MODALITIES
        series[header.sop_uid if single else header.series_uid].append(header)
    sources: list[Source] = []
    rejects: list[Reject] = []
    places: dict[str, Path] = {}
    heads: dict[str, Header] = {}
    for uid, members in sorted(series.items()):
        case_id = pseudonym(key, "case", uid) or "case-without-uid"
        count = len({member.path for member in members})
        files = "1 file" if count == 1 else f"{count} files"
        name = f"{case_id} ({files}, {members[0].modality or 'no modality'})"
        places[case_id] = members[0].path.parent
        try:
            for made in _series(case_id, name, members, config, key):
                if isinstance(made, Reject):
                    rejects.append(made)
                else:
                    sources.append(made)
                    places[made.case_id] = made.files[0].parent
                    heads[made.case_id] = members[0]
        except Refused as error:
            rejects.append(error.reject(name))
    if not config.channels:
        return sources, rejects, places
    joined: list[Source] = []
    for made in join_series(sources, heads, config.channels, key):
        if isinstance(made, Reject):
            rejects.append(made)
        else:
            joined.append(made)
    return joined, rejects, places


def _series(
    case_id: str, name: str, members: list[Header], config: IngestConfig, key: bytes
) -> Iterator[Source | Reject]:
    """The volumes of one series or the radiograph; those refused as Rejects. Raises Refused about the whole."""
    members = _without_copies(members)
    _check_kind(members, config)
    if members[0].modality in RADIOGRAPH_MODALITIES:
        if len(members) > 1:
            raise Refused("duplicate", f"{len(members)} different files carry one SOP Instance UID; keep one.")
        yield _source(case_id, name, members, config, key)
        return
    scouts = [member for member in members if "LOCALIZER" in member.image_type]
    rest = [member for member in members if "LOCALIZER" not in member.image_type]
    if scouts:
        refused = Refused(
            "localiser", f"{len(scouts)} of {len(members)} images are localisers; they are no volume to work on."
        )
        if not rest:
            raise refused
        yield refused.reject(name)
    stacks = split_series(rest, config.min_slices)
    for number, stack in enumerate(stacks, 1):
        several = len(stacks) > 1
        traits = f"; split by {' and '.join(stack.traits)}" if stack.traits else ""
        part_name = f"{name} volume {number} of {len(stacks)}{traits}" if several else name
        part_id = f"{case_id}-{number}" if several else case_id
        try:
            affine = _picked(stack, number, config)
            yield _source(part_id, part_name, list(stack.members), config, key, affine)
        except Refused as error:
            yield error.reject(part_name)


def _picked(stack: Stack, number: int, config: IngestConfig) -> Affine:
    """The affine of a volume that the rules of `ingest` pick. Raises Refused with the rule that did not."""
    if stack.refused is not None:
        raise stack.refused
    assert stack.affine is not None
    if number > 1 and config.volumes == "first":
        raise Refused("not_first", f"It is volume {number} of its series, and ingest.volumes is 'first'.")
    normal = np.cross(stack.affine[:3, 0], stack.affine[:3, 1])
    plane = _PLANES[int(np.argmax(np.abs(normal)))]
    if config.plane and plane not in config.plane:
        raise Refused("plane", f"Its slices are {plane}, which is not in ingest.plane ({', '.join(config.plane)}).")
    tilt_deg = tilt_of(stack.affine, len(stack.members))
    if tilt_deg and config.tilt == "refuse":
        raise Refused(
            "gantry_tilt",
            f"Slices are tilted by {tilt_deg:.2f} degrees against their axis, and ingest.tilt is 'refuse'.",
        )
    return stack.affine


def _source(
    case_id: str, name: str, members: list[Header], config: IngestConfig, key: bytes, affine: Affine | None = None
) -> Source:
    first = members[0]
    radiograph = affine is None
    files = tuple(dict.fromkeys(member.path for member in members))
    at = {path: number for number, path in enumerate(files)}
    folders = [p.name for p in first.path.parents if p == first.root or first.root in p.parents]
    return Source(
        case_id=case_id,
        kind="radiograph" if radiograph else "volume",
        source_kind="dicom",
        files=files,
        name=name,
        patient_id=pseudonym(key, "patient", first.patient) if key else "",
        site=pseudonym(key, "site", first.institution) if key else "",
        modality=first.modality,
        match_names=tuple(filter(None, (*(first.path.stem,) * radiograph, *folders, first.patient))),
        affine=affine,
        windowed=radiograph and config.radiograph_window == "voi",
        slices=() if radiograph else tuple((at[member.path], member.frame) for member in members),
        plain=() if radiograph else tuple({member.path: member.plain for member in members}.values()),
        study_date=first.study_date,
    )


def _without_copies(members: list[Header]) -> list[Header]:
    """Drop byte-identical copies of an instance; which of them stays follows from the sorted paths."""
    if len({(member.sop_uid, member.frame) for member in members}) == len(members):
        return members
    digests = {path: sha256_file(path) for path in {member.path for member in members}}
    by_content = {(m.sop_uid, m.frame, digests[m.path]): m for m in reversed(members)}
    return list(reversed(by_content.values()))


def _check_kind(members: list[Header], config: IngestConfig) -> None:
    first = members[0]
    if first.modality in _NO_SCANS or not all(member.has_pixels for member in members):
        raise Refused("no_scan", f"The series holds no scan (modality {first.modality or 'unknown'}).")
    if config.modality and first.modality not in config.modality:
        wanted = ", ".join(config.modality)
        raise Refused("modality", f"Modality {first.modality or 'unknown'} is not in ingest.modality ({wanted}).")
    if patients := len({member.patient for member in members}) - 1:
        raise Refused("several_patients", f"One series names {patients + 1} patients; separate the files.")
    if config.description and not re.search(config.description, first.description, re.IGNORECASE):
        raise Refused("description", "Its Series Description does not match ingest.description.")
    if frames := max((member.frames for member in members if not member.planar), default=0):
        raise Refused("multi_frame", f"A file holds {frames} frames and does not say where they lie; export slices.")
    if reason := next((member.mosaic for member in members if member.mosaic), ""):
        raise Refused("mosaic", reason)
    if any({"MOSAIC", "VFRAME"} & set(member.image_type) for member in members):
        raise Refused("mosaic", UNKNOWN_MOSAIC)
    if (samples := max(member.samples for member in members)) > 1:
        raise Refused("colour", f"The images have {samples} values per pixel; grey images are needed.")
