"""The step `explain`: a prediction folder in, one activation map per case out, each with its pass mark."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.cohort import Cohort
from medseg.config import ExplainConfig, IngestConfig, LungsConfig
from medseg.data.lung_view import FILE as LUNGS_FILE
from medseg.data.lung_view import LungFields, read_mask, visible
from medseg.data.preprocess import Prepared, prepare
from medseg.explain import LAYERLESS, explain_score, passmark, summary
from medseg.explain.export_sc import OVERLAY
from medseg.explain.hooks import frozen, logits_and_layer, run_order
from medseg.explain.outputs import MAPS, restore_map, write_map, write_overlay
from medseg.explain.passmark import Explained
from medseg.explain.perturb import Probe
from medseg.explain.scans import Scans
from medseg.explain.targets import make_score
from medseg.explain.window import choose_window, cut, paste
from medseg.files import UserError, read_json, write_json, write_rows
from medseg.images import read_image
from medseg.plan import Plan
from medseg.progress import progress
from medseg.result import Result
from medseg.volume import Volume

ABOUT = ("method", "layer", "target", "raw_max", "evidence", "passed", "withheld")
COLUMNS = ("case_id", "status", "reason", *ABOUT, "failed_checks")


def run(
    config: ExplainConfig,
    net: nn.Module,
    plan: Plan,
    labels: Mapping[str, int],
    scans: Cohort | Sequence[Path],
    split: str | None = None,
    *,
    predictions: Path,
    ingest: IngestConfig | None = None,
    regions: Path | None = None,
    lungs: LungsConfig | None = None,
) -> Result:
    """Write `<predictions>/<case_id>/explanation/` for `config.max_cases` usable cases, chosen by `config.cases`.

    The map is that of the predicted class (classification; of labels that are not exclusive the most probable one) or
    of the largest predicted label (segmentation), or of `config.target`, brought linearly to the scan's own grid:
    `map.npy` (row, column) for radiographs, `map.nii.gz` for volumes, float32, raw. A radiograph that came as DICOM
    also gets `overlay.dcm`, for the PACS. `explanation.json` says what was found and which checks the map passed, and
    is written last; run again, cases that have it are not redone. `<predictions>/explanation.json` has the share of
    cases that pass each check.

    Args:
        net: logits for images as `plan` prepares them.
        labels: name to value.
        scans: what the predictions were made from. split: of the cohort; None takes every case.
        predictions: folder that `predict` wrote. ingest: how it read the scans.
        regions: folder of `<case_id>.png` or `.nii.gz` masks on the scans' own grid where evidence should be; by
            default the predicted region of a segmentation, and the lung fields that a classifier's prediction has.
        lungs: what the network sees of a radiograph; the lung fields are those of the prediction.

    Returns:
        Status `partial` when a map could not be made; `explanations.csv` says for which case and why.

    Raises:
        UserError: `config.target` is no label, the split is empty, or `config.cases` does not fit the task.
    """
    started, config = time.monotonic(), config.settled(None)
    if config.target is not None and config.target not in labels:
        raise UserError(f"explain.target {config.target!r} is none of the labels {', '.join(labels)}.")
    maker = _Maker(config, net, plan, labels, Scans(scans, ingest), predictions, regions, lungs)
    chosen = _ordered(_choose(predictions, scans, split), config)[: config.max_cases]
    rows = []
    with progress("Explaining", len(chosen)) as shown:
        for case_id, result in chosen:
            rows.append(_row(maker, case_id, result))
            shown.advance()
    failed = sum(row["status"] == "failed" for row in rows)
    made = [(case_id, read_json(_about_path(predictions, case_id))) for case_id in _written(rows)]
    found = summary.summarise([(_patient(scans, case_id), about) for case_id, about in made], config.checks.seed)
    figures = {
        "maps": len(rows) - failed,
        "failed": failed,
        "no_evidence": sum(row["evidence"] is False for row in rows),
        "failed_checks": sum(row["passed"] is False for row in rows),
        "withheld": sum(row["withheld"] is True for row in rows),
        "method": config.method,
        "seconds": round(time.monotonic() - started, 2),
    }
    paths = {
        "explanations": write_rows(predictions / "explanations.csv", COLUMNS, rows),
        "explanation_checks": write_json(predictions / summary.FILE, found),
    }
    return Result("explain", "partial" if failed else "done", paths, figures).write(predictions)


def _written(rows: Sequence[Mapping[str, object]]) -> list[str]:
    return [str(row["case_id"]) for row in rows if row["status"] == "done"]


def _about_path(predictions: Path, case_id: str) -> Path:
    return predictions / case_id / "explanation" / "explanation.json"


def _patient(scans: Cohort | Sequence[Path], case_id: str) -> str:
    """To whom a case belongs; without a cohort each case stands for itself."""
    if not isinstance(scans, Cohort):
        return case_id
    return next((case.patient_id for case in scans.cases if case.case_id == case_id), case_id)


def _ordered(chosen: list[tuple[str, dict[str, Any]]], config: ExplainConfig) -> list[tuple[str, dict[str, Any]]]:
    """In the order in which cases are explained; a random place is a function of seed and case alone."""
    if config.cases == "random":
        return sorted(chosen, key=lambda c: hashlib.sha256(f"{config.checks.seed}/{c[0]}".encode()).digest())
    if config.cases == "doubtful":
        for case_id, result in chosen:
            if not result.get("probs"):
                raise UserError(f"explain.cases 'doubtful' needs probabilities, {case_id} has none; take random.")
        return sorted(chosen, key=lambda c: (_certainty(c[1]), c[0]))
    return chosen


def _certainty(result: Mapping[str, Any]) -> float:
    """The probability of what was called; of labels that are not exclusive that of the least certain answer."""
    probs: Mapping[str, float] = result["probs"]
    if isinstance(result["predicted"], list):
        return min(max(p, 1 - p) for p in probs.values())
    return probs[result["predicted"]]


def _called(result: Mapping[str, Any]) -> str:
    """The predicted class, or the most probable one of labels that are not exclusive, called or not."""
    probs: Mapping[str, float] = result["probs"]
    return max(probs, key=lambda name: probs[name]) if isinstance(result["predicted"], list) else result["predicted"]


def _choose(predictions: Path, scans: Cohort | Sequence[Path], split: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Usable predictions in order of case_id, with their results."""
    wanted = None
    if isinstance(scans, Cohort):
        wanted = {case.case_id for case in (scans.split(split) if split else scans.cases)}
    found = []
    for path in sorted(predictions.glob("*/result.json")):
        if wanted is not None and path.parent.name not in wanted:
            continue
        result = read_json(path)
        if result.get("status") in ("done", "flagged"):
            found.append((path.parent.name, result))
    return found


