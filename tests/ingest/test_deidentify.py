"""Nothing that names a patient passes from DICOM into a cohort, wherever in the file or in its name it stands."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import plant, traces
from pydicom.dataset import Dataset

from medseg.cohort import Reject, read_cohort
from medseg.config import Config, validate_config
from medseg.files import read_json, read_rows
from medseg.ingest.deidentify import Names, acquisition, burned_in, known_modality, shifted_date
from medseg.ingest.step import run

KEY = b"k" * 32


def config(**ingest: object) -> Config:
    task = {"kind": "segmentation", "labels": {"front": 1}}
    tree = {"name": "t", "task": task, "model": {"name": "unet"}, "loss": {"name": "dice_ce"}, "ingest": ingest}
    return validate_config(tree, "test")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_thirty_planted_marks_are_in_no_byte_of_the_cohort(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    marks = plant(tmp_path / "scans")
    assert len(set(marks)) == 30
    lookup = tmp_path / "private" / "lookup.csv"
    result = run(config(), [tmp_path / "scans"], tmp_path / "out", key=KEY, lookup=lookup)
    assert (result.figures["cases"], result.figures["rejects"]) == (3, 3)
    assert traces(tmp_path / "out", marks) == []
    shown = capfd.readouterr()
    assert not [mark for mark in marks if mark in shown.out + shown.err + caplog.text + repr(result)]
    places = {row["case_id"]: row["folder"] for row in read_rows(lookup)}
    names = [row["source"].split(" ")[0] for row in read_rows(result.paths["rejects"])]
    assert places.keys() >= set(names)  # the holder of the workspace finds them again
    assert sum("ZQX" in places[name] for name in names) >= 2
    about = read_json(tmp_path / "out" / "cohort.json")["provenance"]["deidentification"]
    assert (about["names_of_files"], about["dates"]) == ("keyed", "shift")


def test_what_is_kept_of_a_header_is_numbers_known_words_and_pseudonyms() -> None:
    data = Dataset()
    data.EchoTime, data.Modality, data.Manufacturer, data.PatientAge = "2.5", "MR", "SIEMENS Ward Doe", "093Y"
    data.StudyInstanceUID, data.PatientID, data.StudyDate, data.PatientSex = "1.2.3", "p", "20200229", "DOE"
    kept = acquisition(data, KEY, "shift")
    assert {name: kept[name] for name in ("EchoTime", "Modality", "Manufacturer", "PatientAgeYears")} == {
        "EchoTime": 2.5,
        "Modality": "MR",
        "Manufacturer": "Siemens",
        "PatientAgeYears": 90,
    }
    assert str(kept["StudyInstanceUID"]).startswith("study-")
    assert "PatientSex" not in kept
    assert "StudyDate" not in acquisition(data, KEY, "drop")


def test_dates_of_one_patient_keep_their_intervals_and_no_other_patients_shift() -> None:
    first, second = (shifted_date(day, KEY, "p") for day in ("20191231", "20200301"))
    moved = [date(int(day[:4]), int(day[4:6]), int(day[6:])) for day in (first, second)]
    assert (moved[1] - moved[0]).days == 61
    assert moved[1] < date(2020, 3, 1)
    assert len({shifted_date("20200301", KEY, str(n)) for n in range(50)}) > 45
    assert [shifted_date(text, KEY, "p") for text in ("", "2020", "20201340", "Doe")] == [""] * 4


@pytest.mark.parametrize(("text", "known"), [("mr", "MR"), ("DOE", ""), (None, "")])
def test_only_modalities_of_the_standard_are_repeated(text: str | None, known: str) -> None:
    assert known_modality(text) == known


def test_pixels_that_may_show_names_are_flagged() -> None:
    data = Dataset()
    data.SOPClassUID, data.BurnedInAnnotation = "1.2.840.10008.5.1.4.1.1.7", "YES"
    assert [finding.code for finding in burned_in(data)] == ["burned_in_text", "secondary_capture"]
    data.SOPClassUID, data.BurnedInAnnotation = "1.2.840.10008.5.1.4.1.1.77.1.4", "NO"
    assert not list(burned_in(data)), "a photograph is no secondary capture, though its number begins alike"


def test_file_names_of_research_sets_are_kept_unless_keyed(tmp_path: Path) -> None:
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 255, (70, 80)).astype(np.uint8)
        (tmp_path / "d").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "d" / f"doe_{n}.png")
    tree = config().model_dump()
    tree["task"]["spatial_dims"] = 2
    for names, kept in (("kept", True), ("keyed", False)):
        tree["ingest"]["names"] = names
        run(validate_config(tree, "t"), [tmp_path / "d"], tmp_path / names, key=KEY)
        assert (traces(tmp_path / names, ["doe"]) != []) == kept
        assert len(read_cohort(tmp_path / names).cases) == 2


def test_rejects_of_dicom_keep_their_pseudonym() -> None:
    names = Names(True, KEY)
    known = Reject("case-0123456789abcdef (3 files, MR)", "few_slices", "Three.")
    assert names.reject(known) == known
    hidden = names.reject(Reject("Doe.dcm", "not_dicom", "It is none."))
    assert hidden.source.startswith("file-")
    assert names.places[hidden.source] == Path("Doe.dcm")
