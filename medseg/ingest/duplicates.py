"""Images that a cohort holds twice: the same pixels, or the same picture after rescaling or recompressing.

The exact hash is that of the values on the canonical grid, whatever the file and its header say. The perceptual hash
keeps the signs of the lowest cosine coefficients of a small copy (Zauner 2010, "pHash", here with 16 × 16 coefficients
for radiographs and 7 × 7 × 7 for volumes), so that size, contrast, brightness and compression hardly change it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import Case, Finding
from medseg.volume import Volume, sampled, to_canonical

MAX_DIFFERENT_SHARE = 0.10
"""Share of differing bits up to which two images count as near-duplicates; distinct patients lie above 0.15."""

_SIDE = {2: 64, 3: 28}
_KEPT = {2: 16, 3: 7}
_ROWS_AT_ONCE = 256
_SHOWN = 3


@dataclass(frozen=True)
class Fingerprint:
    """What tells an image again.

    Attributes:
        exact: SHA-256 over shape and values on the canonical grid.
        bits: the perceptual hash as hexadecimal digits; empty for images without contrast.
        percentiles: the value at each 5th percentile, 21 numbers.
    """

    exact: str
    bits: str
    percentiles: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"exact": self.exact, "bits": self.bits, "percentiles": list(self.percentiles)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Fingerprint":
        """From `to_json`."""
        return cls(data["exact"], data["bits"], tuple(data["percentiles"]))


def fingerprint(image: Volume) -> Fingerprint:
    """The fingerprint of a (i, j, k) volume or a (row, column) radiograph with finite values."""
    array = to_canonical(image).array if image.array.ndim == 3 else image.array
    percentiles = np.percentile(sampled(array, 200_000).astype(np.float64), range(0, 101, 5))
    return Fingerprint(_exact(array), _perceptual(array), tuple(float(f"{value:.6g}") for value in percentiles))


def find(cases: Sequence[Case], prints: Mapping[str, Fingerprint]) -> tuple[Case, ...]:
    """The cases, each with a finding `duplicate` or `near_duplicate` for what it shares with others.

    A duplicate within one patient is `info`; between patients, which may lie in different splits, it is a `warning`.

    Args:
        prints: fingerprint of the first channel by case id; cases without one are passed over.
    """
    known = [case for case in cases if case.case_id in prints]
    by_exact: dict[str, list[Case]] = defaultdict(list)
    for case in known:
        by_exact[prints[case.case_id].exact].append(case)
    twins = {case.case_id: [c for c in same if c is not case] for same in by_exact.values() for case in same}
    similar: dict[str, list[tuple[float, Case]]] = defaultdict(list)
    for one, other, share in _near(known, prints):
        if other not in twins[one.case_id]:
            similar[one.case_id].append((share, other))
            similar[other.case_id].append((share, one))
    found = []
    for case in cases:
        findings = list(case.findings)
        if same := twins.get(case.case_id):
            findings.append(_finding("duplicate", case, same, 0.0, 0.0))
        if near := sorted(similar[case.case_id], key=lambda pair: (pair[0], pair[1].case_id)):
            others = [other for _, other in near]
            findings.append(_finding("near_duplicate", case, others, round(near[0][0], 4), MAX_DIFFERENT_SHARE))
        found.append(replace(case, findings=tuple(findings)))
    return tuple(found)


def pairs(cases: Sequence[Case], prints: Mapping[str, Fingerprint]) -> Iterator[tuple[Case, Case, float]]:
    """Pairs of cases with the same pixels, and near-duplicates, with the share of hash bits that differ (0 for both).

    Cases without a fingerprint are passed over, and images without contrast have exact duplicates only.
    """
    known = [case for case in cases if case.case_id in prints]
    by_exact: dict[str, list[Case]] = defaultdict(list)
    for case in known:
        by_exact[prints[case.case_id].exact].append(case)
    for same in by_exact.values():
        yield from ((one, other, 0.0) for one, other in combinations(same, 2))
    for one, other, share in _near(known, prints):
        if prints[one.case_id].exact != prints[other.case_id].exact:
            yield one, other, share


def _finding(code: str, case: Case, others: Sequence[Case], number: float, threshold: float) -> Finding:
    foreign = [other for other in others if other.patient_id != case.patient_id]
    names = ", ".join(other.case_id for other in others[:_SHOWN]) + (" …" if len(others) > _SHOWN else "")
    what = "The same pixels as" if code == "duplicate" else f"Nearly the same picture ({1 - number:.0%} alike) as"
    where = " of another patient" if foreign else " of the same patient"
    if any(case.site and other.site and other.site != case.site for other in foreign):
        where = " of another patient and site"
    return Finding(code, "warning" if foreign else "info", f"{what} {names}{where}.", number, threshold)


def _near(cases: Sequence[Case], prints: Mapping[str, Fingerprint]) -> Iterator[tuple[Case, Case, float]]:
    """Pairs within the threshold with the share of bits that differ; every pair is compared, block by block."""
    groups: dict[int, list[Case]] = defaultdict(list)
    for case in cases:
        if bits := prints[case.case_id].bits:
            groups[len(bits)].append(case)
    for digits, members in groups.items():
        raw = b"".join(bytes.fromhex(prints[case.case_id].bits) for case in members)
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(len(members), -1)
        words = np.zeros((len(members), -(-rows.shape[1] // 8) * 8), dtype=np.uint8)
        words[:, : rows.shape[1]] = rows
        packed = words.view(np.uint64)
        limit = MAX_DIFFERENT_SHARE * digits * 4
        for start in range(0, len(members), _ROWS_AT_ONCE):
            block = packed[start : start + _ROWS_AT_ONCE]
            different = np.zeros((len(block), len(members) - start), dtype=np.uint16)
            for column in range(packed.shape[1]):
                different += np.bitwise_count(block[:, None, column] ^ packed[None, start:, column])
            for i, j in np.argwhere(different <= limit):
                if j > i:
                    yield members[start + i], members[start + j], float(different[i, j]) / (digits * 4)


def _exact(array: NDArray[Any]) -> str:
    """Slice by slice, so that no copy of the whole is made: volumes lie in memory so."""
    digest = hashlib.sha256(f"{array.shape}".encode())
    for plane in array.T if array.ndim == 3 else [array]:
        digest.update(np.ascontiguousarray(plane, dtype="<i4" if array.dtype.kind in "iub" else "<f4").data)
    return digest.hexdigest()


def _perceptual(array: NDArray[Any]) -> str:
    side, kept = _SIDE[array.ndim], _KEPT[array.ndim]
    small = _shrunk(array, side)
    if np.ptp(small) == 0:
        return ""
    low = small.astype(np.float64)
    for _ in range(array.ndim):  # each axis goes last to first, and so all return to their places
        low = np.tensordot(low, _cosines(side, kept), axes=(0, 1))
    low = low.reshape(-1)[1:]  # without the mean
    return np.packbits(low > 0).tobytes().hex()


def _shrunk(array: NDArray[Any], side: int) -> NDArray[np.float32]:
    """The means of `side` equal shares of each axis; of a volume one slice at a time, as they lie in memory."""
    if array.ndim == 2:
        rows, columns = (_means(length, side) for length in array.shape)
        return np.asarray(rows @ array.astype(np.float32) @ columns.T)
    slowest = int(np.argmax(np.abs(array.strides)))
    planes = np.stack([_shrunk(plane, side) for plane in np.moveaxis(array, slowest, 0)])
    return np.moveaxis(np.tensordot(_means(len(planes), side), planes, axes=1), 0, slowest)


def _cosines(length: int, count: int) -> NDArray[np.float64]:
    """(count, length): the first functions of the discrete cosine transform (DCT-II)."""
    return np.cos(np.pi * np.arange(count)[:, None] * (np.arange(length) + 0.5) / length)


@lru_cache(maxsize=8)
def _means(length: int, count: int) -> NDArray[np.float32]:
    """(count, length): each row averages its share of an axis, pixels on its edges in part."""
    edges = np.linspace(0, length, count + 1)
    at = np.arange(length)
    covered = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return np.asarray(np.clip(covered, 0, None) * (count / length), dtype=np.float32)
