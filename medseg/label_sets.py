"""Labels that are not exclusive: how the labels of one case stand in one cell, and which of them are called.

The cell names the labels that are present, joined by `|` in the order of their values, such as `effusion|nodule`; a
case that is known to have none of them is `none`. An empty cell means that nothing is known.
"""

from collections.abc import Iterable, Mapping

SEPARATOR = "|"
EMPTY = "none"
THRESHOLD = 0.5
"""A label is called when its probability reaches this."""


def read_set(cell: str) -> tuple[str, ...]:
    """The labels that a cell names, in its own order; of `none` none. What is no label is not noticed here."""
    return () if cell == EMPTY else tuple(part.strip() for part in cell.split(SEPARATOR))


def write_set(present: Iterable[str], labels: Mapping[str, int]) -> str:
    """The cell that names these labels, each once, in the order of their values; unknown ones come last."""
    ordered = sorted(set(present), key=lambda name: (labels.get(name, len(labels)), name))
    return SEPARATOR.join(ordered) or EMPTY


def call_labels(probs: Mapping[str, float]) -> tuple[str, ...]:
    """The labels whose probability reaches `THRESHOLD`, in the order of `probs`."""
    return tuple(name for name, p in probs.items() if p >= THRESHOLD)
