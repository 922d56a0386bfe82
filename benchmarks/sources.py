"""What training does about the source of radiographs: trained at one site, tested at another, one option at a time.

    python -m benchmarks.sources CONFIG --cohort DIR --train SITE --test SITE [--options …] [--option NAME A.B=C …]
        [--pretrained EPOCHS] [--seeds 0 1 2] [--set A.B=C]

Each option is a few overrides of CONFIG (a name of the table, or one's own by `--option`), trained once per seed as a
run under --work (a run that is there already is not made again, and one that was stopped goes on). `--pretrained` adds
CONFIG from the weights of as many epochs of masked modelling, of the same seed, on the images that train it and no
others. Every network is scored twice at the other site: as trained, and adapted as `medseg models adapt` does to all
images of that site, without labels. Specificity is at the highest threshold that finds 90 % of the positive cases of
that site; intervals are from a bootstrap over patients. Home is a quarter of the training site's cases, on which no
choice was made.
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.adaptation import load_batches
from medseg.bundle import Bundle, load_bundle
from medseg.cohort import Cohort, read_cohort
from medseg.config import Config, load_config
from medseg.evaluate.scoring import Scorer
from medseg.models.batch_norm import batch_norms, reestimate
from medseg.predict import load_network, view_of
from medseg.result import Result
from medseg.road.learning import lungs_for
from medseg.runs import create_run, find_run
from medseg.splits import assign_splits
from medseg.statistics import Estimate, aucs, bootstrap_rows
from medseg.tracking import track
from medseg.train import pretrain, step
from medseg.train.cohort_check import check_cohort
from medseg.train.planning import make_plan
from medseg.verdict import margins

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "crop": ("plan.appearance.crop_padding=true",),
    "percentile": ("plan.appearance.histogram=percentile",),
    "landmarks": ("plan.appearance.histogram=landmarks",),
    "clahe": ("plan.appearance.histogram=clahe",),
    "sharpness": ("plan.appearance.match_sharpness=true",),
    "crop+landmarks+sharpness": (
        "plan.appearance={crop_padding: true, histogram: landmarks, match_sharpness: true}",
    ),
    "gamma": ("augment={gamma: 0.5, contrast: 0.4, brightness: 0.3}",),
    "amplitude": ("augment.style.amplitude_mix=1",),
    "convolution": ("augment.style.random_convolution=1",),
    "resolution": ("augment.style={resolution: 0.6, sharpness: 0.6}",),
    "style": ("augment.style={amplitude_mix: 1, random_convolution: 0.5, resolution: 0.6, sharpness: 0.6}",),
    "adversary": ("train.site_adversary=0.1",),
    "all": (
        "plan.appearance={crop_padding: true, histogram: landmarks, match_sharpness: true}",
        "augment.style={amplitude_mix: 1, random_convolution: 0.5, resolution: 0.6, sharpness: 0.6}",
    ),
}  # fmt: skip
"""Overrides by name. `adversary` needs two sites among the training cases: give --train several."""

_PRETRAINED = "pretrained"
_SENSITIVITY = 0.9


@dataclass(frozen=True)
class Row:
    """One network, as trained or adapted, at the other site."""

    option: str
    seed: int
    home: float
    auc: Estimate
    specificity: Estimate


def main() -> None:
    """Train what is missing; print a row per network and the means over the seeds, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--train", nargs="+", required=True, metavar="SITE")
    parser.add_argument("--test", required=True, metavar="SITE")
    parser.add_argument("--options", nargs="+", default=[], choices=list(OPTIONS))
    parser.add_argument("--option", dest="own", nargs="+", action="append", default=[], metavar=("NAME", "A.B=C"))
    parser.add_argument("--pretrained", type=int, metavar="EPOCHS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--work", type=Path, default=Path("workspace"))
    args = parser.parse_args()
    named = args.options or ([] if args.own or args.pretrained else ["plain"])
    options = {name: OPTIONS[name] for name in named} | {name: tuple(sets) for name, *sets in args.own}
    options |= {_PRETRAINED: ()} if args.pretrained else {}
    cohort = elsewhere(read_cohort(args.cohort), args.train, args.test)
    print("| option | seed | AUC at home | AUC elsewhere (95 %) | specificity at 90 % sensitivity (95 %) |")
    print("|---|---|---|---|---|", flush=True)
    rows: list[Row] = []
    for seed in args.seeds:
        for option, sets in options.items():
            sets = [*args.sets, *sets, f"seed={seed}"]
            if option == _PRETRAINED:
                first = load_config(args.config, [*sets, f"train.epochs={args.pretrained}"])
                sets.append(f"model.weights={pretrained(first, cohort, args.work)}")
            config = load_config(args.config, sets)
            for row in score(trained(config, cohort, option, args.work), cohort, option, seed):
                rows.append(row)
                print(f"| {row.option} | {seed} | {row.home:.3f} | {_shown(row.auc)} | {_shown(row.specificity)} |",
                      flush=True)  # fmt: skip
    print(means(rows))


