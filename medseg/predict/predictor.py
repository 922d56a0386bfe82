"""A bundle with its network in memory: one scan in, one prediction out. Knows no folders and no ledger."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.bundle import Bundle
from medseg.cohort import Finding
from medseg.config import LungsConfig
from medseg.data.lung_view import LungFields, LungView, visible
from medseg.data.lungs import check
from medseg.data.preprocess import Prepared, normalised_limit, prepare
from medseg.data.prior import as_channels
from medseg.files import UserError
from medseg.ingest.scan import Refused, Scan
from medseg.ingest.sources import discover
from medseg.label_sets import call_labels
from medseg.models.ensemble import Ensemble
from medseg.models.features import mean_features
from medseg.models.layout import placed
from medseg.models.precision import autocast
from medseg.models.sliding import class_logits, fast_batch
from medseg.predict.answers import Watch
from medseg.predict.flags import check_distance, check_mask, check_scan, check_volumes
from medseg.predict.jobs import read_checked
from medseg.predict.network import choose_device, load_network
from medseg.predict.postprocess import apply_all
from medseg.predict.priors import Prior
from medseg.predict.trust import Trust, judge
from medseg.predict.watching import watched
from medseg.predict.windows import WorkingSet, segment_array
from medseg.volume import Volume, closest_axes, from_canonical


@dataclass(frozen=True)
class Prediction:
    """What a model says about one scan.

    Attributes:
        mask: integer labels on the scan's own grid (segmentation), else None.
        volumes_ml: label name to volume; empty for radiographs and classification.
        probs: class name to probability (classification).
        predicted: name of the class that is called, or the names of all labels that are (`task.multi_label`); empty for
            segmentation.
        flags: reasons to look at the result before using it.
        confidence: label name to figures that say how far to trust it (segmentation), for each label found.
        verdict: of a calibrated classifier, as `result.json` holds it: refer, do not refer or not assessable, with
            probability, score 0 to 100, threshold and the intervals of its sensitivity and specificity; else None.
        lungs: lung fields on the scan's own grid, of a classifier that looks for them; else None.
        feature_distance: from the training cohort, see `medseg.feature_distance`; None where the bundle cannot tell.
        windows: of a segmentation, see `WorkingSet`: `all`, of them `even`, and of these `air`.
    """

    mask: Volume | None
    volumes_ml: Mapping[str, float]
    probs: Mapping[str, float]
    predicted: str | tuple[str, ...]
    flags: tuple[Finding, ...]
    confidence: Mapping[str, Trust] = field(default_factory=dict)
    verdict: Mapping[str, Any] | None = None
    lungs: LungFields | None = None
    feature_distance: float | None = None
    windows: Mapping[str, int] = field(default_factory=dict)


class Predictor:
    """Predicts with one bundle; the network is loaded once.

    Args:
        device: by default a GPU where there is one, unless the bundle's config says `cpu`.
        net: a network to use in place of the bundle's own weights; nothing is known of the features of another one.
    """

    def __init__(self, bundle: Bundle, device: torch.device | None = None, net: nn.Module | None = None) -> None:
        self.bundle = bundle
        self.device = device or choose_device(bundle)
        self.net = placed(net, self.device).eval() if net is not None else load_network(bundle, self.device)
        self.lungs = view_of(bundle, self.device)
        self._distance = bundle.distance if net is None else None

    def prepare(self, scan: Scan) -> Prepared:
        """The scan on the network's grid, with what the model is not to see of a radiograph black.

        Raises:
            Refused: it is of another kind, or has other channels, than the model was trained on, or lacks a lung mask.
        """
        task = self.bundle.config.task
        if (scan.kind == "radiograph") != (task.spatial_dims == 2):
            wanted = "radiographs" if task.spatial_dims == 2 else "volumes"
            raise Refused("wrong_kind", f"It is a {scan.kind}, but the model takes {wanted}.")
        if len(scan.channels) != len(task.channels):
            names = ", ".join(task.channels)
            raise Refused("channels", f"It has {len(scan.channels)} channels, but the model takes: {names}.")
        if self.lungs is None:
            return prepare(scan.channels, self.bundle.plan)
        fields = self.lungs.find(scan.channels[0], scan.lung_mask)
        seen = visible(scan.channels, fields, self.lungs.config)
        return replace(prepare(seen, self.bundle.plan), lungs=fields)

    @property
    def takes_prior(self) -> bool:
        """Whether the network takes the mask of an earlier examination."""
        return self.bundle.config.model.takes_prior

    def predict(
        self,
        scan: Scan,
        prepared: Prepared,
        announce: Callable[[WorkingSet], None] | None = None,
        prior: Prior | None = None,
    ) -> Prediction:
        """Segment or classify a scan that `prepare` has prepared.

        Args:
            announce: is told what memory segmenting takes, before most of it is taken.
            prior: the mask of an earlier examination, for a network that takes one.
        """
        with self._measuring() as measured:
            if self._classifies:
                said = self._classified(scan, prepared)
            else:
                said = self._segmented(scan, prepared, announce, prior)
        shown = prior is not None and prior.codes is not None
        distance = None if shown else measured()  # the limit is that of features without a prior
        limit = self._distance.limit if self._distance is not None else None
        found = (*_warnings(scan), *check_scan(scan, self.bundle.plan), *check_distance(distance, limit))
        earlier = prior.findings if prior else ()
        return replace(said, flags=(*found, *earlier, *said.flags), feature_distance=distance)

    @property
    def _classifies(self) -> bool:
        return self.bundle.config.task.kind == "classification"

    @contextmanager
    def _measuring(self) -> Iterator[Callable[[], float | None]]:
        """A function that gives, after the block, the distance of the one image that the network saw in it."""
        distance = self._distance
        if distance is None:
            yield lambda: None
            return
        with mean_features(self.net, classifies=self._classifies) as members:

            def measured() -> float | None:
                seen = [features for member in members if (features := member.mean()) is not None]
                return distance(seen) if len(seen) == len(members) else None

            yield measured

    def _classified(self, scan: Scan, prepared: Prepared) -> Prediction:
        probs = self._classify(prepared)
        multi_label = self.bundle.config.task.multi_label
        called = call_labels(probs) if multi_label else called_class(probs, self.bundle.operating_point)
        verdict, fields = self._verdict(scan, probs, prepared.lungs), prepared.lungs
        flags = fields.findings if fields is not None else ()
        return Prediction(None, {}, probs, called, flags, verdict=verdict, lungs=fields)

    def _segmented(
        self, scan: Scan, prepared: Prepared, announce: Callable[[WorkingSet], None] | None, prior: Prior | None
    ) -> Prediction:
        bundle, told = self.bundle, list[WorkingSet]()

        def listen(found: WorkingSet) -> None:
            told.append(found)
            if announce is not None:
                announce(found)

        temperatures = [float(member["temperature"]) for member in bundle.members] or [bundle.temperature]
        axes = bundle.config.predict.mirror_axes
        alone = not axes and not isinstance(self.net, Ensemble)  # then logits may be made in parts
        with watched(self.net, temperatures, axes, hooks=not alone) as watcher:
            labels = self._segment(prepared, listen, prior, watcher.see if alone else None)
        mask = self._cleaned(Volume(labels, scan.channels[0].affine))
        volumes_ml = measure_volumes(mask, bundle.labels) if scan.kind == "volume" else {}
        trust = judge(watcher.features(bundle.labels), bundle.evidence)
        flags = (*check_mask(mask, bundle.labels), *check_volumes(volumes_ml, bundle.evidence))
        if (limits := bundle.config.lungs) is not None:
            flags = (*flags, *check(mask.array.astype(np.bool_), limits))
        windows = {"all": told[0].windows, "even": told[0].even, "air": told[0].air}
        return Prediction(mask, volumes_ml, {}, "", flags, trust, windows=windows)

    def segment(self, image: Volume) -> NDArray[Any]:
        """The label map of a radiograph on its own grid, as `predict` makes it."""
        labels = self._segment(prepare([image], self.bundle.plan))
        return self._cleaned(Volume(labels, image.affine)).array

    def predict_file(self, path: Path) -> Prediction:
        """Predict the one scan at `path`. Raises UserError when there is not exactly one usable scan."""
        config = self.bundle.config.ingest.for_use()
        sources, rejects = discover([path], config)
        if len(sources) != 1:
            why = rejects[0].reason if rejects and not sources else f"it holds {len(sources)} scans"
            raise UserError(f"{path}: {why}; give one scan, or use `medseg predict` for many.")
        try:
            scan = read_checked(sources[0], config)
            return self.predict(scan, self.prepare(scan))
        except Refused as error:
            raise UserError(f"{path}: {error.reason}") from error

    def _segment(
        self,
        prepared: Prepared,
        announce: Callable[[WorkingSet], None] | None = None,
        prior: Prior | None = None,
        watch: Watch | None = None,
    ) -> NDArray[Any]:
        plan, config = self.bundle.plan, self.bundle.config.predict
        image = torch.from_numpy(prepared.image)
        if prior is not None and prior.codes is not None:
            codes = torch.from_numpy(prior.codes.astype(np.int32))[None, None]
            image = torch.cat([image, as_channels(codes, self.bundle.config.task.out_channels)[0]])
        covered = prepared.covered_shape
        volume = len(covered) == 3
        axes = closest_axes(prepared.native_affine)[0] if volume else range(2)
        with autocast(config.precision, self.device):
            labels = segment_array(
                self.net,
                image,
                plan.patch_size,
                config.overlap,
                out_shape=tuple(covered[axis] for axis in axes),
                memory_gb=config.memory_gb,
                window_batch=max(config.window_batch, fast_batch(plan.patch_size, self.device)),
                mirror_axes=config.mirror_axes,
                air_below=normalised_limit(config.air_below, plan),
                announce=announce,
                watch=watch,
            )
        return from_canonical(labels, prepared.native_affine) if volume else prepared.onto_scan(labels)

    def _cleaned(self, mask: Volume) -> Volume:
        """With the post-processing that the bundle's own evidence speaks for; without any, the mask as it is."""
        choices = [choice for choice in self.bundle.evidence.get("postprocessing") or () if choice["used"]]
        voxel_ml = mask.voxel_ml if mask.array.ndim == 3 else 0.0
        return replace(mask, array=apply_all(mask.array, self.bundle.labels, choices, voxel_ml=voxel_ml))

    @torch.inference_mode()
    def _classify(self, prepared: Prepared) -> dict[str, float]:
        image = torch.from_numpy(prepared.image)[None].to(self.device)
        with autocast(self.bundle.config.predict.precision, self.device, one_image=True):
            logits = class_logits(self.net, image, self.bundle.config.predict.mirror_axes)[0] / self.bundle.temperature
        if not torch.isfinite(logits).all():
            raise ValueError("the network's logits are not finite; its weights or the image are damaged")
        if self.bundle.verdict is not None:
            values = logits.tolist()
            return self.bundle.verdict.probabilities({name: values[i] for name, i in self.bundle.labels.items()})
        probs = (logits.sigmoid() if self.bundle.config.task.multi_label else torch.softmax(logits, 0)).tolist()
        return {name: float(probs[index]) for name, index in self.bundle.labels.items()}

    def _verdict(self, scan: Scan, probs: Mapping[str, float], fields: LungFields | None) -> dict[str, Any] | None:
        """A verdict is withheld for findings of any severity: what is only worth knowing may be a reason here.

        Lung fields that cannot be true are a reason where the network has seen nothing else.
        """
        verdict = self.bundle.verdict
        if verdict is None:
            return None
        findings = scan.findings
        if fields is not None and self.lungs is not None and self.lungs.masks:
            findings += fields.findings
        return verdict.as_result(probs[verdict.positive], {finding.code for finding in findings})


