"""The pass mark of one explanation: every check that the config asks for, with value, threshold and verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.config import ExplainChecksConfig, MethodConfig
from medseg.data.grids import enlarged
from medseg.explain import LAYERLESS, explain_score
from medseg.explain.checks import energy_in_region, method_agreement, overlap_of_shifted, rank_correlation
from medseg.explain.hooks import frozen, logits_and_layer
from medseg.explain.perturb import Probe, deletion_insertion, road
from medseg.explain.randomise import cascade
from medseg.explain.targets import Score

CHECKS = ("energy", "deletion", "insertion", "road", "randomisation", "stability", "agreement")
AT_MOST = ("randomisation",)
"""Checks whose value must not exceed the threshold; of the others it must not fall below."""

Float = NDArray[np.floating]


@dataclass(frozen=True)
class Explained:
    """A map and all it takes to make it again.

    Attributes:
        layer: dotted name. map_BDHW: at the layer's own size, for the one image of `probe`.
        mask: (*space) on the image's grid, where the evidence should be; None when nobody knows.
        order: of the network's modules, see `run_order`; empty when it is yet to be found.
    """

    probe: Probe
    method: str
    layer: str
    map_BDHW: Tensor
    mask: NDArray[np.generic] | None = None
    config: MethodConfig = field(default_factory=MethodConfig)
    order: Sequence[str] = ()

    @property
    def values(self) -> Float:
        """The map on the image's grid."""
        shape = tuple(self.probe.x_1CDHW.shape[2:])
        found: Float = enlarged(self.map_BDHW[:, None], shape)[0, 0].cpu().numpy()
        return found

    @property
    def evidence(self) -> bool:
        """Whether anything speaks for the class."""
        return float(self.map_BDHW.max()) > 0

    def again(self, x_BCDHW: Tensor, score: Score, *, net: Any = None) -> Float:
        """(B, *) maps of other images, or from another network, at the layer's own size."""
        found = explain_score(
            net or self.probe.net, x_BCDHW, score, self.method, self.layer, size="layer", config=self.config
        )
        return found.cpu().numpy()

    def by_another(self, method: str) -> Float:
        """The map of the same image by another method, at this one's layer, or at `last` where this one has none."""
        net, x, layer = self.probe.net, self.probe.x_1CDHW, self.layer
        if self.method in LAYERLESS and method not in LAYERLESS:
            with frozen(net):
                layer = logits_and_layer(net, x, "last")[1]
        found = explain_score(net, x, self.probe.score, method, layer, size="layer", config=self.config)
        return found.cpu().numpy()


def measure(explained: Explained, checks: ExplainChecksConfig) -> dict[str, dict[str, Any]]:
    """Measure what has a threshold; see `medseg.config.ExplainChecksConfig` for what each check is.

    Returns:
        By name: `value` (None where it is not defined), and what else is known of it (areas, stages, a note).
        A check that cannot be made here (no mask, image too large) is in it with a `note` and without value.
    """
    wanted = [name for name in CHECKS if getattr(checks, name) is not None]
    found: dict[str, dict[str, Any]] = {}
    values, probe = explained.values, explained.probe
    if "energy" in wanted and explained.mask is not None:
        found["energy"] = {
            "value": energy_in_region(values, explained.mask, checks.dilate_px),
            "mask_share": float(np.mean(np.asarray(explained.mask) > 0)),
        }
    if {"deletion", "insertion", "road"} & set(wanted):
        found |= _perturbations(explained, checks, wanted)
    if "randomisation" in wanted:
        similar = [
            abs(
                rank_correlation(
                    explained.map_BDHW[0].cpu().numpy(), explained.again(probe.x_1CDHW, probe.score, net=net)[0]
                )
            )
            for net in cascade(probe.net, probe.x_1CDHW, checks.stages, checks.seed, explained.order)
        ]
        found["randomisation"] = {"value": similar[-1], "stages": similar}
    if "stability" in wanted:
        found["stability"] = {"value": _stability(explained, checks.shift_px)}
    if "agreement" in wanted:
        other = checks.agreement_with if checks.agreement_with != explained.method else "layercam"
        second = explained.by_another(other)
        found["agreement"] = {
            "value": method_agreement(explained.map_BDHW[0].cpu().numpy(), _like(second, explained)),
            "with": other,
        }
    return {name: {**facts, "value": _defined(facts.get("value"))} for name, facts in found.items()}


