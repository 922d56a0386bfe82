"""Explanation methods, measured.

python -m benchmarks.explain BUNDLE --cohort DIR [--lesions DIR] [--methods …] [--layers …] [--cases N]
    ranks methods and layers by their checks over the cases of a split, and prints the table.
python -m benchmarks.explain BUNDLE --cohort DIR --time
    seconds of one case: verdict, map, each check.
python -m benchmarks.explain --against FOLDER
    largest difference to the packages `grad-cam`, `torchcam` and `torchvision`, unpacked in FOLDER (they need no
    installation: `pip install --no-deps --target FOLDER grad-cam torchcam ttach torchvision opencv-python-headless`).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.bundle import Bundle, load_bundle
from medseg.cohort import Case, Cohort, read_cohort
from medseg.config import ExplainChecksConfig, MethodConfig
from medseg.data.imputation import impute
from medseg.data.preprocess import Prepared, prepare
from medseg.explain import EXPLAINERS, explain, explain_score
from medseg.explain.eigencam import eigencam
from medseg.explain.fullgrad import full_gradients
from medseg.explain.gradients import activation_and_gradient
from medseg.explain.hooks import first_output, frozen, logits_and_layer
from medseg.explain.passmark import CHECKS, Explained, measure
from medseg.explain.perturb import Probe
from medseg.explain.ranking import Candidate, candidates_of, measure_candidate, rank_methods
from medseg.explain.targets import make_score
from medseg.explain.window import choose_window, cut
from medseg.images import read_image
from medseg.predict import load_network, view_of
from medseg.volume import Volume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--cohort", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--target", help="class to explain; by default the case's own, or the first label")
    parser.add_argument("--lesions", type=Path, help="folder of <case_id>.png masks; only cases that have one count")
    parser.add_argument("--methods", nargs="+", default=list(EXPLAINERS), choices=list(EXPLAINERS))
    parser.add_argument("--layers", nargs="+", default=["last"])
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    if arguments.against:
        print_agreement(arguments.against)
        return
    bundle, cohort = load_bundle(arguments.bundle), read_cohort(arguments.cohort)
    net = load_network(bundle)
    off = dict.fromkeys(set(CHECKS) - set(arguments.checks))
    checks = ExplainChecksConfig(**{**bundle.config.explain.checks.model_dump(), **off, "dilate_px": 0})  # type: ignore[arg-type]
    cases = probes(bundle, net, cohort, arguments.split, arguments.target, arguments.lesions)
    if arguments.time:
        print_time(bundle, *next(iter(cases))[:2], checks)
        return
    print_ranking(bundle, cases, candidates_of(arguments.methods, arguments.layers), checks, arguments.cases)


def probes(
    bundle: Bundle, net: nn.Module, cohort: Cohort, split: str, target: str | None, lesions: Path | None
) -> Iterator[tuple[Probe, Case, np.ndarray | None]]:
    """One probe per usable case of the split, with the mask of its lesion on the network's grid if there is one."""
    view = view_of(bundle)
    for case in cohort.split(split):
        lesion = lesions / f"{case.case_id}.png" if lesions else None
        if lesion is not None and not lesion.is_file():
            continue
        channels = [read_image(path) for path in cohort.image_paths(case)]
        mask_path = lesion or (cohort.folder / case.label if case.label else None)
        mask = read_image(mask_path).array.astype(np.uint8) if mask_path else None
        if lesion is not None and mask is not None and not mask.any():
            continue
        seen = view.show(channels, cohort.label_path(case)) if view is not None else channels
        prepared = prepare(seen, bundle.plan, None if mask is None else Volume(mask, channels[0].affine))
        name = target or case.target or next(iter(bundle.labels))
        yield _probe(bundle, net, prepared, bundle.labels[name]), case, _mask_of(bundle, prepared, bundle.labels[name])


def _window(bundle: Bundle, prepared: Prepared, value: int) -> Any:
    patch = bundle.plan.patch_size
    return choose_window(prepared.label == value, patch, bundle.plan.batch_size * int(np.prod(patch)))  # type: ignore[arg-type]


def _probe(bundle: Bundle, net: nn.Module, prepared: Prepared, value: int) -> Probe:
    segments = bundle.config.task.kind == "segmentation"
    image, region = prepared.image, None
    if segments:
        assert prepared.label is not None, "segmentation networks are measured on labelled cases"
        window = _window(bundle, prepared, value)
        image = cut(prepared.image, window)
        region = torch.from_numpy(cut((prepared.label == value)[None], window))
    x_1CDHW = torch.from_numpy(np.ascontiguousarray(image))[None]
    with frozen(net), torch.no_grad():
        logits = first_output(net(x_1CDHW))
    return Probe(net, x_1CDHW, make_score(logits, value, region))


