"""Public data sets: what is known of each, how it is fetched, and how it becomes a cohort.

One YAML file per set in data_manifests/ holds terms, files, hashes, label names and layout; never pixels. A hash
stands there only if somebody published it, with its source.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medseg.files import UserError, resource_dir
from medseg.ingest.download import Expected

Text = Annotated[str, Field(min_length=1)]
Address = Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Citation(_Strict):
    """A publication that users of the data are asked to cite."""

    text: Text
    doi: str | None = Field(default=None, pattern=r"^10\.\d{4,9}/\S+$")


class Terms(_Strict):
    """Licence or terms of use, and what they oblige to, in plain words."""

    name: Text
    url: Address | None = None
    obliges: tuple[Text, ...] = Field(min_length=1)


class Registration(_Strict):
    """An account or a form stands before the file; a person has to take these steps."""

    url: Address
    steps: tuple[Text, ...] = Field(min_length=1)


class RemoteFile(_Strict):
    """One file to fetch.

    Attributes:
        name: under which it is kept in `archives/`.
        urls: addresses of the same file, in order of preference; empty when it has to be fetched by a person.
        size_bytes, md5, sha256: as published, else null. `source` says where they are published.
        unpack_to: folder beside `archives/` into which it is unpacked; null if it is no archive.
        max_unpacked_bytes, max_unpacked_files: more than that is refused.
        optional: the set can be used without it.
        terms: where they differ from the terms of the set.
        registration: null when anybody may fetch it.
    """

    name: FileName
    urls: tuple[Address, ...] = ()
    size_bytes: Count | None = None
    md5: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    source: Text | None = None
    unpack_to: FileName | None = None
    max_unpacked_bytes: Count = 20_000_000_000
    max_unpacked_files: Count = 100_000
    optional: bool = False
    terms: Terms | None = None
    registration: Registration | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "RemoteFile":
        if bool(self.urls) == bool(self.registration):
            raise ValueError("give either urls, or registration with the steps to take")
        published = (self.size_bytes, self.md5, self.sha256)
        if any(value is not None for value in published) and self.source is None:
            raise ValueError("size_bytes, md5 and sha256 need source: where they are published")
        return self

    @property
    def expected(self) -> Expected:
        return Expected(self.size_bytes, self.md5, self.sha256)


class Orphan(_Strict):
    """A published file without its partner; ingest rejects it by name."""

    file: Text
    lacks: Text


class Layout(_Strict):
    """How the unpacked files are cases.

    Attributes:
        images: glob, relative to the folder of the set, of one image per case.
        file_name: regular expression of an image's file name, or of its path from the folder of the set when it holds
            a `/`; its named groups become columns. `case_id` and `patient_id` are required; the group named as
            `target` is the class.
        target: the group that holds the class; null for segmentation. target_names: its texts with the names in
            `labels`; empty where they are the values there.
        labels: path of a case's label map, or of its folder of masks, with `{case_id}`; null for classification, and
            where the publisher has none.
        masks: other masks by name, as paths with `{case_id}`; a case may lack one.
        mask_threshold: a mask is where its grey value is above this.
        site: where all cases were acquired; empty when mixed or unknown.
        case_table: whether `fetch` writes `cases.csv` (image, masks, groups, site) for `medseg ingest --labels`.
        cases: number of images that the publisher names; null when unknown. class_cases: the same by class.
        orphans: files known to lack their partner.
    """

    images: Text
    file_name: Text
    target: str | None = None
    target_names: Mapping[str, Text] = {}
    labels: str | None = Field(default=None, pattern=r"\{case_id\}")
    masks: Mapping[str, Annotated[str, Field(pattern=r"\{case_id\}")]] = {}
    mask_threshold: int | None = None
    site: str = ""
    case_table: bool = False
    cases: Count | None = None
    class_cases: Mapping[str, Count] = {}
    orphans: tuple[Orphan, ...] = ()

    @field_validator("file_name")
    @classmethod
    def _check_expression(cls, text: str) -> str:
        try:
            groups = set(re.compile(text).groupindex)
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from error
        if missing := {"case_id", "patient_id"} - groups:
            raise ValueError(f"lacks the named group {sorted(missing)[0]!r}")
        return text

    @model_validator(mode="after")
    def _check_together(self) -> "Layout":
        if self.target is not None and self.target not in re.compile(self.file_name).groupindex:
            raise ValueError(f"target {self.target!r} is no named group of file_name")
        if self.target is not None and self.labels is not None:
            raise ValueError("give labels for segmentation, or target for classification")
        return self

    def match(self, image: Path, folder: Path) -> re.Match[str] | None:
        """What the name of an image below `folder` tells; None when it is not one of the cases."""
        text = image.relative_to(folder).as_posix() if "/" in self.file_name else image.name
        return re.match(self.file_name, text)


class IngestCommand(_Strict):
    """The next step; `{folder}` in `command` is the folder of the set. A null `config`: there is nothing to learn."""

    command: Annotated[str, Field(pattern=r"^medseg ingest .*\{folder\}")]
    config: FileName | None = None
    notes: tuple[Text, ...] = ()


class Manifest(_Strict):
    """All that is known of one public data set. `labels` maps names to values, as in a config's task."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    title: Text
    description: Text
    kind: Literal["segmentation", "classification"]
    modality: Literal["MR", "CT", "DX", "CR"]
    publisher: Text
    homepage: Address
    citations: tuple[Citation, ...] = Field(min_length=1)
    terms: Terms
    files: tuple[RemoteFile, ...] = Field(min_length=1)
    labels: Mapping[Text, Annotated[int, Field(ge=0)]] = {}
    layout: Layout
    ingest: IngestCommand
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _check_together(self) -> "Manifest":
        if self.layout.class_cases and set(self.layout.class_cases) != set(self.labels):
            raise ValueError("layout.class_cases must name the classes of labels")
        if bool(self.labels) != bool(self.layout.labels or self.layout.target):
            raise ValueError("give labels together with layout.labels or layout.target, or none of them")
        if self.layout.target_names and set(self.layout.target_names.values()) != set(self.labels):
            raise ValueError("layout.target_names must name the classes of labels")
        if self.labels and self.ingest.config is None:
            raise ValueError("give ingest.config: the labels are learnt by one")
        return self

    @property
    def needs_registration(self) -> bool:
        """Whether a person must register before the set can be used at all."""
        return any(file.registration is not None and not file.optional for file in self.files)

    @property
    def size_bytes(self) -> int | None:
        """Sum of the files fetched without registration; None when one of them has no published size."""
        sizes = [file.size_bytes for file in self.files if file.registration is None]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def load_manifests(directory: Path | None = None) -> dict[str, Manifest]:
    """Read every `*.yaml` of `directory` (default: the manifests that come with medseg), by name.

    Raises:
        UserError: a file is not YAML, a field is unknown, missing or wrong, or a name is not its file's name.
    """
    folder = directory or resource_dir("data_manifests")
    manifests = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            manifest = Manifest.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, p['loc'])) or 'file'}: {p['msg']}" for p in error.errors())
            raise UserError(f"{path}: {'; '.join(problems)}; correct the manifest.") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read as YAML ({why}); correct the manifest.") from error
        if manifest.name != path.stem:
            raise UserError(f"{path}: name is {manifest.name!r}; a manifest is named like its file.")
        manifests[manifest.name] = manifest
    return manifests


