"""The verdict of a classifier, and the audit that a classifier has to pass."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from medseg.config.fields import Count, Positive, Share, Strict
from medseg.config.ingest import FindingCode
from medseg.config.lungs import LungCode

OpenShare = Annotated[float, Field(gt=0, lt=1)]
AuditItem = Literal["sites", "site_named", "lungs_blacked_out", "masks", "duplicates", "borders", "subgroups"]


class VerdictConfig(Strict):
    """How a classifier's scores become a verdict: refer, do not refer, not assessable.

    `positive` is the class to refer; null takes class 1 of two, and gives no verdict with more classes. `method` maps
    scores to probabilities: `auto` takes isotonic regression from 500 cases on, temperature scaling below. The
    threshold is the highest one that reaches `target_sensitivity` on the calibration split; at a new site it is the
    one from which that is expected, where the spread of the positive cases that calibrated the model first counts as
    much as `borrowed_cases` cases of the site (0: none of it). `prevalence` is that of the people who will be
    examined, for the referral rate and the predictive values. With fewer than `min_cases` labelled cases, or fewer
    than `min_per_class` of either class, nothing is fitted. A scan with a finding named in `withhold` gets no verdict;
    those about lung fields count where the classifier sees nothing else (`lungs.mask`).
    """

    positive: str | None = None
    method: Literal["auto", "temperature", "platt", "isotonic"] = "auto"
    target_sensitivity: OpenShare = 0.9
    prevalence: OpenShare = 0.1
    borrowed_cases: Annotated[float, Field(ge=0)] = 20
    min_cases: Annotated[int, Field(ge=4)] = 20
    min_per_class: Annotated[int, Field(ge=2)] = 5
    withhold: tuple[FindingCode | LungCode, ...] = (
        "not_frontal_chest", "no_chest", "few_pixels", "few_levels", *get_args(LungCode),
    )  # fmt: skip


class AuditConfig(Strict):
    """The limits of the audit's items, and what they may cost.

    `required` lists the items that must pass before the alias `champion` moves. `decide_by`: with `interval` an item
    passes only when its whole 95 % interval keeps to the limit, and is not assessable when the value does and the
    interval does not; with `value` the value alone counts.

    `lungs` is where lung fields come from: a segmentation model (bundle folder, run id, `models:/NAME@ALIAS`) or a
    folder of masks `<case_id>.png` on the grid of the images (inside is above half of the brightest value); without,
    the items that need them are not assessable. Masks are dilated by `dilate`, a share of the image's longer side.

    Limits: `min_site_auc` at every site, also at sites left out of training; `max_site_named` is the AUC with which a
    small network may name the site; `max_blacked_out` the AUC that may be left without the lungs; `max_masked_loss`
    the AUC that may be lost outside dilated lungs; `max_twins` the share of cases with a (near-)duplicate in another
    split or of another patient; `max_border_shift` the mean change of the probability when borders or corners
    change; `max_subgroup_gap` by how much AUC a group may fall behind the others.

    The small network sees images of `probe_size` pixels for `probe_epochs` epochs in `probe_folds` folds.
    `leave_one_site_out` trains the model's own recipe once without each site, for `train_epochs` epochs (null: as the
    config says). `min_group` cases of each class make a group that is judged. At most `max_cases` cases are used.
    """

    required: tuple[AuditItem, ...] = (
        "sites", "site_named", "lungs_blacked_out", "masks", "duplicates", "borders", "subgroups",
    )  # fmt: skip
    decide_by: Literal["interval", "value"] = "interval"
    lungs: str = ""
    dilate: Annotated[float, Field(ge=0, le=0.2)] = 0.03
    min_site_auc: Share = 0.7
    max_site_named: Share = 0.75
    max_blacked_out: Share = 0.65
    max_masked_loss: Share = 0.1
    max_twins: Share = 0.0
    max_border_shift: Share = 0.1
    max_subgroup_gap: Share = 0.15
    probe_size: Annotated[int, Field(ge=32, le=256)] = 64
    probe_epochs: Count = 15
    probe_folds: Annotated[int, Field(ge=2, le=10)] = 3
    probe_learning_rate: Positive = 3e-3
    leave_one_site_out: bool = False
    train_epochs: Count | None = None
    min_group: Annotated[int, Field(ge=2)] = 10
    max_cases: Annotated[int, Field(ge=20)] = 400
