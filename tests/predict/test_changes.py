"""A known atrophy of a simulated patient comes out of the batch as the change that it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import Threshold, bundle, plan

from medseg.cohort import Case, Cohort, write_cohort
from medseg.data.simulate import apply_parameters, draw_parameters, load_anatomy
from medseg.files import read_json
from medseg.images import write_nifti
from medseg.predict import Predictor, step
from medseg.volume import Volume

WIDENED_MM = {0: 0.0, 370: 2.0, 735: 4.0}  # by day


@pytest.mark.slow
def test_the_reported_change_is_the_one_that_was_made(tmp_path: Path) -> None:
    """The scans show the fluid alone, bright, so that the mask is right; each lies in another pose and on another
    oblique grid. The truth is measured on the patient in one pose, on one upright grid."""
    anatomy, patient = load_anatomy(4.0), draw_parameters(3, 1)
    true_ml, cases = [], []
    for n, (day, widened_mm) in enumerate(WIDENED_MM.items()):
        still = replace(patient, ventricle_mm=widened_mm, head_rotation_deg=(0.0,) * 3, scan_rotation_deg=(0.0,) * 3)
        upright = apply_parameters(anatomy, still)
        true_ml.append(float((upright.label == 1).sum()) * Volume(upright.label, upright.affine).voxel_ml)
        turned = replace(still, head_rotation_deg=(3.0 * n, -4.0 * n, 5.0), scan_rotation_deg=(6.0, 2.0 * n, -3.0 * n),
                         head_translation_mm=(2.5 * n, -1.0, 3.0 * n))  # fmt: skip
        posed = apply_parameters(anatomy, turned)
        shown = np.where(posed.label == 1, 100, np.indices(posed.label.shape).sum(0) % 17).astype(np.int16)
        write_nifti(tmp_path / "cohort" / "images" / f"e{n}.nii.gz", Volume(shown, posed.affine))
        cases.append(Case(f"e{n}", "p", (f"images/e{n}.nii.gz",), exam_day=day, source_kind="nifti"))
    cohort = write_cohort(Cohort(tmp_path / "cohort", tuple(cases), {"thing": 1}), [], {"simulated": True})
    model = bundle(tmp_path / "b", grid=plan(spacing_mm=(4.0, 4.0, 4.0), patch_size=(32, 32, 32)))
    step.run(model, cohort, tmp_path / "out", predictor=Predictor(model, net=Threshold()))
    (told,) = read_json(tmp_path / "out" / "changes.json")["patients"]
    change = told["structures"]["thing"]
    assert change["volumes_ml"] == pytest.approx(true_ml, rel=0.04), "voxels of 4 mm cut thin fluid otherwise"
    slope = np.polyfit(np.array(list(WIDENED_MM)) / 365.25, true_ml, 1)[0]
    assert change["per_year_ml"] > 0
    assert change["per_year_ml"] == pytest.approx(slope, rel=0.15)
    assert change["difference_percent"] == pytest.approx(100 * (true_ml[-1] / true_ml[0] - 1), rel=0.15)
