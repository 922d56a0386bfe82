import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.cohort import Case, Cohort, Finding, Reject, write_cohort
from medseg.config import ReportConfig
from medseg.explain import summary
from medseg.files import UserError, read_json, write_json, write_rows, write_text
from medseg.images import write_nifti, write_png
from medseg.report import page
from medseg.report.charts import training_curves
from medseg.report.figures import draw_overlay
from medseg.report.panels import CONFUSED, PREDICTION, REFERENCE, View, difference, rgb_of
from medseg.report.slices import PLANES, Scene, crop_to_structure, cut, focus, load_map, load_scene, structure
from medseg.report.step import run
from medseg.report.viewer import slice_viewer
from medseg.volume import Volume, to_canonical, world_of

LABELS = {"left <part>": 1, "right": 2}
NETWORK = re.compile(r"^\s*(https?:|ftp:|//)", re.IGNORECASE)
LOADING = ("src", "href", "srcset", "action", "data", "poster", "background")
VOID = {"meta", "img", "br", "input", "link", "hr"}


class PageReader(HTMLParser):
    """Reads a page: checks that tags are balanced, keeps attributes, table rows and the order of cases."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[tuple[str, str | None]]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", values.get("data-sort")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without its start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if any(tag in ("style", "script") for tag in self.open):
            return
        self.text += data
        if self.tables and self.open and self.open[-1] in ("td", "th", "a", "button") and "table" in self.open:
            text, sort = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data.strip(), sort)

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]

    def table(self, head: str) -> list[list[tuple[str, str | None]]]:
        return next(rows for rows in self.tables if head in [text for text, _ in rows[0]])


def read_page(path: Path) -> PageReader:
    reader = PageReader(path.read_text(encoding="utf-8"))
    assert_needs_no_network(reader)
    return reader


def assert_needs_no_network(reader: PageReader) -> None:
    for tag, name, value in reader.attributes:
        assert name not in LOADING or not NETWORK.match(value), f"<{tag} {name}={value[:80]}>"
    for document in reader.values("srcdoc"):
        assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", document)
    policy = next(value for value in reader.values("content") if "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in policy


def place_label(shape: tuple[int, ...]) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[4:9, 5:12, 4:9] = 1
    label[9:13, 5:12, 4:9] = 2
    return label


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def make_run(root: Path) -> Path:
    """A run on four oblique volumes: case k misses k slices of its label; case-3 failed."""
    shape, affine = (18, 20, 16), oblique(np.array([1.0, 1.5, 2.0]))
    images, cases = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32), []
    folder = root / "runs" / "r1"
    split = folder / "evaluation" / "test"
    for k in range(4):
        name = f"case-{k}"
        label = place_label(shape)
        pred = label.copy()
        pred[:, 5 : 5 + 2 * k] = 0
        image_path = write_nifti(root / "cohort" / "images" / f"{name}.nii.gz", Volume(images, affine))
        label_path = write_nifti(root / "cohort" / "labels" / f"{name}.nii.gz", Volume(label, affine))
        pred_path = write_nifti(split / "predictions" / name / "mask.nii.gz", Volume(pred, affine))
        dice = 0.987654321 - 0.1 * k
        cases.append(
            {
                "case_id": name,
                "score": dice if k < 3 else 0.0,
                "reason": "" if k < 3 else "/data/hospital/doe_john/mask.nii.gz is missing; predict it again.",
                "images": [str(image_path)],
                "label": str(label_path),
                "pred": str(pred_path),
                "explanation": None,
                "metrics": {"dice_left <part>": dice, "hd95_mm_left <part>": None} if k < 3 else {},
                "target": None,
                "predicted": None,
                "probs": {},
            }
        )
    flags = [{"code": "border", "message": "It touches the <border>."}]
    write_json(split / "predictions" / "case-2" / "result.json", {"flags": flags, "status": "flagged"})
    write_json(split / "cases.json", cases)
    estimate = {"mean": 0.8876543, "sd": 0.1, "median": 0.88, "ci_low": 0.8123456, "ci_high": 0.9345678, "n": 3}
    classes = {name: {"dice": estimate, "hd95_mm": {**estimate, "mean": None}} for name in LABELS}
    failed = [{"case_id": "case-3", "reason": "no mask"}]
    metrics = {"task": "segmentation", "split": "test", "n_cases": 4, "classes": classes, "mean_dice": 0.8876543}
    write_json(split / "metrics.json", {**metrics, "failed": failed, "surface_dice_tolerance_mm": 1.0})
    about = {
        "id": "r1",
        "name": "<script>alert(1)</script>",
        "status": "FINISHED",
        "seed": 7,
        "git": "0123456789ab-dirty",
    }
    write_json(folder / "run.json", {**about, "created": "2026-11-21T10:15:00+00:00", "cohort_sha256": "ab" * 32})
    write_text(
        folder / "config.yaml", f"task: {{kind: segmentation, labels: {json.dumps(LABELS)}}}\nmodel: {{name: unet}}\n"
    )
    history = [
        {"epoch": 1.0, "seconds": 60.0, "train_loss": 1.2, "learning_rate": 1e-3, "data_wait_share": 0.5},
        {"epoch": 2.0, "seconds": 60.0, "train_loss": 0.8, "learning_rate": 5e-4, "val_dice_right": 0.7},
    ]
    columns = list(dict.fromkeys(key for row in history for key in row))
    write_rows(folder / "history.csv", columns, [{key: row.get(key) for key in columns} for row in history])
    return folder


def oblique(spacing_mm: np.ndarray) -> np.ndarray:
    turn = np.deg2rad(8)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing_mm
    affine[:3, 3] = (-12.0, 30.0, -5.0)
    return affine


def test_run_page_says_what_how_good_and_worst_first(run_folder: Path) -> None:
    result = run(ReportConfig(max_cases=2, viewer_cases=1), run_folder)
    reader = read_page(result.paths["report"])
    cases = reader.table("Case")
    assert [row[0][0] for row in cases[1:]] == ["case-3", "case-2", "case-1", "case-0"]
    assert [value for value in reader.values("id") if value.startswith("case-")] == ["case-case-2", "case-case-1"]
    assert reader.text.count("Research use only") == 1
    assert "1 could not be measured" in reader.text
    assert "2 of 4 cases are shown" in reader.text
    assert "It touches the <border>." in reader.text
    assert "0123456789 with local changes" in reader.text
    assert "2.0 min" in reader.text
    assert "25 % of the time" in reader.text
    assert "Simulated" not in reader.text
    assert (result.figures["cases_drawn"], result.figures["viewers"]) == (2, 1)
    assert read_json(run_folder / "report" / "report.json")["figures"] == dict(result.figures)


def test_numbers_on_the_page_are_those_of_the_json(run_folder: Path) -> None:
    run(ReportConfig(max_cases=0), run_folder)
    reader = read_page(run_folder / "report" / "index.html")
    known = read_json(run_folder / "evaluation" / "test" / "metrics.json")["classes"]
    classes = reader.table("Class")
    assert [text for text, _ in classes[0]] == ["Class", "Dice", "HD95 (mm)", "Cases"]
    for row, (label, figures) in zip(classes[1:], known.items(), strict=True):
        assert row[0][0] == label
        assert row[1][0] == "0.888"
        assert float(row[1][1] or "nan") == figures["dice"]["mean"]
        assert row[2] == ("–", None)
    assert "0.812 to 0.935" in reader.text
    scores = {case["case_id"]: case["score"] for case in read_json(run_folder / "evaluation" / "test" / "cases.json")}
    for row in reader.table("Case")[1:]:
        assert float(row[1][1] or "nan") == scores[row[0][0]]


def test_text_is_escaped_and_no_folder_is_told(run_folder: Path) -> None:
    run(ReportConfig(max_cases=1, viewer_cases=0), run_folder)
    text = (run_folder / "report" / "index.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "doe_john" not in text
    assert "mask.nii.gz is missing" in text
    assert str(run_folder.parent) not in text


def test_overlays_are_the_worst_cases_only(run_folder: Path) -> None:
    overlays = run_folder / "evaluation" / "test" / "overlays"
    run(ReportConfig(max_cases=2, viewer_cases=0), run_folder)
    assert {path.name for path in overlays.glob("*.png")} == {"case-1.png", "case-2.png"}
    run(ReportConfig(max_cases=1, viewer_cases=0), run_folder)
    assert {path.name for path in overlays.glob("*.png")} == {"case-2.png"}
    assert (overlays / "case-2.png").read_bytes().startswith(b"\x89PNG")


def test_one_damaged_image_costs_one_picture(run_folder: Path) -> None:
    case = read_json(run_folder / "evaluation" / "test" / "cases.json")[2]
    Path(case["images"][0]).write_bytes(b"no image")
    result = run(ReportConfig(max_cases=3, viewer_cases=0), run_folder)
    reader = read_page(result.paths["report"])
    assert result.figures["cases_drawn"] == 2
    assert "Could not be drawn: case-2.nii.gz cannot be read as an image" in reader.text


def test_simulated_cohort_is_said(run_folder: Path) -> None:
    image = Path(read_json(run_folder / "evaluation" / "test" / "cases.json")[0]["images"][0])
    write_json(image.parent.parent / "cohort.json", {"provenance": {"simulated": True}})
    run(ReportConfig(max_cases=0), run_folder)
    assert "Simulated subjects." in read_page(run_folder / "report" / "index.html").text


def test_run_without_evaluation_or_with_failure(tmp_path: Path) -> None:
    write_json(
        tmp_path / "run.json", {"id": "r2", "name": "r2", "status": "FAILED", "failure": "out of memory in /a/b/c"}
    )
    reader = read_page(run(ReportConfig(), tmp_path).paths["report"])
    assert "has not been evaluated yet" in reader.text
    assert "This run did not finish. out of memory in c" in " ".join(reader.text.split())
    write_json(tmp_path / "evaluation" / "val" / "metrics.json", {"task": "segmentation", "classes": {}, "n_cases": 0})
    write_json(tmp_path / "evaluation" / "val" / "cases.json", [])
    reader = read_page(run(ReportConfig(), tmp_path).paths["report"])
    assert "No case was evaluated." in reader.text


def test_long_lists_are_cut_and_the_page_says_so(run_folder: Path) -> None:
    path = run_folder / "evaluation" / "test" / "cases.json"
    first = read_json(path)[0]
    write_json(path, [{**first, "case_id": f"c{n:04d}", "score": n / 2000} for n in range(1200)])
    run(ReportConfig(max_cases=0), run_folder)
    reader = read_page(run_folder / "report" / "index.html")
    assert len(reader.table("Case")) == 1 + page.MAX_ROWS
    assert f"{page.MAX_ROWS} of 1200 cases, worst first, are shown; all of them are in" in reader.text


CHECKS = {
    "road": {"value": 0.125, "threshold": 0.0, "passed": True},
    "energy": {"value": 0.25, "threshold": 0.5, "passed": False},
    "deletion": {"value": None, "threshold": 0.0, "passed": None, "note": "not made: too large"},
}


def radiograph_run(root: Path, evidence: bool) -> Path:
    folder = root / "run"
    split = folder / "evaluation" / "test"
    cases = []
    for k, (target, p) in enumerate((("normal", 0.2), ("lesion", 0.3))):
        pixels = np.linspace(0, 255, 40 * 30).reshape(40, 30).astype(np.uint8)
        image = write_png(root / "cohort" / "images" / f"x{k}.png", pixels)
        explanation = split / "predictions" / f"x{k}" / "explanation"
        explanation.mkdir(parents=True)
        heat = np.zeros((40, 30), np.float32)
        heat[10:14, 8:12] = 2.5 if evidence else 0.0
        np.save(explanation / "map.npy", heat)
        about = {"method": "gradcam", "layer": "last", "target": "lesion", "raw_min": 0.0, "raw_max": float(heat.max())}
        write_json(explanation / "explanation.json", {**about, "evidence": evidence, "checks": CHECKS})
        probs = {"normal": 1 - p, "lesion": p}
        case: dict[str, Any] = {
            "case_id": f"x{k}",
            "score": probs[target],
            "images": [image],
            "label": None,
            "pred": None,
        }
        case |= {"explanation": explanation, "metrics": {"p_lesion": p}, "target": target, "predicted": "normal"}
        cases.append({**case, "probs": probs})
    write_json(split / "cases.json", cases)
    rate = {"value": 0.75, "ci_low": 0.5, "ci_high": 0.9}
    metrics = {"task": "classification", "n_cases": 2, "classes": ["normal", "lesion"], "threshold": 0.5}
    metrics |= dict.fromkeys(("auc", "accuracy", "sensitivity", "specificity"), rate)
    metrics |= {"confusion": [[1, 0], [1, 0]], "roc": {"fpr": [0.0, 0.0, 1.0], "tpr": [0.0, 0.5, 1.0]}}
    metrics |= {"sites": {"north": {"n": 2, "auc": rate}}, "localisation": {"n": 1, "energy_in_mask": {"mean": 0.4}}}
    write_json(split / "metrics.json", metrics)
    write_json(folder / "run.json", {"id": "run", "name": "xray", "status": "FINISHED"})
    return folder


def test_radiographs_and_classes(tmp_path: Path) -> None:
    result = run(ReportConfig(), radiograph_run(tmp_path, evidence=True))
    reader = read_page(result.paths["report"])
    assert (result.figures["cases_drawn"], result.figures["viewers"]) == (2, 0)
    assert [row[0][0] for row in reader.table("Called")[1:]] == ["x1", "x0"]
    assert [[text for text, _ in row] for row in reader.table("called lesion")[1:]] == [
        ["is normal", "1", "0"],
        ["is lesion", "1", "0"],
    ]
    assert "is lesion, called normal (0.700)" in reader.text
    assert "raw values from 0 to 2.5" in reader.text
    assert "FAILED checks: energy 0.25 (mark 0.5)." in reader.text
    assert "Other checks: road 0.125 (mark 0), deletion not made: too large (mark 0)." in reader.text
    assert "patient’s right" not in reader.text
    assert any(alt.startswith("ROC curve") for alt in reader.values("alt"))


def test_the_page_says_how_many_maps_pass_their_checks(tmp_path: Path) -> None:
    folder = radiograph_run(tmp_path, evidence=True)

    def about(value: float) -> dict[str, Any]:
        check = {"value": value, "threshold": 0.5, "passed": value >= 0.5}
        return {"method": "gradcam", "layer": "last", "evidence": True, "checks": {"energy": check},
                "passed": check["passed"]}  # fmt: skip

    found = summary.summarise([("p1", about(0.7)), ("p2", about(0.5)), ("p3", about(0.9)), ("p4", about(0.1))])
    write_json(folder / "evaluation" / "test" / "predictions" / summary.FILE, found)
    reader = read_page(run(ReportConfig(), folder).paths["report"])
    rows = reader.table("Share of maps that pass")[1:]
    assert [[text for text, _ in row][:3] for row in rows] == [["energy", "0.55", "0.50"], ["all of them", "–", "–"]]
    assert all(row[3][0].startswith("0.75") and row[4][0] == "4" for row in rows)
    assert "4 maps by gradcam/last." in reader.text


def test_empty_map_is_no_evidence(tmp_path: Path) -> None:
    folder = radiograph_run(tmp_path, evidence=False)
    reader = read_page(run(ReportConfig(), folder).paths["report"])
    assert "no evidence, the map has no positive value" in reader.text
    scene = load_map(folder / "evaluation" / "test" / "predictions" / "x0" / "explanation", None, None)
    assert scene.heat is not None
    assert not scene.heat.evidence


def test_a_withheld_map_is_not_drawn_and_said_to_be_withheld(tmp_path: Path) -> None:
    folder = radiograph_run(tmp_path, evidence=True)
    for explanation in folder.glob("evaluation/test/predictions/*/explanation"):
        (explanation / "map.npy").unlink()
        path = explanation / "explanation.json"
        write_json(path, read_json(path) | {"withheld": True})
    reader = read_page(run(ReportConfig(), folder).paths["report"])
    assert "withheld, since it failed. FAILED checks: energy 0.25 (mark 0.5)." in reader.text
    assert "cannot be read" not in reader.text


def batch_folder(root: Path) -> Path:
    rows = [("ok-1", "done"), ("ok-2", "done"), ("look", "flagged"), ("no", "rejected"), ("bad", "failed")]
    for case_id, status in rows:
        result: dict[str, Any] = {"status": status, "patient_id": "P-SECRET", "volumes_ml": {}, "flags": []}
        if status in ("done", "flagged"):
            result["volumes_ml"] = {"left": 1234.5678, "right": 2.0}
            write_png(root / case_id / "preview.png", np.full((20, 60), 128, np.uint8))
        if status == "flagged":
            result["flags"] = [{"code": "border", "message": "left touches the border."}]
        bundle = {"name": "lungs & more", "sha256": "cd" * 32, "run_id": "r1", "simulated": True}
        write_json(root / case_id / "result.json", {**result, "bundle": bundle})
    columns = ("case_id", "status", "reason", "seconds")
    table = [
        {"case_id": c, "status": s, "reason": "Too few slices." if s == "rejected" else "", "seconds": 2}
        for c, s in rows
    ]
    write_rows(root / "ledger.csv", columns, table)
    return root


@pytest.mark.parametrize("segmented", [False, True])
def test_a_preview_without_a_mask_is_not_shown_beside_the_map_that_holds_it(tmp_path: Path, segmented: bool) -> None:
    place, heat = batch_folder(tmp_path) / "ok-1", np.zeros((20, 60), np.float32)
    heat[3:9, 20:30] = 1.0
    (place / "explanation").mkdir()
    np.save(place / "explanation" / "map.npy", heat)
    about = {"method": "gradcam", "layer": "last", "target": "left", "raw_min": 0.0, "raw_max": 1.0, "evidence": True}
    write_json(place / "explanation" / "explanation.json", about)
    if segmented:
        write_png(place / "mask.png", (heat > 0).astype(np.uint8))
    shown = read_page(run(ReportConfig(), tmp_path).paths["report"]).values("alt")
    assert shown.count("Activation map of ok-1.") == 1
    assert shown.count("Preview of ok-1.") == (1 if segmented else 0)
    assert shown.count("Preview of ok-2.") == 1


def test_predictions_page_puts_first_what_needs_a_look(tmp_path: Path) -> None:
    result = run(ReportConfig(max_cases=2), batch_folder(tmp_path))
    reader = read_page(result.paths["report"])
    assert [row[0][0] for row in reader.table("Seconds")[1:]] == ["bad", "no", "look", "ok-1", "ok-2"]
    assert [[text for text, _ in row] for row in reader.table("Why")[1:]] == [
        ["bad", "failed", "–"],
        ["no", "rejected", "Too few slices."],
        ["look", "flagged", "left touches the border."],
    ]
    ledger = {row[0][0]: row for row in reader.table("Seconds")[1:]}
    assert ledger["ok-1"][2] == ("1234.57", "1234.5678")
    assert [value for value in reader.values("id") if value.startswith("case-")] == ["case-look", "case-ok-1"]
    assert "Predictions: lungs & more" in reader.text
    assert "trained on simulated subjects" in reader.text
    assert "P-SECRET" not in (tmp_path / "report" / "index.html").read_text()
    assert {name: result.figures[name] for name in ("failed", "rejected", "flagged", "done")} == {
        "failed": 1,
        "rejected": 1,
        "flagged": 1,
        "done": 2,
    }


def test_empty_ledger_still_has_a_page(tmp_path: Path) -> None:
    write_rows(tmp_path / "ledger.csv", ("case_id", "status", "reason", "seconds"), [])
    reader = read_page(run(ReportConfig(), tmp_path).paths["report"])
    assert "The ledger lists no scan." in reader.text


def test_ledger_without_a_column_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "ledger.csv", ("case_id", "status"), [{"case_id": "a", "status": "done"}])
    with pytest.raises(UserError, match=r"ledger\.csv has no column 'reason'"):
        run(ReportConfig(), tmp_path)


def test_cohort_page(tmp_path: Path) -> None:
    cases = []
    for k in range(3):
        name = f"c{k}"
        volume = Volume(
            np.full((10, 12, 9), k + 1, np.int16) + place_label((18, 20, 16))[:10, :12, :9], np.diag([1, 1, 2, 1])
        )
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", volume)
        finding = Finding("anisotropic", "warning", "Voxels are longer than wide.", 2.0, 1.5)
        case = Case(name, f"p{k // 2}", (f"images/{name}.nii.gz",), site="north", split="train", shape=(10, 12, 9))
        cases.append(replace(case, spacing_mm=(1.0, 1.0, 2.0), findings=(finding,) if k else ()))
    twin = Finding("near_duplicate", "warning", "Nearly the same picture as c1.", 0.02, 0.1)
    cases[2] = replace(cases[2], findings=(*cases[2].findings, twin))
    reject = Reject("/secret/place/scan <9>.nii", "no_image", "It has a label but no image.")
    write_cohort(Cohort(tmp_path, tuple(cases), {"left": 1}), [reject], {"simulated": True})
    result = run(ReportConfig(max_cases=2), tmp_path)
    reader = read_page(result.paths["report"])
    assert [text for text, _ in reader.table("train")[1]] == ["Cases", "north", "3", "3"]
    assert [text for text, _ in reader.table("train")[2]] == ["Patients", "all", "2", "2"]
    assert [text for text, _ in reader.table("Finding")[1]][:3] == ["anisotropic", "warning", "2"]
    assert [text for text, _ in reader.table("Finding")[1]][3:6] == ["2", "2", "1.5"]
    assert [text for text, _ in reader.table("Case")[1]][3] == "Nearly the same picture as c1."
    assert [text for text, _ in reader.table("Source")[1]] == [
        "scan <9>.nii",
        "no_image",
        "It has a label but no image.",
    ]
    assert "2 of 3 cases are shown" in reader.text
    assert "Simulated subjects." in reader.text
    assert "secret" not in result.paths["report"].read_text()
    assert result.figures["cases_drawn"] == 2


def test_cohort_without_cases(tmp_path: Path) -> None:
    write_cohort(Cohort(tmp_path, (), {"left": 1}), [], {})
    reader = read_page(run(ReportConfig(), tmp_path).paths["report"])
    assert "The cohort has no case." in reader.text
    assert "No input was refused." in reader.text


def test_another_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json, ledger\.csv, cohort\.json"):
        run(ReportConfig(), tmp_path)
    assert not list(tmp_path.iterdir())


def orientations() -> Iterator[np.ndarray]:
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        affine = np.zeros((4, 4))
        for axis, world in enumerate(order):
            affine[world, axis] = signs[axis] * (1.0, 1.5, 2.0)[world]
        affine[3, 3] = 1.0
        yield affine


def test_slices_lie_in_radiological_order_for_every_stored_orientation(tmp_path: Path) -> None:
    """The patient's left upper front corner is marked by world position; it must appear right, top, left."""
    size_mm, spacing = np.array([12.0, 15.0, 20.0]), np.array([1.0, 1.5, 2.0])
    for number, affine in enumerate(orientations()):
        axes = [int(np.flatnonzero(affine[:3, axis])[0]) for axis in range(3)]
        shape = tuple(int(size_mm[world] / spacing[world]) for world in axes)
        corner = affine[:3, :3] @ (np.array(shape) - 1)
        affine[:3, 3] = -np.minimum(corner, 0)
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
        x, y, z = world_of(affine, index).T
        marked = ((x < 3.5) & (y > 9.0) & (z > 13.0)).reshape(shape)  # left, front, top
        if number % 8 == 0:
            path = write_nifti(tmp_path / f"{number}.nii", Volume(marked.astype(np.uint8) * np.uint8(9), affine))
            image = load_scene([path]).image
        else:
            image = to_canonical(Volume(marked.astype(np.uint8) * np.uint8(9), affine)).array
        axial, coronal, sagittal = (cut(image, plane, at) for plane, at in zip(PLANES, (9, 9, 0), strict=True))
        assert_only_corner(axial, top=True, right=True)
        assert_only_corner(coronal, top=True, right=True)
        assert_only_corner(sagittal, top=True, right=False)