def _mask_of(bundle: Bundle, prepared: Prepared, value: int) -> np.ndarray | None:
    if prepared.label is None:
        return None
    if bundle.config.task.kind == "segmentation":
        return cut((prepared.label == value)[None], _window(bundle, prepared, value))[0]
    return np.asarray(prepared.label) > 0


def print_ranking(
    bundle: Bundle,
    cases: Iterator[tuple[Probe, Case, np.ndarray | None]],
    candidates: Sequence[Candidate],
    checks: ExplainChecksConfig,
    count: int,
) -> None:
    """The table of `rank_methods`, best first."""
    measured: dict[Candidate, list[dict[str, float | None]]] = {candidate: [] for candidate in candidates}
    seconds = dict.fromkeys(candidates, 0.0)
    shares = []
    for probe, case, mask in cases:
        if len(shares) == count:
            break
        shares.append(float(mask.mean()) if mask is not None else np.nan)
        for candidate in candidates:
            started = time.perf_counter()
            resolved = (candidate[0], _resolve(probe, candidate[1]))
            measured[candidate].append(measure_candidate(probe, resolved, checks, MethodConfig(), mask))
            seconds[candidate] += time.perf_counter() - started
        print(f"{len(shares)}: {case.case_id}", file=sys.stderr, flush=True)
    ranked = rank_methods(measured)
    names = list(dict.fromkeys(name for one in ranked for name in one.means))
    print(f"{bundle.name}, {len(shares)} cases; the mask is {np.nanmean(shares):.3f} of the image on average\n")
    print(f"| method | layer | score (95 % interval) | {' | '.join(names)} | s per case |")
    print("|---|---|---|" + "---|" * (len(names) + 1))
    for one in ranked:
        cells = [f"{one.means[name]:.3f}" if name in one.means else "none" for name in names]
        score = f"{one.score:.2f} ({one.ci_low:.2f} to {one.ci_high:.2f})"
        each = seconds[one.method, one.layer] / one.n
        print(f"| {one.method} | {one.layer} | {score} | {' | '.join(cells)} | {each:.2f} |")


def _resolve(probe: Probe, layer: str) -> str:
    if layer == "input":
        return layer
    with frozen(probe.net):
        return logits_and_layer(probe.net, probe.x_1CDHW, layer)[1]


def print_time(bundle: Bundle, probe: Probe, case: Case, checks: ExplainChecksConfig) -> None:
    """Seconds of each part for one image; the first pass, which warms up, is not counted."""
    config, x = bundle.config.explain, probe.x_1CDHW
    layer = _resolve(probe, config.layer)
    parts: dict[str, Callable[[], Any]] = {
        "verdict": lambda: probe.probabilities([x[0]]),
        f"map ({config.method})": lambda: explain_score(probe.net, x, probe.score, config.method, layer, size="layer"),
    }
    found = explain_score(probe.net, x, probe.score, config.method, layer, size="layer")
    explained = Explained(probe, config.method, layer, found, np.ones(x.shape[2:], bool))
    for name in CHECKS:
        if getattr(checks, name) is not None:
            only = checks.model_copy(update=dict.fromkeys(set(CHECKS) - {name}))
            parts[name] = lambda only=only: measure(explained, only)  # type: ignore[misc]
    both = checks.model_copy(update=dict.fromkeys(set(CHECKS) - {"deletion", "insertion"}))
    parts["deletion and insertion together"] = lambda: measure(explained, both)
    parts["all checks"] = lambda: measure(explained, checks)
    print(f"{bundle.name}, {tuple(x.shape)}, {torch.get_num_threads()} threads; seconds, median of 3")
    for name, part in parts.items():
        times = []
        for _ in range(3):
            started = time.perf_counter()
            part()
            times.append(time.perf_counter() - started)
        print(f"| {name} | {np.median(times):.2f} |", flush=True)


