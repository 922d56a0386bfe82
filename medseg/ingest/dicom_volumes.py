"""Split what one DICOM series holds into its volumes: orientations, echoes, b-values, time points, image types.

A trait separates volumes when it differs among images that lie at one place. Where images at one place differ in
nothing but their instance number, and each place holds equally many, their order is the order of the volumes.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from medseg.ingest.dicom_frames import TRAITS
from medseg.ingest.dicom_geometry import ORIENTATION_TOLERANCE, POSITION_TOLERANCE_MM, order_slices
from medseg.ingest.dicom_headers import Header
from medseg.ingest.scan import Refused
from medseg.volume import Affine


@dataclass(frozen=True)
class Stack:
    """One volume of a series: its images in order along k, their affine (RAS+ mm), what set it apart, or why not."""

    members: tuple[Header, ...]
    affine: Affine | None
    traits: tuple[str, ...]
    refused: Refused | None = None


def split_series(members: Sequence[Header], min_slices: int) -> list[Stack]:
    """All volumes of one series of images of one patient.

    Several orientations or image sizes make volumes of their own only when each of them is one; a mixture of single
    images is refused as a whole.

    Raises:
        Refused: no geometry, a localiser, or a mixture of orientations or sizes that is no set of volumes.
    """
    planes = _by_plane(members)
    if _three_views(planes):
        raise Refused(
            "localiser",
            f"{len(members)} slices lie in {len(planes)} orientations at right angles to each other, as a localiser's "
            "do; they are no single volume.",
        )
    stacks = [stack for part in planes for stack in _stacks(part, min_slices)]
    if len(planes) > 1:
        failed = next((stack.refused for stack in stacks if stack.refused is not None), None)
        if failed is not None:
            raise _mixture(planes)
        stacks = [Stack(s.members, s.affine, ("orientation or size", *s.traits), s.refused) for s in stacks]
    return stacks


def _stacks(members: list[Header], min_slices: int) -> list[Stack]:
    stacks = []
    for part, traits in _split(members, list(enumerate(TRAITS))):
        try:
            if len(part) < (wanted := max(min_slices, 2)):  # one slice has no spacing
                raise Refused("few_slices", f"It has {len(part)} of the {wanted} slices ingest.min_slices asks for.")
            ordered, affine = order_slices(part)
            stacks.append(Stack(tuple(ordered), affine, traits))
        except Refused as error:
            stacks.append(Stack(tuple(part), None, traits, error))
    return stacks


def _by_plane(members: Sequence[Header]) -> list[list[Header]]:
    """Images of one orientation and size together. Those without a valid orientation stay with the first."""
    parts: list[tuple[tuple[int, int], NDArray[np.float64], list[Header]]] = []
    for member in members:
        size = (member.rows, member.columns)
        vector = np.array(member.orientation if len(member.orientation) == 6 else [np.nan] * 6)
        for known_size, known, part in parts:
            same = np.abs(vector - known).max() <= ORIENTATION_TOLERANCE
            if size == known_size and (same or not (np.isfinite(vector).all() and np.isfinite(known).all())):
                part.append(member)
                break
        else:
            parts.append((size, vector, [member]))
        if len(parts) > 100:  # radial scans and junk; quadratic time for nothing
            raise Refused("mixed_orientation", "The images lie in over 100 orientations; they are no volumes.")
    return [part for *_, part in parts]


def _three_views(planes: list[list[Header]]) -> bool:
    """Whether three of the orientations are mutually perpendicular, within about 10 degrees."""
    vectors = [np.array(p[0].orientation) for p in planes if len(p[0].orientation) == 6]
    normals = np.array([np.cross(v[:3], v[3:]) for v in vectors])
    if len(normals) < 3 or not np.isfinite(normals).all():
        return False
    return any(
        abs(np.linalg.det(normals[list(three)])) > 0.95 for three in combinations(range(min(len(normals), 12)), 3)
    )


def _mixture(planes: list[list[Header]]) -> Refused:
    count = sum(map(len, planes))
    orientations = {tuple(np.round(part[0].orientation, 2)) for part in planes}
    if len(orientations) == 1:
        sizes = Counter((h.rows, h.columns) for part in planes for h in part)
        listed = ", ".join(f"{n} of {r}×{c}" for (r, c), n in sizes.most_common())
        return Refused("mixed_size", f"Slices differ in rows and columns: {listed}.")
    return Refused(
        "mixed_orientation",
        f"{count} slices lie in {len(orientations)} different orientations; they are no single volume.",
    )


def _split(
    members: list[Header], traits: list[tuple[int, str]], found: tuple[str, ...] = ()
) -> list[tuple[list[Header], tuple[str, ...]]]:
    """Parts with at most one image at each place, as far as any trait tells the images there apart."""
    places = _places(members)
    counts = np.bincount(places)
    if counts.max() == 1:
        return [(members, found)]
    for at, (index, name) in enumerate(traits):
        values = [m.traits[index] if index < len(m.traits) else "" for m in members]
        if len(set(values)) <= counts.max() and len(set(zip(places, values, strict=True))) > len(counts):
            parts: dict[str, list[Header]] = defaultdict(list)
            for member, value in zip(members, values, strict=True):
                parts[value].append(member)
            rest = traits[at + 1 :]
            return [
                split for _, part in sorted(parts.items(), key=_order) for split in _split(part, rest, (*found, name))
            ]
    return _by_rank(members, places, counts, found)


def _order(item: tuple[str, list[Header]]) -> tuple[float, str]:
    try:
        return float(item[0]), ""
    except ValueError:
        return float("inf"), item[0]


def _by_rank(
    members: list[Header], places: NDArray[np.int64], counts: NDArray[np.int64], found: tuple[str, ...]
) -> list[tuple[list[Header], tuple[str, ...]]]:
    numbers = [(member.instance, member.frame) for member in members]
    distinct = len({(m.instance, m.frame) for m in members}) == len(members)
    if counts.min() != counts.max() or not distinct:
        return [(members, found)]  # order_slices says what is wrong
    ranks: dict[int, list[Header]] = defaultdict(list)
    seen: Counter[int] = Counter()
    for i in sorted(range(len(members)), key=lambda i: numbers[i]):
        ranks[seen[int(places[i])]].append(members[i])
        seen[int(places[i])] += 1
    return [(part, (*found, "order")) for part in ranks.values()]


def _places(members: Sequence[Header]) -> NDArray[np.int64]:
    """For each image the number of its place along the normal; all 0..n-1 apart where there is no geometry."""
    if any(len(m.position) != 3 or len(m.orientation) != 6 for m in members):
        return np.arange(len(members))
    row, column = np.array(members[0].orientation[:3]), np.array(members[0].orientation[3:])
    along = np.array([m.position for m in members]) @ np.cross(row, column)
    if not np.isfinite(along).all():
        return np.arange(len(members))
    order = np.argsort(along, kind="stable")
    places = np.empty(len(members), np.int64)
    places[order] = np.concatenate([[0], np.cumsum(np.diff(along[order]) >= POSITION_TOLERANCE_MM)])
    return places
