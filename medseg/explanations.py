"""Which activation maps explain a classifier best: measured when it is trained, and carried in its bundle."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.bundle import Bundle, load_bundle
from medseg.bundle_writing import with_explanation
from medseg.cohort import Case, Cohort
from medseg.config import ExplainConfig
from medseg.data.lung_view import visible
from medseg.data.preprocess import Prepared, prepare
from medseg.evaluate.audit.subject import sample_cases
from medseg.evaluate.outcomes import reason_of
from medseg.explain.hooks import frozen, logits_and_layer, stage_layers
from medseg.explain.perturb import Probe
from medseg.explain.ranking import Candidate, Figures, candidates_of, describe, measure_candidate, rank_methods
from medseg.explain.targets import make_score
from medseg.files import UserError
from medseg.images import read_image
from medseg.predict import load_network, view_of
from medseg.progress import progress
from medseg.tracking import Tracker
from medseg.volume import Volume

SCHEMA_VERSION = 1


def add_ranking(bundle_dir: Path, cohort: Cohort, tracker: Tracker) -> dict[str, object]:
    """Compare the candidates of `explain.rank` on the validation split, and write the result into the bundle.

    A fold is compared on its own part, which it has not seen.

    Returns:
        `explain_method` and `explain_layer`; empty for models that are no classifiers, where nothing is explained,
        compared or checked, and where no map can be made, which is said on stderr.
    """
    bundle = load_bundle(bundle_dir)
    if bundle.config.task.kind != "classification" or not bundle.config.explain.max_cases:
        return {}
    try:
        found = compare(bundle, load_network(bundle), cohort)
    except UserError as error:
        print(f"Note: no activation maps were compared: {reason_of(error, cohort.folder.parent)}", file=sys.stderr)
        return {}
    if not found:
        return {}
    with_explanation(bundle, bundle_dir, found)
    tracker.set_tag("medseg.explained_by", "/".join(found["chosen"].values()))
    return {f"explain_{name}": value for name, value in found["chosen"].items()}


def compare(bundle: Bundle, net: nn.Module, cohort: Cohort) -> dict[str, Any]:
    """What `explanation.json` of a bundle holds: the candidates, best first, with their checks, and the one chosen.

    Where the config names a method it is the only candidate: its checks are measured, and nothing is chosen.

    Returns:
        Empty where the validation split has no case, or no case and no check is asked for.

    Raises:
        UserError: no map can be made of this network, or an image is missing or damaged.
    """
    config, train = bundle.config.explain, bundle.config.train
    most = config.rank.cases if train.fold is None else math.ceil(config.rank.cases / train.folds)
    cases = sample_cases([case for case in cohort.cases if case.split == "val" and case.target], most)
    measured = _measure(bundle, net, cohort, cases)
    if not any(found for one in measured.values() for found in one):
        return {}
    known = [case.patient_id for case in cases]
    owners = [list(dict.fromkeys(known)).index(patient) for patient in known]
    return {"split": "val", "cohort_sha256": cohort.sha256, **_settled(measured, owners, config)}


def pooled(folds: Sequence[Bundle]) -> dict[str, Any]:
    """What `explanation.json` of joined folds holds: what each network's maps measured on cases that it has not seen.

    Returns:
        Empty where a fold was not measured, or the folds not at the same methods and layers.
    """
    found = [bundle.explanation for bundle in folds]
    if not all("patients" in one for one in found):
        return {}
    by_fold = [{(row["method"], row["layer"]): row["figures"] for row in one["candidates"]} for one in found]
    if any(one.keys() != by_fold[0].keys() for one in by_fold):
        return {}
    measured = {candidate: [case for one in by_fold for case in one[candidate]] for candidate in by_fold[0]}
    numbers = [bundle.config.train.fold for bundle in folds]  # several seeds of one fold have its patients in common
    owners = [(number, owner) for number, one in zip(numbers, found, strict=True) for owner in one["patients"]]
    told = _settled(measured, [list(dict.fromkeys(owners)).index(owner) for owner in owners], folds[0].config.explain)
    return {"split": "folds", "cohort_sha256": found[0]["cohort_sha256"], **told}


def _settled(
    measured: Mapping[Candidate, Sequence[Figures]], owners: Sequence[int], config: ExplainConfig
) -> dict[str, Any]:
    """The candidates with their figures, best first, and the one chosen. `owners`: a number for each case's patient."""
    ranked = rank_methods(measured, config.checks.seed)
    rows = describe(ranked, measured, [f"{owner:09d}" for owner in owners], config.checks)
    return {
        "schema_version": SCHEMA_VERSION,
        "n": len(owners),
        "patients": list(owners),
        "chosen": {"method": ranked[0].method, "layer": ranked[0].layer},
        "candidates": [{**row, "figures": list(measured[row["method"], row["layer"]])} for row in rows],
    }


def _measure(
    bundle: Bundle, net: nn.Module, cohort: Cohort, cases: Sequence[Case]
) -> Mapping[Candidate, Sequence[Figures]]:
    config = bundle.config.explain
    measured: dict[Candidate, list[Figures]] = {}
    view = view_of(bundle)
    with progress("Comparing explanations", len(cases)) as shown:
        for case in cases:
            channels: Sequence[Volume] = [read_image(path) for path in cohort.image_paths(case)]
            fields = view.find(channels[0], cohort.label_path(case)) if view is not None else None
            if view is not None:
                channels = visible(channels, fields, view.config)
            prepared = prepare(channels, bundle.plan, fields.volume(channels[0]) if fields is not None else None)
            probe = _probe(bundle, net, prepared)
            for candidate in measured or _candidates(config, probe):
                found = measure_candidate(probe, candidate, config.checks, config.methods, prepared.label)
                measured.setdefault(candidate, []).append(found)
            shown.advance()
    return measured


def _probe(bundle: Bundle, net: nn.Module, prepared: Prepared) -> Probe:
    """The network and one image, asked about the class that a map would be made of."""
    config = bundle.config
    x_1CDHW = torch.from_numpy(prepared.image)[None].to(next(net.parameters()).device)
    with frozen(net), torch.no_grad():
        logits = net(x_1CDHW)
    target = None if config.explain.target is None else bundle.labels[config.explain.target]
    score = make_score(logits, target, exclusive=not config.task.multi_label)
    return Probe(net, x_1CDHW, score, config.explain.methods.batch_size)


def _candidates(config: ExplainConfig, probe: Probe) -> list[Candidate]:
    with frozen(probe.net):
        if config.method == "auto" and config.layer == "last":
            layers = stage_layers(probe.net, probe.x_1CDHW, config.rank.stages)
        else:
            layers = [logits_and_layer(probe.net, probe.x_1CDHW, config.layer)[1]]
    methods = config.rank.methods if config.method == "auto" else (config.method,)
    return candidates_of(methods, layers)
