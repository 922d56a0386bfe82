"""NIfTI and picture files as cases: which belong together, and what each case is called."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg.cohort import Reject
from medseg.config import IngestConfig
from medseg.ingest.channels import channel_of, in_order
from medseg.ingest.scan import Refused, Source, safe_name, stem_of

NIFTI = (".nii", ".nii.gz")
PICTURE = (".png", ".jpg", ".jpeg")
_LABEL = "label map"  # no channel can be called so


@dataclass(frozen=True)
class File:
    """A file that may be an image.

    Attributes:
        root: the folder that was given.
        label_dir: the folder of the labels, where the layout of a data set says so.
        channel_suffix: `_0000`, `_0001` at the end of its name count channels.
        patient, exam: as the layout says; may identify.
        groups: what `ingest.image_path` reads from the path.
    """

    path: Path
    root: Path
    label_dir: Path | None = None
    channel_suffix: bool = False
    patient: str = ""
    exam: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)

    def label_path(self, config: IngestConfig) -> str:
        """Where the label lies, from the folder of the labels or of this file; empty where no setting says so."""
        return config.label_path.format_map(self.groups)


Cases = dict[tuple[Path, str], list[File]]  # by folder and stem


def name_of(file: File) -> str:
    """What messages call it."""
    return file.path.relative_to(file.root).as_posix()


def plain_sources(files: list[File], config: IngestConfig) -> Iterator[Source | Reject]:
    """A source per case, its files in the order of the channels; and what cannot become one, with the reason."""
    cases: Cases = {}
    labels: dict[tuple[Path, str], Path] = {}
    if config.channels:
        apart = [file for file in files if file.path.name.lower().endswith(NIFTI)]
        files = [file for file in files if not file.path.name.lower().endswith(NIFTI)]
        yield from _join(apart, config, cases, labels)
    for file in files:
        stem = stem_of(file.path)
        if file.channel_suffix and re.search(r"_\d{4}$", stem):
            stem = stem[:-5]
        case = file.groups.get("case")
        cases.setdefault((file.root, case) if case else (file.path.parent, stem), []).append(file)
    for case_id, ((folder, stem), members) in zip(_case_ids(cases), cases.items(), strict=True):
        source = _source(case_id, stem, members, labels.get((folder, stem)))
        source = replace(source, label_path=members[0].label_path(config))
        if source.kind == "volume":
            modality = config.modality[0] if len(config.modality) == 1 else ""
            source = replace(source, modality=modality, offset_hu=config.offset_hu, orientation=config.orientation)
        yield source


def _source(case_id: str, stem: str, members: list[File], label: Path | None) -> Source:
    first = members[0]
    picture = first.path.name.lower().endswith(PICTURE)
    bids = (stem.rsplit("_", 1)[0], first.patient) if first.patient else ()
    return Source(
        case_id=case_id,
        kind="radiograph" if picture else "volume",
        source_kind="png" if picture else "nifti",
        files=tuple(member.path for member in members),
        name=name_of(first),
        patient_id=first.patient or case_id,
        label_dir=first.label_dir,
        match_names=tuple(dict.fromkeys((stem, *bids))),
        label=label,
        exam=first.exam,
    )


def _join(
    files: list[File], config: IngestConfig, cases: Cases, labels: dict[tuple[Path, str], Path]
) -> Iterator[Reject]:
    """Fill `cases` with the files that `ingest.channels` joins, and `labels` with what lies beside them."""
    patterns = {**config.channels, **({_LABEL: config.label_name} if config.label_name else {})}
    found: dict[tuple[Path, str], dict[str, list[File]]] = {}
    for file in files:
        try:
            match = channel_of(stem_of(file.path), patterns)
        except Refused as error:
            yield error.reject(name_of(file))
            continue
        if match is None:
            yield Reject(name_of(file), "no_channel", "Its name matches none of ingest.channels.")
            continue
        case = file.groups.get("case")
        folder = file.root if case else file.path.parent
        parts = found.setdefault((folder, case or match[1] or folder.name), {})
        parts.setdefault(match[0], []).append(file)
    for (folder, stem), parts in found.items():
        files = [file for members in parts.values() for file in members]
        given = parts.pop(_LABEL, [])
        try:
            if len(given) > 1:
                raise Refused("several_labels", f"{len(given)} of its files match ingest.label_name; narrow it.")
            cases[folder, stem] = list(in_order(parts, config.channels, "file"))
        except Refused as error:
            place = Path(name_of(files[0])).parent
            yield error.reject((place if stem == place.name else place / stem).as_posix())
            continue
        if given:
            labels[folder, stem] = given[0].path


def _case_ids(cases: Cases) -> list[str]:
    """The stem where it is unique, else with the folders before it, else with a number."""
    short = [safe_name(stem) for _, stem in cases]
    long = [
        safe_name("-".join((*folder.relative_to(files[0].root).parts, stem))) for (folder, stem), files in cases.items()
    ]
    counts = Counter(name.lower() for name in short)
    ids = [a if counts[a.lower()] == 1 else b for a, b in zip(short, long, strict=True)]
    taken: set[str] = set()
    for at, name in enumerate(ids):
        number, unique = 1, name
        while unique.lower() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.lower())
        ids[at] = unique
    return ids
