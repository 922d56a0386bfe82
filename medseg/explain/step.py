"""The step `explain`: a prediction folder in, one activation map per case out."""

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
from medseg.config import ExplainConfig, IngestConfig
from medseg.data.preprocess import Prepared, prepare
from medseg.explain import explain
from medseg.explain.export_sc import OVERLAY, write_sc
from medseg.explain.hooks import frozen, logits_and_layer
from medseg.explain.scans import Scans
from medseg.explain.window import choose_window, cut, paste
from medseg.files import UserError, read_json, replacing, write_json, write_rows
from medseg.images import read_image, write_nifti
from medseg.ingest.dicom_derived import why_not
from medseg.metrics import energy_in_mask
from medseg.plan import Plan
from medseg.progress import progress
from medseg.result import Result
from medseg.volume import Volume, from_canonical, resample, to_canonical

COLUMNS = ("case_id", "status", "reason", "method", "layer", "target", "raw_max", "evidence")


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
) -> Result:
    """Write `<predictions>/<case_id>/explanation/` for the first `config.max_cases` usable cases.

    The map is that of the predicted class (classification) or of the largest predicted label (segmentation), or of
    `config.target`, brought linearly to the scan's own grid: `map.npy` (row, column) for radiographs, `map.nii.gz`
    for volumes, float32, raw. A radiograph that came as DICOM also gets `overlay.dcm`, for the PACS.
    `explanation.json` is written last; run again, cases that have it are not redone.

    Args:
        net: logits for images as `plan` prepares them.
        labels: name to value.
        scans: what the predictions were made from. split: of the cohort; None takes every case.
        predictions: folder that `predict` wrote. ingest: how it read the scans.

    Returns:
        Status `partial` when a map could not be made; `explanations.csv` says for which case and why.

    Raises:
        UserError: `config.target` is no label, or the split is empty.
    """
    started = time.monotonic()
    if config.target is not None and config.target not in labels:
        raise UserError(f"explain.target {config.target!r} is none of the labels {', '.join(labels)}.")
    maker = _Maker(config, net, plan, labels, Scans(scans, ingest), predictions)
    chosen = _choose(predictions, scans, split)[: config.max_cases]
    rows = []
    with progress("Explaining", len(chosen)) as shown:
        for case_id, result in chosen:
            rows.append(_row(maker, case_id, result))
            shown.advance()
    failed = sum(row["status"] == "failed" for row in rows)
    figures = {
        "maps": len(rows) - failed,
        "failed": failed,
        "no_evidence": sum(row["evidence"] is False for row in rows),
        "method": config.method,
        "seconds": round(time.monotonic() - started, 2),
    }
    paths = {"explanations": write_rows(predictions / "explanations.csv", COLUMNS, rows)}
    return Result("explain", "partial" if failed else "done", paths, figures).write(predictions)


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
    row |= {"reason": about.get("no_dicom")}
    return row | {name: about[name] for name in ("layer", "target", "raw_max", "evidence")}


