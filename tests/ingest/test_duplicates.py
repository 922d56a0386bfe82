"""A picture is told again after rescaling and recompression, and two patients are not taken for one."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medseg.cohort import Case
from medseg.ingest.duplicates import MAX_DIFFERENT_SHARE, Fingerprint, find, fingerprint
from medseg.volume import Volume


def picture(seed: int, shape: tuple[int, ...] = (120, 140)) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 6)
    return np.rint(255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)


def case(name: str, patient: str, site: str = "") -> Case:
    return Case(name, patient, (f"images/{name}.png",), kind="radiograph", site=site)


def flat(array: np.ndarray) -> Fingerprint:
    return fingerprint(Volume(array, np.eye(4)))


def different(one: Fingerprint, other: Fingerprint) -> float:
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(p.bits), np.uint8)) for p in (one, other)]
    return float((bits[0] != bits[1]).mean())


def test_rescaled_recompressed_and_brightened_pictures_are_near_and_others_far() -> None:
    array = picture(0)
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=50)
    changed = [
        np.asarray(Image.open(buffer)),
        np.asarray(Image.fromarray(array).resize((280, 240))),
        array.astype(np.uint16) * 13 + 100,
    ]
    for other in changed:
        assert flat(other).exact != flat(array).exact
        assert different(flat(other), flat(array)) < MAX_DIFFERENT_SHARE
    assert min(different(flat(picture(n)), flat(array)) for n in range(1, 9)) > 2 * MAX_DIFFERENT_SHARE


def test_the_axis_order_of_a_volume_does_not_matter() -> None:
    array = picture(1, (30, 32, 34)).astype(np.int16)
    affine = np.diag([1.0, 1, 2, 1])
    turned = Volume(array[::-1].transpose(2, 0, 1), np.eye(4))
    matrix = np.zeros((4, 4))
    matrix[2, 0], matrix[0, 1], matrix[1, 2], matrix[3, 3] = 2, -1, 1, 1
    matrix[0, 3] = 29
    assert fingerprint(Volume(array, affine)) == fingerprint(replace(turned, affine=matrix))


@pytest.mark.parametrize(("patient", "severity"), [("p", "info"), ("q", "warning")])
def test_copies_are_found_and_weigh_more_between_patients(patient: str, severity: str) -> None:
    array = picture(2)
    near = np.asarray(Image.fromarray(array).resize((300, 260)))
    prints = {"a": flat(array), "b": flat(array), "c": flat(near), "d": flat(picture(3))}
    found = find([case("a", "p"), case("b", patient, "s"), case("c", patient), case("d", "r")], prints)
    assert [[(f.code, f.severity) for f in one.findings] for one in found] == [
        [("duplicate", severity), ("near_duplicate", severity)],
        [("duplicate", severity), ("near_duplicate", "info")],  # b and c are of one patient
        [("near_duplicate", severity)],
        [],
    ]


def test_thousands_of_images_are_compared_quickly() -> None:
    rng = np.random.default_rng(0)
    prints = {f"c{n:04d}": Fingerprint(str(n), rng.bytes(32).hex(), ()) for n in range(3000)}
    prints["c2999"] = replace(prints["c0000"], exact="x")
    found = find([case(name, name) for name in prints], prints)
    assert [one.case_id for one in found if one.findings] == ["c0000", "c2999"]