class _Small(nn.Module):
    """Two convolutions with batch norm, the first of the image's size; the second before global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.early = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.late, self.head = nn.ReLU(), nn.Linear(8, 3)
        for norm in (self.norm1, self.norm2):
            norm.running_mean.normal_()  # type: ignore[union-attr,operator]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
        self.head.weight.data *= 3000  # so that the other packages' epsilons do not count

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features = self.late(self.norm2(self.conv2(self.early(self.norm1(self.conv1(x_BCHW))))))
        return self.head(features.mean((2, 3)))


def print_agreement(folder: Path) -> None:
    """Largest difference of maps scaled to a maximum of 1, for a batch of three images with three classes."""
    sys.path.append(str(folder))
    asked_at_import = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        asked_at_import.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.manual_seed(0)
    net, x, targets = _Small().eval(), torch.randn(3, 1, 24, 24), [2, 0, 1]
    print("| package | method | layer | largest difference |\n|---|---|---|---|")
    for name, layer, theirs, ours in [*_grad_cam(net, x, targets), *_torchcam(net, x, targets)]:
        difference = float((_scaled(torch.as_tensor(theirs)) - _scaled(ours)).abs().max())
        print(f"| {name} | {layer} | {difference:.1e} |")
    print(f"| grad-cam | ROAD imputation without noise | image | {_imputation():.1e} |")


def _scaled(map_BHW: Tensor) -> Tensor:
    found = map_BHW.detach().relu().double()
    return found / found.flatten(1).amax(1).view(-1, 1, 1)


def _grad_cam(net: _Small, x: Tensor, targets: list[int]) -> Iterator[tuple[str, str, Any, Tensor]]:
    import pytorch_grad_cam as package
    from pytorch_grad_cam.utils.image import scale_accross_batch_and_channels
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    wanted = [ClassifierOutputTarget(target) for target in targets]
    classes = {
        "gradcam": package.GradCAM, "gradcampp": package.GradCAMPlusPlus, "hirescam": package.HiResCAM,
        "layercam": package.LayerCAM, "eigencam": package.EigenCAM, "scorecam": package.ScoreCAM,
    }  # fmt: skip
    for method, make in classes.items():
        for layer in ("early",) if method == "scorecam" else ("early", "late"):
            module = net.get_submodule(layer)
            with make(net, [module]) as cam, redirect_stderr(StringIO()):
                cam(x, wanted)
                grads = cam.activations_and_grads.gradients
                A = cam.activations_and_grads.activations[0].detach().numpy()
                g = grads[0].numpy() if grads else None
                theirs = cam.get_cam_image(x, module, wanted, A, g, False)
            name, ours = method, explain(net, x, method, targets, layer, size="layer")
            if method == "eigencam":  # theirs takes the mean of every channel away first
                centred = torch.as_tensor(A) - torch.as_tensor(A).mean((2, 3), keepdim=True)
                ours, theirs = eigencam(centred), np.stack([m * np.sign(m.flat[np.abs(m).argmax()]) for m in theirs])
                name = "eigencam of centred activations"
            yield f"grad-cam | {name}", layer, theirs, ours
    with package.FullGrad(net, []) as cam:
        theirs = cam(x, wanted)
    with frozen(net):
        parts = full_gradients(net, x, make_score(net(x), targets))
    spatial = [part.detach().abs().numpy() for part in [parts.input_BCDHW, *parts.biases] if part.ndim == 4]
    scaled = [scale_accross_batch_and_channels(part, (24, 24)).sum(1) for part in spatial]
    total = torch.as_tensor(np.sum(scaled, axis=0))
    yield (
        "grad-cam | fullgrad, each channel rescaled as theirs",
        "all",
        theirs,
        total - total.flatten(1).amin(1).view(-1, 1, 1),
    )


def _torchcam(net: _Small, x: Tensor, targets: list[int]) -> Iterator[tuple[str, str, Any, Tensor]]:
    from torchcam import methods as package

    classes = {
        "gradcam": package.GradCAM, "gradcampp": package.GradCAMpp, "layercam": package.LayerCAM,
        "scorecam": package.ScoreCAM,
    }  # fmt: skip
    for method, make in classes.items():
        for layer in ("early",) if method == "scorecam" else ("early", "late"):
            with make(net, layer, input_shape=(1, 24, 24)) as cam:
                theirs = cam(class_idx=targets, scores=net(x), normalized=False)[0]
            yield f"torchcam | {method}", layer, theirs, explain(net, x, method, targets, layer, size="layer")
            if method == "gradcampp":  # theirs divides a copy of g^2, so alpha stays g^2
                with frozen(net):
                    A, g = activation_and_gradient(net, x, make_score(net(x), targets), layer)
                undivided = ((g.relu() ** 3).sum((2, 3), keepdim=True) * A).sum(1)
                yield "torchcam | gradcampp with alpha = g^2", layer, theirs, undivided


def _imputation() -> float:
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    x, missing = torch.rand(2, 20, 23), torch.rand(20, 23) < 0.6
    theirs = NoisyLinearImputer(noise=0)(x, (~missing).float())
    ours = impute(x[None].double(), missing[None], noise=0, tolerance=1e-9, max_iterations=2000)[0]
    return float((theirs - ours).abs().max())


if __name__ == "__main__":
    main()
