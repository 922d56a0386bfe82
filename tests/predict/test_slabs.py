"""Labels and memory of the sweep, each beside the plain computation that holds everything."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from medseg.files import UserError
from medseg.models.sliding import window_logits
from medseg.predict import segment_array
from medseg.predict.heads import WindowLogits
from medseg.predict.slabs import Reduction, SlabSize, largest
from medseg.predict.sweep import Axis, Sweep
from medseg.predict.windows import WorkingSet, working_set, working_set_gb

LINEAR = {2: "bilinear", 3: "trilinear"}


def network(dims: int, classes: int, seed: int = 0) -> nn.Module:
    """A 3×3×3 convolution: near the edge of a window its answer differs from that of the neighbouring window."""
    torch.manual_seed(seed)
    return (nn.Conv3d if dims == 3 else nn.Conv2d)(1, classes, 3, padding=1).eval()


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)


@torch.inference_mode()
def full_buffer(net, x, patch, overlap, out_shape, mirror_axes=()) -> Tensor:  # type: ignore[no-untyped-def]
    """Logits of all classes on the output grid, as MONAI blends and torch interpolates them."""
    logits = window_logits(net, torch.from_numpy(x)[None], patch, overlap, 1, mirror_axes)
    if logits.shape[2:] != tuple(out_shape):
        logits = functional.interpolate(logits, out_shape, mode=LINEAR[len(patch)], align_corners=False)
    return logits[0]


def differing(labels: np.ndarray, logits: Tensor, tie: float = 1e-5) -> int:
    """How many labels differ from the argmax; where one does, the two logits must be close to equal."""
    chosen = logits.gather(0, torch.from_numpy(labels.astype(np.int64))[None])[0]
    assert bool((logits.amax(0) - chosen <= tie * logits.abs().max()).all())
    return int((labels != logits.argmax(0).numpy()).sum())


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    dims = draw(st.sampled_from([2, 3]))
    most = 20 if dims == 2 else 13
    sizes = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    shape = sizes(1, most)
    return {
        "shape": shape,
        "patch": sizes(2, 9),
        "overlap": draw(st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.7])),
        "out": shape if draw(st.booleans()) else sizes(1, most + 8),
        "classes": draw(st.sampled_from([2, 7, 256, 257])),
        "batch": draw(st.integers(1, 3)),
        "mirror": draw(st.sampled_from([(), (0,), (0, 1)])),
    }


@settings(max_examples=15, deadline=None)
@given(cases())
def test_labels_equal_those_of_the_full_buffer(case: dict) -> None:  # type: ignore[type-arg]
    net, x = network(len(case["shape"]), case["classes"]), image(*case["shape"])
    labels = segment_array(
        net, x, case["patch"], case["overlap"], case["out"], window_batch=case["batch"], mirror_axes=case["mirror"]
    )
    assert labels.dtype == (np.uint8 if case["classes"] <= 256 else np.uint16)
    logits = full_buffer(net, x, case["patch"], case["overlap"], case["out"], case["mirror"])
    assert differing(labels, logits) <= labels.size / 100_000


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_in_the_array_s_own_order_labels_are_equal_bit_for_bit(overlap: float) -> None:
    net, x, patch = network(3, 12), image(40, 32, 32), (16, 16, 16)
    x[:, ::2] = x[:, ::2].round(1)
    assert Sweep((40, 32, 32), patch, overlap, (40, 32, 32)).order == (0, 1, 2)
    labels = segment_array(net, x, patch, overlap)
    assert np.array_equal(labels, full_buffer(net, x, patch, overlap, (40, 32, 32)).argmax(0).numpy())


@pytest.mark.parametrize("out", [(16, 14, 15), (24, 21, 13)])
def test_one_row_at_a_time_gives_the_same_labels(out: tuple[int, ...]) -> None:
    net, x, patch = network(3, 9), image(16, 14, 15), (8, 8, 8)
    sweep = Sweep(x.shape[1:], patch, 0.5, out)
    reduction = Reduction(sweep, 9, torch.float32, SlabSize(1, 1, 0), torch.device("cpu"))
    for index in sweep.windows():
        starts = [axis.starts[j] for axis, j in zip(sweep.axes, index, strict=True)]
        part = x[(slice(None), *[slice(s, s + p) for s, p in zip(starts, patch, strict=True)])]
        reduction.add(index, WindowLogits(net(torch.from_numpy(part)[None])[0].detach()))
    assert differing(reduction.labels, full_buffer(net, x, patch, 0.5, out)) == 0


def test_the_sweep_goes_along_the_longest_axis() -> None:
    net, x, patch = network(3, 5), image(16, 18, 60), (8, 8, 8)
    assert Sweep(x.shape[1:], patch, 0.5, x.shape[1:]).order[0] == 2
    assert differing(segment_array(net, x, patch), full_buffer(net, x, patch, 0.5, x.shape[1:])) == 0


@pytest.mark.parametrize(("shape", "out"), [((11, 14), (11, 14)), ((9, 13), (17, 30)), ((16, 9), (5, 7))])
def test_no_voxel_is_held_without_need(shape: tuple[int, int], out: tuple[int, int]) -> None:
    """Counted voxel by voxel: touched by a window so far, and touched again or needed by an unfinished output."""
    patch, overlap = (5, 4), 0.5
    sweep = Sweep(shape, patch, overlap, out)
    windows, most = list(sweep.windows()), 0
    reads = [
        (functional.interpolate(torch.eye(n)[None], m, mode="linear", align_corners=False)[0] != 0).numpy()
        for n, m in zip(shape, out, strict=True)
    ]
    when = np.full((len(windows), *shape), False)
    for number, index in enumerate(windows):
        spans = [slice(axis.starts[j], axis.starts[j] + axis.patch) for axis, j in zip(sweep.axes, index, strict=True)]
        when[(number, *spans)] = True
    first, last = when.argmax(0), len(windows) - 1 - when[::-1].argmax(0)
    needed = last.copy()
    for o in product(*map(range, out)):
        support = np.ix_(*[np.flatnonzero(read[:, at]) for read, at in zip(reads, o, strict=True)])
        needed[support] = np.maximum(needed[support], last[support].max())
    most = max(int(((first <= n) & (needed > n)).sum()) for n in range(len(windows)))
    assert most <= sweep.held_voxels <= most * (1 if min(np.subtract(out, shape)) >= 0 else 1.5)


@pytest.mark.parametrize(("size", "out"), [(5, 9), (9, 5), (7, 7), (1, 4), (4, 1), (300, 512), (512, 301)])
def test_weights_are_those_of_torch_to_the_last_bit(size: int, out: int) -> None:
    axis = Axis(size, 4, 0.5, out)
    found = np.zeros((out, size), dtype=np.float32)
    found[:, slice(*axis.support((0, out)))] = axis.matrix((0, out))
    wanted = functional.interpolate(torch.eye(size)[None], out, mode="linear", align_corners=False)[0].T
    assert np.array_equal(found, wanted.numpy())
    assert [axis.ready[0][0], axis.ready[-1][1]] == [0, out]


def smooth_image(side: int) -> np.ndarray:
    noise = torch.from_numpy(image(side // 4, side // 4, side // 4))[None]
    return functional.interpolate(noise, (side,) * 3, mode="trilinear")[0].numpy() * 5


@pytest.mark.parametrize("out", [48, 60])
def test_half_precision_changes_only_labels_next_to_a_tie(out: int) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 12, 3, padding=1)).eval()
    x, patch, told = smooth_image(48), (24, 24, 24), []
    sweep = Sweep(x.shape[1:], patch, 0.5, (out,) * 3)
    limit = sweep.held_voxels * 12 * 3e-9  # between 2 and 4 bytes
    labels = segment_array(net, x, patch, 0.5, (out,) * 3, limit, announce=told.append)
    assert told[0].dtype == torch.float16
    assert len(np.unique(labels)) > 4
    assert differing(labels, full_buffer(net, x, patch, 0.5, (out,) * 3), tie=2e-4) <= labels.size / 10_000


def test_what_fits_is_chosen_and_what_does_not_is_told() -> None:
    sweep = Sweep((384,) * 3, (96,) * 3, 0.5, (384,) * 3)
    wide = working_set(sweep, 100, 4.0)
    assert (wide.dtype, working_set(sweep, 100, 2.0).dtype) == (torch.float32, torch.float16)
    assert wide.held_gb == pytest.approx(73 * 48**3 * 400 / 1e9)  # 8×8 tiles, a row and a corner of 48³ voxels
    thin = working_set(sweep, 100, wide.held_gb + 0.001)
    assert (thin.dtype, thin.slab.thickness) == (torch.float32, 1)
    with pytest.raises(UserError, match="memory_gb 1:") as raised:
        working_set(sweep, 100, 1.0)
    enough = float(str(raised.value).split(" need ")[1].split(";")[0])
    assert 1.0 < enough < 2.0
    assert working_set(sweep, 100, enough).dtype == torch.float16
    with pytest.raises(UserError, match="overlap"):
        segment_array(network(3, 4), image(20, 20, 20), (8, 8, 8), memory_gb=1e-6)


def test_classes_leave_the_formula_but_for_what_is_held() -> None:
    """The figures that are promised: 100 classes, 384³, window 96³, the window's logits included."""
    full = 100 * 384**3 * 4e-9
    assert working_set_gb(100, (384,) * 3, (96,) * 3, 0.25, memory_gb=4) < min(2.2, full / 10)
    assert working_set_gb(100, (384,) * 3, (96,) * 3, 0.5, memory_gb=2) < 2.4
    long = working_set_gb(100, (384, 384, 3840), (96,) * 3, 0.25, memory_gb=4)
    assert long == pytest.approx(working_set_gb(100, (384,) * 3, (96,) * 3, 0.25, memory_gb=4), rel=0.01)