def assert_only_corner(picture: np.ndarray, *, top: bool, right: bool) -> None:
    rows, columns = np.nonzero(picture)
    assert len(rows), "the mark is not in this slice"
    height, width = picture.shape
    assert (rows < height / 2).all() == top
    assert (columns >= width / 2).all() == right
    assert picture[0 if top else -1, -1 if right else 0]


def test_slices_meet_the_structure_and_cropping_keeps_positions() -> None:
    label = np.zeros((120, 130, 110), np.uint8)
    label[80:84, 20:60, 30:40] = 1
    label[80:84, 20:24, 30:90] = 1
    rng = np.random.default_rng(1)
    scene = Scene(rng.normal(size=label.shape).astype(np.float32), oblique(np.array([1.0, 1.2, 1.5])), label)
    centre = focus(scene)
    for plane in PLANES:
        assert cut(label, plane, centre[plane.axis]).any()
    cropped = crop_to_structure(scene)
    assert cropped.label is not None
    assert cropped.label.sum() == label.sum()
    assert cropped.image.size < scene.image.size / 2
    inside, small = np.argwhere(label), np.argwhere(cropped.label)
    np.testing.assert_allclose(world_of(scene.affine, inside), world_of(cropped.affine, small), atol=1e-9)
    np.testing.assert_array_equal(scene.image[tuple(inside.T)], cropped.image[tuple(small.T)])