def judge(found: Mapping[str, Mapping[str, Any]], checks: ExplainChecksConfig) -> dict[str, dict[str, Any]]:
    """Add `threshold` and `passed` to what `measure` found; `passed` is None where there is no value."""
    judged = {}
    for name, facts in found.items():
        threshold, value = getattr(checks, name), facts["value"]
        passed = None if value is None else (value <= threshold if name in AT_MOST else value >= threshold)
        judged[name] = {"value": value, "threshold": threshold, "passed": passed, **facts}
    return judged


def failed(judged: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the checks that a map failed."""
    return [name for name, facts in judged.items() if facts["passed"] is False]


def _perturbations(explained: Explained, checks: ExplainChecksConfig, wanted: list[str]) -> dict[str, dict[str, Any]]:
    values, probe = explained.values, explained.probe
    asked = [name for name in ("deletion", "insertion", "road") if name in wanted]
    if values.size > checks.max_voxels:
        note = f"not made: {values.size} voxels, more than explain.checks.max_voxels ({checks.max_voxels})"
        return {name: {"value": None, "note": note} for name in asked}
    found: dict[str, dict[str, Any]] = {}
    if set(asked) & {"deletion", "insertion"}:
        areas = deletion_insertion(
            probe, values, _cells(explained), steps=checks.steps, random_maps=checks.random_maps, seed=checks.seed
        )
        found |= {
            name: {"value": areas[name], "auc": areas[f"{name}_auc"], "random_auc": areas["random_auc"]}
            for name in asked
            if name != "road"
        }
    if "road" in asked:
        figures = road(probe, values, steps=checks.steps, seed=checks.seed)
        found["road"] = {"value": figures["road"], "morf": figures["morf"], "lerf": figures["lerf"]}
    return found


def _cells(explained: Explained) -> tuple[int, ...]:
    """How coarse the map is; a map of pixels is held against noise of 16 cells along each axis."""
    space = explained.map_BDHW.shape[1:]
    return tuple(min(n, 16) for n in space) if explained.method in LAYERLESS else tuple(space)


def _stability(explained: Explained, shift_px: int) -> float:
    """Mean rank correlation with the maps of the image moved along all axes at once, there and back."""
    probe, values = explained.probe, explained.values
    shifts = [tuple([sign * shift_px] * values.ndim) for sign in (1, -1)]
    images = torch.cat([_moved(probe.x_1CDHW, shift) for shift in shifts])
    score = probe.score.take([0] * len(shifts))
    if score.region_BDHW is not None:
        region = torch.cat([_moved(score.region_BDHW[:1, None], shift) for shift in shifts])[:, 0]
        score = Score(score.chosen_B, region)
    maps = enlarged(torch.from_numpy(explained.again(images, score))[:, None], values.shape)[:, 0].numpy()
    return float(
        np.mean(
            [
                rank_correlation(*overlap_of_shifted(values, found, shift))
                for found, shift in zip(maps, shifts, strict=True)
            ]
        )
    )


def _moved(x_BCDHW: Tensor, shift: tuple[int, ...]) -> Tensor:
    """The image moved towards higher indices; the border that comes in repeats the edge."""
    for axis, step in enumerate(shift, start=2):
        index = (torch.arange(x_BCDHW.shape[axis], device=x_BCDHW.device) - step).clamp(0, x_BCDHW.shape[axis] - 1)
        x_BCDHW = x_BCDHW.index_select(axis, index)
    return x_BCDHW


def _like(second: Float, explained: Explained) -> Float:
    """A map at the size of the explained one, averaged or interpolated."""
    shape = tuple(explained.map_BDHW.shape[1:])
    found: Float = enlarged(torch.from_numpy(np.maximum(second, 0))[:, None], shape)[0, 0].numpy()
    return found


def _defined(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