def _row(maker: "_Maker", case_id: str, result: dict[str, Any]) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS)
    row |= {"case_id": case_id, "status": "done", "method": maker.config.method}
    try:
        about = maker.make(case_id, result)
    except Exception as error:  # one bad case must not stop the batch; the reason stands in the table
        return row | {"status": "failed", "reason": " ".join(str(error).split()) or type(error).__name__}
    row |= {"reason": about.get("no_dicom"), "failed_checks": "; ".join(about["failed_checks"])}
    return row | {name: about[name] for name in ABOUT}


@dataclass(frozen=True)
class _Maker:
    """Makes the maps of one prediction folder."""

    config: ExplainConfig
    net: nn.Module
    plan: Plan
    labels: Mapping[str, int]
    scans: Scans
    predictions: Path
    regions: Path | None = None
    lungs: LungsConfig | None = None

    def make(self, case_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write the explanation of one case, unless the same is there; returns `explanation.json`."""
        folder = self.predictions / case_id / "explanation"
        made_from = self.config.model_dump(mode="json", exclude={"max_cases", "cases", "rank"}) | {
            "input_sha256": result.get("input_sha256"),
            "bundle_sha256": (result.get("bundle") or {}).get("sha256"),
        }
        if (folder / "explanation.json").is_file():
            about: dict[str, Any] = read_json(folder / "explanation.json")
            if about.get("made_from") == made_from and (folder / (about.get("dicom") or ".")).exists():
                return about
            (folder / "explanation.json").unlink()
        for name in (OVERLAY, *MAPS):
            (folder / name).unlink(missing_ok=True)
        scan = self.scans.find(case_id, result)
        pred = _read_pred(self.predictions / case_id)
        channels = self._visible(case_id, scan.channels)
        prepared = prepare(channels, self.plan, pred)
        map_net, about = self._explain(prepared, result, self._region(case_id, channels[0]))
        map_scan = restore_map(map_net, prepared)
        about |= {"raw_min": float(map_scan.min()), "raw_max": float(map_scan.max())}
        about |= {"evidence": about["raw_max"] > 0, "made_from": made_from}
        about["withheld"] = bool(about["failed_checks"]) and self.config.on_failure == "withhold"
        if not about["withheld"]:
            write_map(folder, map_scan, prepared)
            if scan.radiograph is not None:
                about |= write_overlay(folder, scan.radiograph, scan.channels[0], map_scan, about, result)
        write_json(folder / "explanation.json", about)
        return about

    def _region(self, case_id: str, image: Volume) -> NDArray[np.generic] | None:
        """Where the evidence should be, on the network's grid, or None where nobody knows."""
        paths = [self.predictions / case_id / LUNGS_FILE]
        if self.regions is not None:
            paths = [self.regions / f"{case_id}.png", self.regions / f"{case_id}.nii.gz"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            return None
        inside = np.asarray(read_mask(path, image)).astype(np.bool_)
        return prepare([image], self.plan, Volume(inside.astype(np.uint8), image.affine)).label

    def _visible(self, case_id: str, channels: Sequence[Volume]) -> Sequence[Volume]:
        """What the network saw when it predicted the case."""
        path = self.predictions / case_id / LUNGS_FILE
        if self.lungs is None:
            return channels
        fields = LungFields(np.asarray(read_mask(path, channels[0])).astype(np.bool_)) if path.is_file() else None
        return visible(channels, fields, self.lungs)

    def _explain(
        self, prepared: Prepared, result: dict[str, Any], mask: NDArray[np.generic] | None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """The map on the network's grid, and what it is and passes."""
        config, pred = self.config, prepared.label
        target = config.target or (_called(result) if pred is None else _largest(pred, self.labels))
        region = None if pred is None else pred == self.labels[target]
        mask = region if mask is None else mask
        image, window = prepared.image, None
        if region is not None and mask is not None:
            max_voxels = self.plan.batch_size * math.prod(self.plan.patch_size)  # a training step takes more memory
            window = choose_window(region, self.plan.patch_size, max_voxels)
            image, region, mask = cut(image, window), cut(region[None], window)[0], cut(mask[None], window)[0]
        exclusive = not isinstance(result.get("predicted"), list)
        explained = self._map(image, target, region, mask, exclusive=exclusive)
        checks = self.config.checks
        found = passmark.judge(passmark.measure(explained, checks), checks) if explained.evidence else {}
        map_net = explained.values.astype(np.float32)
        if window is not None:
            map_net = paste(map_net, window, prepared.image.shape[1:])
        verdicts = [check["passed"] for check in found.values() if check["passed"] is not None]
        return map_net, {
            "method": config.method,
            "layer": explained.layer,
            "target": target,
            "window": window,
            "checks": found,
            "failed_checks": passmark.failed(found),
            "passed": all(verdicts) if verdicts else None,
        }

    def _map(
        self,
        image: NDArray[np.float32],
        target: str,
        region: NDArray[np.bool_] | None,
        mask: NDArray[np.generic] | None,
        *,
        exclusive: bool,
    ) -> Explained:
        config, methods = self.config, self.config.methods
        device = next(self.net.parameters()).device
        x_BCDHW = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None].to(device)
        region_BDHW = None if region is None else torch.from_numpy(region)[None].to(device)
        with frozen(self.net), run_order(self.net) as order:
            wanted = "input" if config.method in LAYERLESS else config.layer
            logits, layer = logits_and_layer(self.net, x_BCDHW, wanted)
        score = make_score(logits, self.labels[target], region_BDHW, exclusive=exclusive)
        found = explain_score(self.net, x_BCDHW, score, config.method, layer, size="layer", config=methods)
        probe = Probe(self.net, x_BCDHW, score, methods.batch_size)
        return Explained(probe, config.method, layer, found, mask, methods, order)


def _read_pred(folder: Path) -> Volume | None:
    """The predicted label map of a case; None for a classifier."""
    found = [path for path in (folder / "mask.nii.gz", folder / "mask.png") if path.is_file()]
    return read_image(found[0]) if found else None


def _largest(pred: NDArray[np.generic], labels: Mapping[str, int]) -> str:
    """The label with most voxels; the first when nothing was predicted."""
    counts = {name: int(np.count_nonzero(pred == value)) for name, value in labels.items()}
    return max(counts, key=lambda name: counts[name])
