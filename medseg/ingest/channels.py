"""Join the channels of one case that lie in files or series of their own, as `ingest.channels` tells them apart.

Files belong together when they lie in one folder and their names are alike but for what the pattern matched; series
when they are of one study. Nothing is resampled: channels that do not lie on one grid are refused when they are read.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from medseg.cohort import Reject
from medseg.ingest.dicom_headers import Header
from medseg.ingest.pseudonyms import pseudonym
from medseg.ingest.scan import Refused, Source

Part = TypeVar("Part")


def channel_of(text: str, patterns: Mapping[str, str]) -> tuple[str, str] | None:
    """The channel whose pattern matches `text`, and what is left of it without the match; None when none does.

    Of several, the longest match counts, so that `t1` and `t1ce` can stand side by side.

    Raises:
        Refused: two channels match equally long.
    """
    found = [(name, match) for name, regex in patterns.items() if (match := re.search(regex, text, re.IGNORECASE))]
    if not found:
        return None
    found.sort(key=lambda item: item[1].start() - item[1].end())
    (name, match), others = found[0], found[1:]
    if others and len(others[0][1][0]) == len(match[0]):
        raise Refused(
            "ambiguous_channel",
            f"It fits channels {name} and {others[0][0]} of ingest.channels alike; make one of the patterns narrower.",
        )
    return name, re.sub(r"[ ._-]{2,}", "_", text[: match.start()] + "_" + text[match.end() :]).strip(" ._-")


def in_order(parts: Mapping[str, Sequence[Part]], patterns: Mapping[str, str], what: str) -> tuple[Part, ...]:
    """The one part of each channel, in the order of `patterns`.

    Args:
        parts: what was found for each channel.
        what: what the parts are called in sentences: `file` or `series`.

    Raises:
        Refused: a channel has none, or several.
    """
    for name, pattern in patterns.items():
        if (count := len(parts.get(name, ()))) == 1:
            continue
        if count:
            reason = f"{count} of its {what} match channel {name} ({pattern!r}); make the pattern narrower."
            raise Refused("several_for_channel", reason)
        have = ", ".join(name for name in patterns if parts.get(name)) or "none"
        reason = f"Channel {name} is missing: no {what} of the case matches {pattern!r} (there is {have})."
        raise Refused("missing_channel", reason)
    return tuple(parts[name][0] for name in patterns)


def join_series(
    sources: Sequence[Source], heads: Mapping[str, Header], patterns: Mapping[str, str], key: bytes
) -> Iterator[Source | Reject]:
    """One source per study of the volumes whose Series Descriptions name its channels; radiographs stay alone.

    Args:
        sources: one per volume.
        heads: a header of each by its case id.
        patterns: `ingest.channels`.
        key: for the pseudonym of a study.
    """
    studies: dict[str, dict[str, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for source in sources:
        head = heads[source.case_id]
        if source.kind == "radiograph":
            yield source
            continue
        try:
            found = channel_of(head.description, patterns)
        except Refused as error:
            yield error.reject(source.name)
            continue
        if found is None:
            reason = "Its Series Description matches none of ingest.channels."
            yield Reject(source.name, "no_channel", reason)
        else:
            studies[head.study_uid or head.series_uid][found[0]].append(source)
    for uid, parts in sorted(studies.items()):
        case_id = pseudonym(key, "case", uid) or "case-without-uid"
        count = sum(map(len, parts.values()))
        name = f"{case_id} ({count} series)"
        try:
            members = in_order(parts, patterns, "series")
            _check_frames([heads[member.case_id] for member in members], list(patterns))
        except Refused as error:
            yield error.reject(name)
            continue
        yield _joined(case_id, name, members)


def _joined(case_id: str, name: str, members: Sequence[Source]) -> Source:
    """One source with a part per channel; patient, site and modality are those of the first."""
    files = tuple(dict.fromkeys(path for member in members for path in member.files))
    names = dict.fromkeys(name for member in members for name in member.match_names)
    return replace(members[0], case_id=case_id, name=name, files=files, match_names=tuple(names), parts=tuple(members))


def _check_frames(heads: Sequence[Header], names: Sequence[str]) -> None:
    """Positions can be compared within one patient and one frame of reference only."""
    if len({head.patient for head in heads}) > 1:
        raise Refused("several_patients", "The series of one study name several patients; separate the files.")
    for head, name in zip(heads, names, strict=True):
        if head.frame_uid and heads[0].frame_uid and head.frame_uid != heads[0].frame_uid:
            raise Refused(
                "channel_frame",
                f"Channels {names[0]} and {name} lie in different frames of reference (the patient was moved between "
                "them); register them first.",
            )
