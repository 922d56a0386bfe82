"""What a person sees of a result: few lines, figures aligned, a path on a line of its own and never cut.

Nothing here asks for the width of the terminal: a path that a terminal wraps by itself can still be copied whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from medseg.files import plain, read_json
from medseg.result import Result

_UNITS = {"mm": "mm", "ml": "ml", "gb": "GB", "mb": "MB", "px": "px", "seconds": "s", "minutes": "min"}
_NOT_SHOWN = {"sha256"}
_ONLY_IF_ANY = {"resumed", "rejects", "rejected", "failed", "flagged", "done", "working_set_gb"}
_FOR_MACHINES = {"cases_json", "summary"}
_PER_LABEL = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95 (mm)",
    "surface_dice": "surface Dice",
    "volume_error_ml": "volume error (ml)",
}


def as_tree(result: Result) -> dict[str, Any]:
    """The result for machines: `status`, absolute paths, figures; what is empty is left out."""
    tree = plain(_absolute(result))
    return {name: value for name, value in tree.items() if value or name in ("step", "status", "paths", "figures")}


def as_text(result: Result, then: str = "") -> str:
    """The result for people.

    Args:
        then: the command to run next; `RUN` in it stands for the result's run.
    """
    result = _absolute(result)
    blocks = [result.text.rstrip()] if result.text else []
    if result.rows:
        blocks.append(_table([list(result.rows[0]), *[row.values() for row in result.rows]]))
    if not blocks:
        blocks.append(_headline(result))
        by_label = _by_label(result)
        blocks += [by_label] if by_label else []
        blocks.append(_aligned(_figures(result, set() if not by_label else _label_figures(result)) | _paths(result)))
    elif result.paths:
        blocks.append(_aligned(_paths(result)))
    if then:
        blocks.append(f"next: {then.replace('RUN', result.run_id) if result.run_id else then}")
    return "\n\n".join(filter(None, blocks))


def _headline(result: Result) -> str:
    run = f" (run {result.run_id})" if result.run_id else ""
    told = "done" if result.status == "done" else "finished, but not every case; the table below says which and why"
    return f"{result.step}{run}: {told}"


def _by_label(result: Result) -> str:
    """Segmentation figures as one line a label, with the interval of the Dice."""
    if result.step != "evaluate" or "mean_dice" not in result.figures:
        return ""
    first, *others = _PER_LABEL
    lines: list[Sequence[object]] = [["label", "Dice", "95% interval", *[_PER_LABEL[name] for name in others]]]
    for label, found in read_json(result.paths["metrics"])["classes"].items():
        dice = found[first]
        interval = "" if dice["ci_low"] is None else f"{_cell(dice['ci_low'])} to {_cell(dice['ci_high'])}"
        lines.append([label, dice["mean"], interval, *[found[name]["mean"] for name in others]])
    return _table(lines)


def _label_figures(result: Result) -> set[str]:
    return {name for name in result.figures if any(name.startswith(f"{figure}_") for figure in _PER_LABEL)}


def _figures(result: Result, skip: set[str]) -> dict[str, str]:
    """Everything but hashes, empty values and counts of troubles that did not occur."""
    return {
        _name(name): _cell(value)
        for name, value in result.figures.items()
        if name not in skip | _NOT_SHOWN and value not in ({}, [], "") and (value or name not in _ONLY_IF_ANY)
    }


def _paths(result: Result) -> dict[str, str]:
    """Where things are, but for files that only machines read, and tables that are empty."""
    hidden = _FOR_MACHINES | (set() if result.figures.get("rejects", True) else {"rejects"})
    names = {name: "reject list" if name in result.figures else _name(name) for name in result.paths}
    return {names[name]: str(path) for name, path in result.paths.items() if name not in hidden}


def _aligned(pairs: Mapping[str, str]) -> str:
    width = max(map(len, pairs), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs.items())


def _table(lines: Sequence[Any]) -> str:
    cells = [[_cell(value) for value in line] for line in lines]
    cells[0] = [name.replace("_", " ") for name in cells[0]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _name(name: str) -> str:
    words = name.split("_")
    if len(words) > 1 and words[-1] in _UNITS:
        return f"{' '.join(words[:-1])} ({_UNITS[words[-1]]})"
    return " ".join(words)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " × ".join(_cell(item) for item in value)
    return "" if value is None else str(value)


def _absolute(result: Result) -> Result:
    return replace(result, paths={name: path.absolute() for name, path in result.paths.items()})