def elsewhere(cohort: Cohort, train: Sequence[str], test: str) -> Cohort:
    """Three quarters of the training sites' cases to learn from, a quarter as `val`; the other site is `test`."""
    home = assign_splits(
        [replace(case, split="") for case in cohort.cases if case.site in train], val=0.25, test=0.0, seed=0
    )
    away = [replace(case, split="test") for case in cohort.cases if case.site == test]
    digest = hashlib.sha256(f"{cohort.sha256} {sorted(train)} {test}".encode()).hexdigest()
    return replace(cohort, cases=(*home, *away), sha256=digest)


def pretrained(config: Config, cohort: Cohort, work: Path) -> Path:
    """The weights of an encoder that learnt from the training images without labels, made now where there are none."""
    run_id = _run_id(config, cohort, "pretrain")
    weights = work / "runs" / run_id / pretrain.WEIGHTS
    if not weights.is_file():
        _run(pretrain.run, config, cohort, work, run_id, "pretrain")
    return weights


def trained(config: Config, cohort: Cohort, option: str, work: Path) -> Bundle:
    """The model of a config, from the run that trained it before or from one made now."""
    run_id = _run_id(config, cohort, option)
    if not (work / "runs" / run_id / "bundle" / "bundle.json").is_file():
        check_cohort(config, cohort)
        _run(step.run, config, cohort, work, run_id, "train")
    return load_bundle(run_id, work)


def _run_id(config: Config, cohort: Cohort, name: str) -> str:
    digest = hashlib.sha256(f"{cohort.sha256} {config}".encode()).hexdigest()[:8]
    return f"sources-{name.replace('+', '-')}-{config.seed}-{digest}"


def _run(do: Callable[..., Result], config: Config, cohort: Cohort, work: Path, run_id: str, what: str) -> None:
    """A step that makes a plan's network learn, as a run of its own; one that was stopped goes on."""
    begun = (work / "runs" / run_id / "run.json").is_file()
    facts = {"step": what, "seed": config.seed, "cohort_sha256": cohort.sha256}
    folder = find_run(work, run_id) if begun else create_run(work, "sources", run_id, **facts)
    saved = any((folder.path / "checkpoints").glob("step_*.pt"))
    with track(folder, config.tracking, tags={"medseg.step": what}, resume=begun) as tracker:
        lungs = lungs_for(config, folder)
        do(config, cohort, make_plan(config, cohort, lungs), folder, tracker, resume=saved, lungs=lungs)


def score(bundle: Bundle, cohort: Cohort, option: str, seed: int) -> list[Row]:
    """The network as trained, then adapted to the other site."""
    net = load_network(bundle)
    view = view_of(bundle)
    scorer = Scorer(net, bundle.plan, view, bundle.config.predict.mirror_axes)
    rows = [_row(scorer, bundle, cohort, option, seed)]
    if batch_norms(net):
        reestimate(net, load_batches(bundle.plan, cohort, cohort.split("test"), scorer.device, view))
        rows.append(_row(scorer, bundle, cohort, f"{option}, adapted", seed))
    return rows


def specificities(
    truth: NDArray[np.bool_], scores: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Specificity at the highest threshold with a sensitivity of 0.9, for each row of weights (draws, n)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits = np.cumsum(weights[:, order] * truth[order], axis=1)[:, ends]
    alarms = np.cumsum(weights[:, order] * ~truth[order], axis=1)[:, ends]
    place = np.argmax(hits >= _SENSITIVITY * hits[:, -1:] - 1e-9, axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(1 - alarms[np.arange(len(alarms)), place] / alarms[:, -1])


def means(rows: Sequence[Row]) -> str:
    """Means over the seeds with their range, and in how many seeds an option did better than the first one."""
    lines = ["", "| option | AUC elsewhere: mean (range) | specificity: mean (range) | seeds better than the first |"]
    lines.append("|---|---|---|---|")
    first = {row.seed: row.auc.value for row in reversed(rows) if row.option == rows[0].option}
    for option in dict.fromkeys(row.option for row in rows):
        mine = [row for row in rows if row.option == option]
        areas, specific = [row.auc.value for row in mine], [row.specificity.value for row in mine]
        better = sum(row.auc.value > first[row.seed] for row in mine)
        lines.append(f"| {option} | {_range(areas)} | {_range(specific)} | {better} of {len(mine)} |")
    return "\n".join(lines)


def _row(scorer: Scorer, bundle: Bundle, cohort: Cohort, option: str, seed: int) -> Row:
    areas = []
    for split in ("val", "test"):
        cases = [case for case in cohort.split(split) if case.target in bundle.labels]
        truth = np.array([bundle.labels[case.target] == 1 for case in cases])
        scores = margins(scorer.score(cohort, cases), 1)
        patients = [case.patient_id for case in cases]
        areas.append(bootstrap_rows(lambda w, t=truth, s=scores: aucs(t, s, w), patients))  # type: ignore[misc]
    specificity = bootstrap_rows(lambda w: specificities(truth, scores, w), patients)
    return Row(option, seed, areas[0].value, areas[1], specificity)


def _shown(found: Estimate) -> str:
    return f"{found.value:.3f} ({found.ci_low:.3f} to {found.ci_high:.3f})"


def _range(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
