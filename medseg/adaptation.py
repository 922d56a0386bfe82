"""`medseg models adapt`: a classifier's batch-norm statistics from a new site's images, without labels."""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import check_target, with_weights
from medseg.cohort import Case, Cohort, read_cohort
from medseg.data.lung_view import LungView
from medseg.data.preprocess import prepare
from medseg.files import UserError
from medseg.images import read_image
from medseg.models.batch_norm import Reestimated, batch_norms, reestimate
from medseg.models.ensemble import Ensemble
from medseg.plan import Plan
from medseg.predict import load_network, view_of
from medseg.progress import progress
from medseg.result import Result
from medseg.runs import create_run
from medseg.tracking import track
from medseg.volume import Volume

MOST_CASES = 500
"""More cases are thinned evenly: means and variances of thousands of pixels an image gain nothing from them."""

_BATCH = 16


def run(model: str, cohort_dir: Path, workspace: Path, *, split: str | None = None, out: Path | None = None) -> Result:
    """Re-estimate the batch norms of a classifier on the images of a cohort, as a run of its own with a bundle of its
    own. No label is read; the weights stay.

    The new bundle has no verdict: a threshold and its sensitivity hold for the scores that they were fitted on.

    Args:
        split: only these cases of the cohort; by default all.
        out: folder of the new bundle; by default `runs/<id>/bundle`.

    Raises:
        UserError: the model is no classifier or has no batch norm; the cohort is the one it was trained on, has other
            channels, fewer than two cases or images of several sizes; `out` exists and is no bundle.
    """
    if out is not None:
        check_target(out)
    bundle, cohort = load_bundle(model, workspace), read_cohort(cohort_dir)
    nets = _networks(bundle)
    cases = _cases(bundle, cohort, split)
    batches = load_batches(bundle.plan, cohort, cases, next(nets[0].parameters()).device, view_of(bundle))
    found = [reestimate(net, batches) for net in nets]
    config = bundle.config
    facts = {"step": "adapt", "seed": config.seed, "cohort_sha256": cohort.sha256, "bundle_sha256": bundle.sha256}
    folder = create_run(workspace, f"adapt-{config.name}", None, **facts)
    adapted = {
        "cohort_sha256": cohort.sha256,
        "split": split or "",
        "cases": len(cases),
        "sites": sorted({case.site for case in cases}),
        "trained_sites": bundle.trained_sites,
        **_figures(found),
    }
    with track(folder, config.tracking, tags={"medseg.step": "adapt"}) as tracker:
        tracker.log_params({"split": split or "", "cases": len(cases)})
        tracker.log_cohort(cohort, "adapt")
        states = [net.state_dict() for net in nets]
        made = with_weights(bundle, out or folder.path / "bundle", states, adapted, run_id=folder.id)
        version = tracker.log_bundle(made, config.tracking.register_as)
    figures: dict[str, object] = {"cases": len(cases), **_figures(found)}
    if version is not None:
        figures["model"] = version.uri
    text = (
        f"{figures['layers']} batch norms re-estimated on {len(cases)} images; no label was read. The new model has no "
        f"verdict: run `medseg models calibrate {folder.id} --cohort DIR` with labelled cases of that site."
    )
    paths = {"bundle": made, "run": folder.path}
    return Result("models", "done", paths, figures, folder.id, text=text).write(folder.path)


def load_batches(
    plan: Plan,
    cohort: Cohort,
    cases: Sequence[Case],
    device: torch.device | None = None,
    lungs: LungView | None = None,
) -> list[Tensor]:
    """The prepared images of the cases in about equal batches of at most 16, none of a single image.

    Args:
        lungs: what the network sees of a radiograph; by default all.

    Raises:
        UserError: fewer than two cases, images of several sizes, or one that is missing or damaged.
    """
    if len(cases) < 2:
        raise UserError(f"{cohort.folder} has {len(cases)} cases to adapt to; take two or more.")

    def ready(case: Case) -> NDArray[np.float32]:
        channels: Sequence[Volume] = [read_image(path) for path in cohort.image_paths(case)]
        return prepare(lungs.show(channels, cohort.label_path(case)) if lungs is not None else channels, plan).image

    images = []
    with ThreadPoolExecutor(2) as pool, progress("Preparing cases", len(cases)) as shown:
        for image in pool.map(ready, cases):
            images.append(image)
            shown.advance()
    if len(shapes := {image.shape for image in images}) > 1:
        raise UserError(f"{cohort.folder}: the images come in {len(shapes)} sizes; adapt a model with plan.size_px.")
    parts = np.array_split(np.arange(len(images)), -(-len(images) // _BATCH))
    return [torch.from_numpy(np.stack([images[index] for index in part])).to(device) for part in parts]


def _networks(bundle: Bundle) -> list[nn.Module]:
    """The bundle's network, or that of each joined fold."""
    if bundle.config.task.kind != "classification":
        raise UserError(f"model {bundle.name!r} is no classifier; models adapt is made for these.")
    net = load_network(bundle)
    nets = list(net.members) if isinstance(net, Ensemble) else [net]
    if not batch_norms(nets[0]):
        raise UserError(
            f"model {bundle.name!r} is a {bundle.config.model.variant} without batch norm, so there is nothing to "
            "adapt; use `medseg models calibrate` with labelled cases."
        )
    return [copy.deepcopy(one) for one in nets]


def _cases(bundle: Bundle, cohort: Cohort, split: str | None) -> list[Case]:
    if tuple(cohort.channels) != bundle.config.task.channels:
        names = ", ".join(bundle.config.task.channels)
        raise UserError(f"{cohort.folder} has the channels {', '.join(cohort.channels)}, the model takes {names}.")
    if cohort.sha256 == bundle.facts["cohort_sha256"] and split != "test":
        raise UserError(
            f"{cohort.folder}: model {bundle.name!r} was trained on it; name a cohort of another site, or --split test."
        )
    cases = cohort.split(split) if split else cohort.cases
    if len(cases) <= MOST_CASES:
        return list(cases)
    return [cases[place] for place in np.linspace(0, len(cases) - 1, MOST_CASES).round().astype(int)]


def _figures(found: Sequence[Reestimated]) -> dict[str, float]:
    return {
        "layers": sum(one.layers for one in found),
        "passes": max(one.passes for one in found),
        "last_change": round(max(one.last_change for one in found), 6),
    }