@dataclass(frozen=True)
class _Maker:
    """Makes the maps of one prediction folder."""

    config: ExplainConfig
    net: nn.Module
    plan: Plan
    labels: Mapping[str, int]
    scans: Scans
    predictions: Path

    def make(self, case_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write the explanation of one case, unless the same is there; returns `explanation.json`."""
        folder = self.predictions / case_id / "explanation"
        made_from = {
            "method": self.config.method,
            "layer": self.config.layer,
            "target": self.config.target,
            "input_sha256": result.get("input_sha256"),
            "bundle_sha256": (result.get("bundle") or {}).get("sha256"),
        }
        if (folder / "explanation.json").is_file():
            about: dict[str, Any] = read_json(folder / "explanation.json")
            if about.get("made_from") == made_from and (folder / (about.get("dicom") or ".")).exists():
                return about
            (folder / "explanation.json").unlink()
        (folder / OVERLAY).unlink(missing_ok=True)
        scan = self.scans.find(case_id, result)
        pred = _read_pred(self.predictions / case_id)
        prepared = prepare(scan.channels, self.plan, pred)
        map_net, about = self._explain(prepared, result)
        map_scan = restore_map(map_net, prepared)
        if pred is not None:
            about["checks"] = {"energy_in_pred": energy_in_mask(map_scan, pred.array == self.labels[about["target"]])}
        about |= {"raw_min": float(map_scan.min()), "raw_max": float(map_scan.max())}
        about |= {"evidence": about["raw_max"] > 0, "made_from": made_from}
        _write_map(folder, map_scan, prepared)
        if scan.radiograph is not None:
            about |= _write_overlay(folder, scan.radiograph, scan.channels[0], map_scan, about, result)
        write_json(folder / "explanation.json", about)
        return about

    def _explain(self, prepared: Prepared, result: dict[str, Any]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """The map on the network's grid, and what it is."""
        config, pred = self.config, prepared.label
        target = config.target or (result["predicted"] if pred is None else _largest(pred, self.labels))
        region = None if pred is None else pred == self.labels[target]
        image, window = prepared.image, None
        if region is not None:
            max_voxels = self.plan.batch_size * math.prod(self.plan.patch_size)  # a training step takes more memory
            window = choose_window(region, self.plan.patch_size, max_voxels)
            image, region = cut(image, window), cut(region[None], window)[0]
        device = next(self.net.parameters()).device
        x_BCDHW = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None].to(device)
        with frozen(self.net):
            layer = "input" if config.method == "gradients" else logits_and_layer(self.net, x_BCDHW, config.layer)[1]
        found = explain(
            self.net,
            x_BCDHW,
            config.method,
            self.labels[target],
            layer,
            region_BDHW=None if region is None else torch.from_numpy(region)[None],
        )
        map_net = found[0].cpu().numpy()
        if window is not None:
            map_net = paste(map_net, window, prepared.image.shape[1:])
        about: dict[str, Any] = {
            "method": config.method,
            "layer": layer,
            "target": target,
            "window": window,
            "checks": {},
        }
        return map_net, about


def restore_map(map_net: NDArray[np.float32], prepared: Prepared) -> NDArray[np.float32]:
    """Bring a map from the network's grid to the scan's own, shape `prepared.native_shape`, linearly."""
    native = Volume(np.empty(prepared.native_shape, dtype=np.uint8), prepared.native_affine)
    if map_net.ndim == 2:
        restored = resample(map_net, prepared.affine, native.array.shape, native.affine, order=1)
    else:
        canonical = to_canonical(native)
        restored = resample(map_net, prepared.affine, canonical.array.shape, canonical.affine, order=1)
        restored = from_canonical(restored, prepared.native_affine)
    return np.ascontiguousarray(restored, dtype=np.float32)


def _read_pred(folder: Path) -> Volume | None:
    """The predicted label map of a case; None for a classifier."""
    found = [path for path in (folder / "mask.nii.gz", folder / "mask.png") if path.is_file()]
    return read_image(found[0]) if found else None


def _largest(pred: NDArray[np.generic], labels: Mapping[str, int]) -> str:
    """The label with most voxels; the first when nothing was predicted."""
    counts = {name: int(np.count_nonzero(pred == value)) for name, value in labels.items()}
    return max(counts, key=lambda name: counts[name])


def _write_overlay(
    folder: Path,
    radiograph: Path,
    image: Volume,
    map_scan: NDArray[np.float32],
    about: Mapping[str, Any],
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """The map as DICOM Secondary Capture, or why there is none; the map itself is good either way."""
    try:
        write_sc(folder / OVERLAY, radiograph, image.array, map_scan, about, result)
    except UserError:
        raise  # the disk
    except Exception as error:  # headers of the source that no object may refer to
        return {"no_dicom": f"No DICOM SC was written ({why_not(error)})."}
    return {"dicom": OVERLAY}


def _write_map(folder: Path, map_scan: NDArray[np.float32], prepared: Prepared) -> None:
    if map_scan.ndim == 3:
        write_nifti(folder / "map.nii.gz", Volume(map_scan, prepared.native_affine), intent="activation map")
        return
    with replacing(folder / "map.npy") as temporary, temporary.open("wb") as file:
        np.save(file, map_scan, allow_pickle=False)
