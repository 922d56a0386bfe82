"""The part of a page about single cases: picture, flags, explanation and slice viewer of each."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg.files import UserError, write_bytes
from medseg.report.figures import draw_scene, embedded
from medseg.report.page import Picture, anchor, format_number, is_number, metric
from medseg.report.slices import Scene, load_scene
from medseg.report.sources import read_mapping, without_folders
from medseg.report.viewer import legend, slice_viewer


@dataclass(frozen=True)
class ViewerFrame:
    """An interactive slice viewer: a document for `srcdoc`, its size in CSS pixels, the colours of its overlay."""

    document: str
    width_px: int
    height_px: int
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CaseView:
    """What the page shows of one case; `problem` says why there are no pictures."""

    case_id: str
    anchor: str
    lead: str
    flags: tuple[str, ...] = ()
    explanation: str = ""
    pictures: tuple[Picture, ...] = ()
    viewer: ViewerFrame | None = None
    problem: str = ""


def draw_cases(
    cases: Sequence[Mapping[str, Any]], folder: Path, labels: Mapping[str, int], *, pictures: int, viewers: int
) -> list[CaseView]:
    """Draw the first measured cases of `cases.json` into `folder/overlays/<case_id>.png`, and view some.

    Overlays of an earlier report are removed. Cases that could not be measured have nothing to draw.
    """
    chosen = [case for case in cases if not case.get("reason")][:pictures]
    overlays = folder / "overlays"
    remove_stale(overlays, {str(case["case_id"]) for case in chosen})
    drawn = []
    for case in chosen:
        result = read_mapping(folder / "predictions" / str(case["case_id"]) / "result.json", missing={})
        view = draw_case(
            str(case["case_id"]),
            overlays / f"{case['case_id']}.png",
            images=[Path(path) for path in case.get("images") or ()],
            label=_path(case.get("label")),
            pred=_path(case.get("pred")),
            explanation=_path(case.get("explanation")),
            labels=labels,
            lead=_lead(case),
            not_annotated=case.get("not_annotated") or (),
            flags=result.get("flags") or (),
            with_viewer=viewers > 0,
        )
        viewers -= view.viewer is not None
        drawn.append(view)
    return drawn


def remove_stale(overlays: Path, case_ids: Collection[str]) -> None:
    """Remove the overlays of an earlier report that this one will not write again."""
    for old in overlays.glob("*.png"):
        if old.stem not in case_ids:
            old.unlink(missing_ok=True)


def draw_case(
    case_id: str,
    overlay: Path,
    *,
    images: Sequence[Path],
    label: Path | None,
    pred: Path | None,
    explanation: Path | None,
    labels: Mapping[str, int],
    lead: str,
    flags: Sequence[Mapping[str, Any]],
    with_viewer: bool,
    not_annotated: Sequence[str] = (),
) -> CaseView:
    """One case: the overlay is written to `overlay`; what cannot be read becomes a sentence, never an exception."""
    view = CaseView(case_id, anchor(case_id), lead, (*_unjudged(not_annotated), *flag_texts(flags)))
    try:
        scene = load_scene(images, label, pred, explanation)
        scene = replace(scene, not_annotated=tuple(labels[name] for name in not_annotated if name in labels))
        title = f"{case_id} · {lead}" if lead and len(lead) < 60 else case_id
        write_bytes(overlay, draw_scene(scene, labels, title))
        picture = embedded(overlay, f"Slices of {case_id} with outlines; {lead}.")
        told = explain_in_words(explanation) if explanation is not None else ""
        frame = view_scene(scene, labels) if with_viewer and scene.image.ndim == 3 else None
    except UserError as error:
        return replace(view, problem=without_folders(str(error)))
    return replace(view, explanation=told, pictures=(picture,), viewer=frame)


def _unjudged(not_annotated: Sequence[str]) -> tuple[str, ...]:
    if not not_annotated:
        return ()
    names = ", ".join(name.replace("_", " ") for name in not_annotated)
    return (f"Not contoured in the reference, so not judged: {names}.",)


def view_scene(scene: Scene, labels: Mapping[str, int]) -> ViewerFrame:
    """The interactive viewer of a volume."""
    return ViewerFrame(*slice_viewer(scene), legend=legend(scene, labels))


def flag_texts(flags: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The sentences of flags `{code, message}`."""
    return tuple(without_folders(str(flag.get("message") or flag.get("code") or "")) for flag in flags)


def explain_in_words(folder: Path) -> str:
    """What `explanation.json` says: method, layer, class, raw range, checks; or that there is no evidence."""
    about = read_mapping(folder / "explanation.json", missing={})
    if not about:
        return ""
    text = f"Activation map by {about.get('method', 'an unknown method')}"
    text += f", layer {about['layer']}" if about.get("layer") else ""
    text += f", for {about['target']}" if about.get("target") not in (None, "") else ""
    low, high = about.get("raw_min"), about.get("raw_max")
    if about.get("withheld"):
        return f"{text}: withheld, since it failed.{_checks_in_words(about.get('checks'))}"
    if about.get("evidence") is False or (high is not None and is_number(high) and high <= 0):
        return f"{text}: no evidence, the map has no positive value."
    if low is not None and high is not None and is_number(low) and is_number(high):
        text += f"; raw values from {format_number(low)} to {format_number(high)}"
        text += ", of which the positive are shown" if low < 0 else ""
    return text + "." + _checks_in_words(about.get("checks"))


def _checks_in_words(checks: object) -> str:
    """Failed checks first and by name; of each the value, and the threshold where it has one."""
    if not isinstance(checks, Mapping) or not checks:
        return ""
    failed: list[str] = []
    other: list[str] = []
    for name, check in checks.items():
        facts: Mapping[str, Any] = check if isinstance(check, Mapping) else {"value": check}
        value, threshold = facts.get("value"), facts.get("threshold")
        shown = format_number(value) if value is not None and is_number(value) else facts.get("note") or "not defined"
        text = f"{_spaced(name)} {shown}"
        text += f" (mark {format_number(threshold)})" if threshold is not None and is_number(threshold) else ""
        (failed if facts.get("passed") is False else other).append(text)
    told = f" FAILED checks: {', '.join(failed)}." if failed else ""
    return told + (f" {'Other checks' if failed else 'Checks'}: {', '.join(other)}." if other else "")


def _lead(case: Mapping[str, Any]) -> str:
    if case.get("predicted"):
        probs = case.get("probs") or {}
        p = probs.get(case["predicted"])
        chance = f" ({format_number(p, 3)})" if p is not None and is_number(p) else ""
        return f"is {case.get('target') or 'unknown'}, called {case['predicted']}{chance}"
    figures = case.get("metrics") or {}
    dice = [name for name in figures if name.startswith("dice") and is_number(figures[name])]
    names = dice[:4] or [name for name in figures if is_number(figures[name])][:3]
    return ", ".join(f"{metric(name)[0]} {format_number(figures[name], metric(name)[1])}" for name in names)


def _spaced(name: object) -> str:
    return str(name).replace("_", " ")


def _path(value: object) -> Path | None:
    return Path(str(value)) if value else None