def test_networks_are_averaged_window_by_window() -> None:
    nets, x, patch = [network(3, 4, seed) for seed in range(3)], image(14, 14, 14), (8, 8, 8)
    x_BCDHW = torch.from_numpy(x)[None]
    mean = sum(window_logits(net, x_BCDHW, patch, 0.5) for net in nets) / 3
    assert differing(segment_array(nets, x, patch), mean[0]) == 0


def test_no_window_hides_a_nan() -> None:
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.cat([x, -x, x * 0.5], 1)
            logits[x[:, 0].isnan()[:, None].expand_as(logits)] = float("nan")
            return logits

    x = image(20, 20, 20)
    x[0, 17, 3, 9] = np.nan
    for limit in (2.0, 2e-5):  # float32 and float16
        told: list[WorkingSet] = []
        with pytest.raises(ValueError, match="not finite"):
            segment_array(Nan(), x, (8, 8, 8), memory_gb=limit, announce=told.append)
        assert told[0].dtype == (torch.float32 if limit == 2.0 else torch.float16)
    with pytest.raises(ValueError, match="not finite"):
        largest(torch.tensor([[[0.0]], [[float("inf")]]]))


def test_networks_that_return_their_input_or_a_constant_are_left_alone() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("answer", torch.randn(1, 2, 8, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x if x.shape[1] == 2 else self.answer

    x = np.concatenate([image(12, 12, 12), -image(12, 12, 12)])
    before, net = x.copy(), Same()
    answer = net.answer.clone()
    assert np.array_equal(segment_array(net, x, (8, 8, 8)), x.argmax(0))
    segment_array(net, x[:1], (8, 8, 8))
    assert np.array_equal(x, before)
    assert torch.equal(net.answer, answer)


MEASURE = """
import numpy as np, psutil, torch
torch.set_num_threads(1)
from medseg.predict import segment_array
from medseg.train.device import peak_memory_gb
image = np.random.default_rng(0).normal(size=(1, 128, 128, 128)).astype(np.float32)
net = torch.nn.Conv3d(1, 80, 1).eval()
segment_array(net, image[:, :9, :9, :9], (8, 8, 8), 0.5, (10, 10, 10))  # loads libraries and their kernels
told = []
before = psutil.Process().memory_info().rss
segment_array(net, image, (64, 64, 64), 0.5, (140, 140, 140), announce=told.append)
peak = peak_memory_gb(torch.device('cpu'))
print(peak - (before + 140**3) / 1e9, told[0].total_gb)
print(told[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is handed the peak of the one that started it")
def test_the_peak_stays_within_a_tenth_of_what_was_announced() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    peak, announced = map(float, done.stdout.split()[:2])
    assert peak <= 1.1 * announced
    assert announced < 0.7 * 4e-9 * 80 * 128**3