def find_manifest(name: str, directory: Path | None = None) -> Manifest:
    """The manifest of that name. Raises UserError listing the names there are."""
    manifests = load_manifests(directory)
    if name not in manifests:
        raise UserError(f"dataset {name!r} is unknown; `medseg data list` knows {', '.join(manifests)}.")
    return manifests[name]


def list_manifests(manifests: Mapping[str, Manifest]) -> list[dict[str, object]]:
    """One row per data set, for a table or JSON."""
    return [
        {
            "name": m.name,
            "title": m.title,
            "kind": m.kind,
            "modality": m.modality,
            "cases": m.layout.cases or "",
            "size_bytes": m.size_bytes,
            "terms": m.terms.name,
            "registration": m.needs_registration,
            "config": m.ingest.config or "",
        }
        for m in manifests.values()
    ]


def show(manifest: Manifest, folder: Path | None = None) -> str:
    """The manifest as text for a person; `folder` is where the set lies or will lie."""
    m = manifest
    lines = [m.title, "=" * len(m.title), "", m.description.strip(), "", f"Home      {m.homepage}"]
    lines += [
        f"Publisher {m.publisher}",
        f"Cases     {m.layout.cases or 'number not stated'}, {m.modality}, {m.kind}",
    ]
    named = ", ".join(f"{value} {name}" for name, value in m.labels.items())
    lines.append(f"Labels    {named or 'none published'}")
    lines += ["", f"Terms: {m.terms.name}" + (f" ({m.terms.url})" if m.terms.url else "")]
    lines += [f"  - {duty}" for duty in m.terms.obliges]
    lines += ["", "Cite:", *(f"  - {c.text}" + (f" doi:{c.doi}" if c.doi else "") for c in m.citations)]
    lines += ["", "Files:"]
    for file in m.files:
        size = f"{file.size_bytes / 1e6:.0f} MB" if file.size_bytes else "size not published"
        proof = "sha256" if file.sha256 else "md5" if file.md5 else "no published hash"
        lines.append(f"  - {file.name}: {size}, {proof}{', optional' if file.optional else ''}")
        lines += [f"      {url}" for url in file.urls]
        if file.terms:
            lines += [f"      terms: {file.terms.name}", *(f"        - {duty}" for duty in file.terms.obliges)]
        if file.registration:
            lines += [f"      by hand, {file.registration.url}"]
            lines += [f"        {i}. {step}" for i, step in enumerate(file.registration.steps, 1)]
    for heading, notes in (
        ("Notes:", m.notes),
        ("Known orphans:", [f"{o.file} lacks {o.lacks}" for o in m.layout.orphans]),
    ):
        lines += ["", heading, *(f"  - {note}" for note in notes)] if notes else []
    lines += ["", "Next:", f"  medseg data fetch {m.name}", f"  {next_command(m, folder)}"]
    lines += [f"  ({note})" for note in m.ingest.notes]
    return "\n".join(lines)


def next_command(manifest: Manifest, folder: Path | None = None) -> str:
    """The `medseg ingest` command for the set in `folder` (default: where `medseg data fetch` puts it)."""
    import shlex

    place = shlex.quote(str(folder or Path("workspace") / "data" / manifest.name))
    return manifest.ingest.command.replace("{folder}", place)
