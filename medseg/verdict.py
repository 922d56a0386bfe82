"""What turns a classifier's logits into a verdict: calibration, operating point, and what is known about both.

It travels in the bundle as `verdict.json`, so that score, threshold and version cannot be parted. How it is fitted is
in `medseg.evaluate.calibrate`; this module only applies it.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.files import UserError, dump_json, plain, read_json, write_json

SCHEMA_VERSION = 1
Method = Literal["temperature", "platt", "isotonic"]
METHODS: tuple[Method, ...] = ("temperature", "platt", "isotonic")
Call = Literal["refer", "do not refer", "not assessable"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """A calibration with its operating point.

    Attributes:
        positive: the class to refer.
        method: how margins become probabilities: `sigmoid(scale * margin + shift)`, where temperature scaling has
            shift 0 and scale 1 / T, or linear interpolation between `knots` (margin, probability).
        threshold: the probability from which on a case is referred.
        withhold: findings that leave a case not assessable.
        point: sensitivity and specificity at the threshold, each `{value, ci_low, ci_high, n}`; the wanted
            sensitivity; prevalence, referral rate and predictive values.
        quality: calibration error, Brier score, negative log-likelihood before and after, and the AUC.
        subgroups: rows of `{factor, group, n, n_positive, sensitivity, specificity, auc}`.
        fitted: on what: cohort, split, cases, and the bundle it replaces, if any.
        positives: margins of the positive cases that calibrated the model first, as at most 100 even quantiles; they
            tell how such cases spread. Empty for verdicts that are older.
    """

    positive: str
    method: Method
    threshold: float
    scale: float = 1.0
    shift: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()
    withhold: tuple[str, ...] = ()
    point: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    subgroups: tuple[Mapping[str, Any], ...] = ()
    fitted: Mapping[str, Any] = field(default_factory=dict)
    positives: tuple[float, ...] = ()

    @property
    def id(self) -> str:
        """Names what decides: class, mapping, threshold and withheld findings. Twelve hexadecimal digits."""
        deciding = [self.positive, self.method, self.scale, self.shift, self.knots, self.threshold, self.withhold]
        return hashlib.sha256(dump_json(plain(deciding)).encode()).hexdigest()[:12]

    def probability(self, margin: ArrayLike) -> Array:
        """Calibrated probability of the positive class, (n,) in [0, 1], from margins (n,)."""
        z = np.asarray(margin, dtype=np.float64)
        if self.method == "isotonic":
            at, value = np.array(self.knots, dtype=np.float64).T
            return np.asarray(np.interp(z, at, value))
        return sigmoid(self.scale * z + self.shift)

    def probabilities(self, logits: Mapping[str, float]) -> dict[str, float]:
        """Probability of every class from its logit: the positive class is calibrated, the others share the rest."""
        names = list(logits)
        row = np.array([logits[name] for name in names], dtype=np.float64)
        at = names.index(self.positive)
        p = float(self.probability(margins(row[None], at))[0])
        others = np.delete(row, at)
        rest = np.exp(others - others.max())
        shares = iter((1 - p) * rest / rest.sum())
        return {name: p if name == self.positive else float(next(shares)) for name in names}

    def call(self, probability: float, findings: Collection[str] = ()) -> Call:
        """Refer or not; not assessable when a finding is withheld."""
        if any(code in self.withhold for code in findings):
            return "not assessable"
        return "refer" if probability >= self.threshold else "do not refer"

    def as_result(self, probability: float | None, findings: Collection[str] = ()) -> dict[str, Any]:
        """What `result.json` says of one case; `probability` is None for a scan that could not be used.

        `withheld_for` names the findings that leave it not assessable.
        """
        call: Call = "not assessable" if probability is None else self.call(probability, findings)
        assessed = call != "not assessable"
        return {
            "call": call,
            "positive": self.positive,
            "probability": probability if assessed else None,
            "score": round(100 * probability) if assessed and probability is not None else None,
            "threshold": self.threshold,
            "sensitivity": self.point.get("sensitivity"),
            "specificity": self.point.get("specificity"),
            "calibration": self.id,
            "withheld_for": sorted(code for code in findings if code in self.withhold),
        }


def margins(logits_NK: ArrayLike, positive: int) -> Array:
    """(n,) log odds of one class against all others: its logit less the log of the summed exponentials of the rest."""
    logits = np.asarray(logits_NK, dtype=np.float64)
    others = np.delete(logits, positive, axis=1)
    top = others.max(axis=1)
    return np.asarray(logits[:, positive] - top - np.log(np.exp(others - top[:, None]).sum(axis=1)))


def sigmoid(z: ArrayLike) -> Array:
    """1 / (1 + exp(-z)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(z, dtype=np.float64))))


def write_verdict(path: Path, verdict: Verdict) -> Path:
    """Write as JSON, atomically."""
    return write_json(path, {"schema_version": SCHEMA_VERSION, "id": verdict.id, **asdict(verdict)})


def read_verdict(path: Path) -> Verdict:
    """Read `verdict.json`. Raises UserError naming the file and what does not fit."""
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path} is not of schema version {SCHEMA_VERSION}; calibrate the model again.")
    try:
        verdict = Verdict(
            **{name: tree[name] for name in ("positive", "method", "point", "quality", "fitted")},
            threshold=float(tree["threshold"]),
            scale=float(tree["scale"]),
            shift=float(tree["shift"]),
            knots=tuple((float(at), float(value)) for at, value in tree["knots"]),
            withhold=tuple(tree["withhold"]),
            subgroups=tuple(tree["subgroups"]),
            positives=tuple(float(margin) for margin in tree.get("positives", ())),
        )
        _check(verdict)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no verdict ({error}); calibrate the model again.") from error
    return verdict


def _check(verdict: Verdict) -> None:
    if verdict.method not in METHODS or not 0 <= verdict.threshold <= 1:
        raise ValueError(f"method {verdict.method!r} or threshold {verdict.threshold!r} is not allowed")
    if verdict.method == "isotonic" and len(verdict.knots) < 2:
        raise ValueError("isotonic calibration without knots")
    numbers = (verdict.scale, verdict.shift, *verdict.positives, *(number for knot in verdict.knots for number in knot))
    if not all(math.isfinite(number) for number in numbers) or verdict.scale <= 0:
        raise ValueError("a parameter is not finite, or the scale is not positive")