def test_without_a_structure_slices_go_through_the_maximum_of_the_map(tmp_path: Path) -> None:
    heat = np.zeros((12, 14, 10), np.float32)
    heat[3, 11, 7] = 4.0
    write_nifti(tmp_path / "map.nii.gz", Volume(heat, np.eye(4)))
    write_json(tmp_path / "explanation.json", {"raw_max": 4.0, "raw_min": 0.0, "evidence": True})
    scene = load_map(tmp_path, None, None)
    assert structure(scene) is None
    assert focus(scene) == (3, 11, 7)


def test_difference_counts_missed_extra_and_confused() -> None:
    label = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    pred = np.array([[1, 1, 0], [1, 2, 0]], np.uint8)
    rgba = difference(Scene(label, np.eye(4), label, pred), View(None, 0, 3, 2))
    wanted = {REFERENCE: [(0, 2)], PREDICTION: [(0, 0)], CONFUSED: [(1, 0)]}
    for colour, places in wanted.items():
        found = np.argwhere((rgba[..., 3] > 0) & np.isclose(rgba[..., :3], rgb_of(colour)).all(-1))
        assert [tuple(place) for place in found.tolist()] == places
    assert int((rgba[..., 3] > 0).sum()) == 3


def test_a_prediction_that_the_reference_does_not_tell_of_is_not_called_extra() -> None:
    label = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    pred = np.array([[3, 3, 1], [2, 0, 2]], np.uint8)
    scene = Scene(label, np.eye(4), label, pred)
    assert np.argwhere(scene.extra).tolist() == [[0, 0], [1, 2]]
    scene = replace(scene, not_annotated=(3,))
    rgba = difference(scene, View(None, 0, 3, 2))
    found = {tuple(place): rgba[tuple(place)][:3].tolist() for place in np.argwhere(rgba[..., 3] > 0).tolist()}
    assert found == {
        (0, 1): pytest.approx(rgb_of(CONFUSED), abs=1e-6),
        (1, 1): pytest.approx(rgb_of(REFERENCE), abs=1e-6),
        (1, 2): pytest.approx(rgb_of(PREDICTION), abs=1e-6),
    }