def view_of(bundle: Bundle, device: torch.device | None = None) -> LungView | None:
    """How a classifier sees radiographs, by its own lung model where it has one; None where no lungs are asked for."""
    if bundle.config.task.kind != "classification":
        return None
    return lung_view(bundle.config.lungs, bundle.lungs, device)


def lung_view(config: LungsConfig | None, model: Bundle | None, device: torch.device | None = None) -> LungView | None:
    """How a classifier with these settings sees radiographs, by this lung model; None without settings."""
    if config is None:
        return None
    return LungView(config, model, Predictor(model, device).segment if model is not None else None)


def called_class(probs: Mapping[str, float], operating_point: tuple[str, float] | None) -> str:
    """The class to call: the most probable one, unless an operating point decides about one class.

    At an operating point its class is called when its probability reaches the threshold, else the most probable
    other one.
    """
    if operating_point is None:
        return max(probs, key=lambda name: probs[name])
    target, threshold = operating_point
    if probs[target] >= threshold:
        return target
    return max((name for name in probs if name != target), key=lambda name: probs[name])


def measure_volumes(mask: Volume, labels: Mapping[str, int]) -> dict[str, float]:
    """Volume of each label in ml: its voxels times the volume of one."""
    return {name: float((mask.array == value).sum()) * mask.voxel_ml for name, value in labels.items()}


def _warnings(scan: Scan) -> Sequence[Finding]:
    return [finding for finding in scan.findings if finding.severity != "info"]
