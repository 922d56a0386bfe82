"""The manifests that come with medseg are well formed and agree with the configs they name."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from medseg.config import load_config
from medseg.files import UserError, resource_dir
from medseg.ingest.fetch import case_rows
from medseg.ingest.manifests import Manifest, find_manifest, list_manifests, load_manifests, next_command, show

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
MANIFESTS = load_manifests()
each = pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)


def tree(name: str = "nlm_montgomery") -> dict:
    return yaml.safe_load((resource_dir("data_manifests") / f"{name}.yaml").read_text())


def test_the_sets_that_users_bring_are_described() -> None:
    assert {name for name in MANIFESTS if not name.startswith("decathlon_")} == {
        *("amos22", "brats_2020", "brats_2023", "btcv", "covid19_radiography", "mrbrains18", "mswal"),
        *("nlm_montgomery", "nlm_shenzhen", "oasis3", "pancreas_ct", "totalsegmentator_v2"),
    }
    assert sum(name.startswith("decathlon_") for name in MANIFESTS) == 10


@each
def test_every_address_is_secured_and_every_proof_has_a_source(manifest: Manifest) -> None:
    for file in manifest.files:
        assert all(url.startswith("https://") for url in file.urls)
        published = (file.size_bytes, file.md5, file.sha256)
        assert (file.source is not None) == any(value is not None for value in published)


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("decathlon_")])
def test_the_hash_of_a_decathlon_archive_is_the_one_that_monai_publishes(name: str) -> None:
    spec = importlib.util.find_spec("monai")  # its source is read, since importing it takes long
    assert spec is not None
    assert spec.origin is not None
    published = (Path(spec.origin).parent / "apps" / "datasets.py").read_text(encoding="utf-8")
    file = MANIFESTS[name].files[0]
    task = file.name.removesuffix(".tar")
    assert re.findall(rf'"{task}": "(\w{{32}})"', published) == [file.md5]
    assert f'"{task}": "{file.urls[0]}"' in published


@each
def test_labels_and_columns_are_those_of_the_config(manifest: Manifest) -> None:
    if manifest.ingest.config is None:
        assert not manifest.labels
        return
    config = load_config(manifest.ingest.config)
    assert dict(manifest.labels) == config.task.labels
    assert manifest.kind == config.task.kind
    if manifest.layout.case_table:
        columns = {"image", "site", *manifest.layout.masks, *re.compile(manifest.layout.file_name).groupindex}
        assert {name for name in config.ingest.table.model_dump(exclude_unset=True).values() if name} <= columns
        by_value = {str(value): name for name, value in manifest.labels.items()}
        assert config.ingest.target_names == (manifest.layout.target_names or by_value)


@each
def test_the_classes_add_up(manifest: Manifest) -> None:
    if manifest.kind == "classification":
        assert sum(manifest.layout.class_cases.values()) == manifest.layout.cases


@each
def test_show_says_what_a_person_must_know(manifest: Manifest, tmp_path: Path) -> None:
    text = show(manifest, tmp_path / "with space")
    for said in (manifest.title, manifest.homepage, *manifest.terms.obliges, *(c.text for c in manifest.citations)):
        assert said in text
    for file in manifest.files:
        assert file.name in text
        assert all(step in text for step in (file.registration.steps if file.registration else ()))
    assert f"'{tmp_path}/with space'" in text
    assert "{" not in next_command(manifest)


def test_list_has_one_row_per_set() -> None:
    rows = {row["name"]: row for row in list_manifests(MANIFESTS)}
    assert list(rows) == list(MANIFESTS)
    assert rows["nlm_shenzhen"]["cases"] == 662
    assert rows["nlm_shenzhen"]["registration"] is False, "only the optional masks need an account"
    assert rows["decathlon_task04_hippocampus"]["size_bytes"] is None, "no size is published"


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans beside the checkout are not there")
def test_the_layout_reads_the_real_file_names(tmp_path: Path) -> None:
    """Names only: the published layout is rebuilt from links to the real files."""
    for name, root, source in (
        ("decathlon_task04_hippocampus", "Task04_Hippocampus/imagesTr", "hippocampus/images"),
        ("nlm_montgomery", "MontgomerySet/CXR_png", "cxr_tb/images"),
        ("nlm_shenzhen", "ChinaSet_AllFiles/CXR_png", "cxr_tb/images"),
    ):
        (tmp_path / name / root).parent.mkdir(parents=True)
        (tmp_path / name / root).symlink_to(SHARED / source)
    rows = {path.name: case_rows(MANIFESTS[path.name].layout, path) for path in tmp_path.iterdir()}
    assert {name: len(found) for name, found in rows.items()} == {
        "decathlon_task04_hippocampus": 206,
        "nlm_montgomery": 74,
        "nlm_shenzhen": 524,
    }
    assert sum(row["tb"] == "1" for row in rows["nlm_montgomery"]) == 30
    assert sum(row["tb"] == "1" for row in rows["nlm_shenzhen"]) == 258


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "colour"),
        ({"title": ""}, "title"),
        ({"homepage": "ftp://x"}, "homepage"),
        ({"citations": []}, "citations"),
        ({"labels": {"normal": -1}}, "labels"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict, said: str) -> None:
    (tmp_path / "nlm_montgomery.yaml").write_text(yaml.safe_dump(tree() | change))
    with pytest.raises(UserError, match=rf"nlm_montgomery\.yaml: {said}"):
        load_manifests(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"md5": "9D24"}, "md5"),
        ({"sha256": "0" * 63}, "sha256"),
        ({"name": "../evil.zip"}, "name"),
        ({"unpack_to": "a/b"}, "unpack_to"),
        ({"source": None}, "source"),
        ({"urls": []}, "urls"),
        ({"urls": ["file:///etc/passwd"]}, "urls"),
        ({"size_bytes": 0}, "size_bytes"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: dict, said: str) -> None:
    changed = tree()
    changed["files"][0] |= change
    (tmp_path / "nlm_montgomery.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError, match=said):
        load_manifests(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file_name": "(open"}, "regular expression"),
        ({"file_name": r"^(?P<case_id>\d+)\.png$"}, "patient_id"),
        ({"target": "sex"}, "target 'sex'"),
        ({"target": None}, "give labels together"),
        ({"target_names": {"0": "normal"}}, "layout.target_names must name the classes"),
        ({"labels": "x/{case_id}.png"}, "give labels for segmentation, or target"),
        ({"masks": {"lung": "masks/lung.png"}}, "masks"),
        ({"class_cases": {"normal": 1, "ill": 2}}, "class_cases"),
    ],
)
def test_a_wrong_layout_is_named(tmp_path: Path, change: dict, said: str) -> None:
    changed = tree()
    changed["layout"] |= change
    (tmp_path / "nlm_montgomery.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError, match=said):
        load_manifests(tmp_path)


def test_a_file_that_is_no_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"x\.yaml cannot be read"):
        load_manifests(tmp_path)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree()))
    with pytest.raises(UserError, match="named like its file"):
        load_manifests(tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'montgomery' is unknown.*nlm_montgomery"):
        find_manifest("montgomery")