def test_overlay_refuses_a_mask_on_another_grid(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "i.nii.gz", Volume(np.zeros((9, 9, 9), np.float32), np.eye(4)))
    pred = write_nifti(tmp_path / "p.nii.gz", Volume(np.zeros((9, 9, 8), np.uint8), np.eye(4)))
    with pytest.raises(UserError, match=r"p\.nii\.gz has shape"):
        draw_overlay([image], None, pred, tmp_path / "o.png")
    assert not (tmp_path / "o.png").exists()


def test_overlay_of_an_empty_mask_and_a_constant_image(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "i.nii.gz", Volume(np.zeros((9, 9, 9), np.float32), np.eye(4)))
    pred = write_nifti(tmp_path / "p.nii.gz", Volume(np.zeros((9, 9, 9), np.uint8), np.eye(4)))
    assert draw_overlay([image], pred, pred, tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_viewer_is_small_whole_and_the_same_each_time() -> None:
    label = np.zeros((150, 160, 140), np.uint8)
    label[40:90, 40:90, 40:90] = 1
    rng = np.random.default_rng(2)
    scene = Scene(
        rng.normal(size=label.shape).astype(np.float32), np.diag([1.0, 1.0, 1.2, 1.0]), label, np.roll(label, 5)
    )
    document, width_px, height_px = slice_viewer(scene)
    assert len(document) < 3_000_000
    assert width_px > height_px > 200
    assert 'radiological": true' in document
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", document)
    assert 'src="data:image/png;base64,"' not in document  # a picture that never loads would keep the viewer blank
    assert slice_viewer(scene)[0] == document


def test_charts_have_fixed_bytes() -> None:
    history: list[Mapping[str, float]] = [{"epoch": 1.0, "train_loss": 2.0, "learning_rate": 0.1, "val_auc": 0.5}]
    assert training_curves(history).uri == training_curves(history).uri
