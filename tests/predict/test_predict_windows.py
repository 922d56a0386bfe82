"""Windows and label maps: the same answer as the plain computation that needs all the memory."""

import numpy as np
import pytest
import torch
from tiny_bundle import Threshold
from torch import nn
from torch.nn import functional

from medseg.models.sliding import window_logits
from medseg.predict import segment_array


class Local(nn.Module):
    """A 1×1×1 convolution: the answer at a voxel does not depend on the window that holds it."""

    def __init__(self, classes: int, dims: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(classes, 2, *[1] * dims, generator=generator))
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (functional.conv3d if self.dims == 3 else functional.conv2d)(x, self.weight)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(20, 17, 23), (5, 30, 9)])  # the second is smaller than the window
def test_windows_of_a_local_network_are_invisible(shape: tuple[int, ...]) -> None:
    net, x = Local(3), torch.from_numpy(image(*shape))[None]
    found = window_logits(net, x, (8, 8, 8), 0.5, window_batch=3)
    assert torch.allclose(found, net(x), atol=1e-5)


def test_mirroring_averages_over_all_flips() -> None:
    net, x = nn.Conv3d(2, 2, 3, padding=1), torch.from_numpy(image(8, 8, 8))[None]
    found = window_logits(net, x, (8, 8, 8), 0.0, mirror_axes=(0, 2))
    parts = [net(x.flip(dims)).flip(dims) for dims in ([], [2], [4], [2, 4])]
    assert torch.allclose(found, sum(parts) / 4, atol=1e-5)


@pytest.mark.parametrize("out_shape", [(16, 15, 14), (31, 20, 40), (9, 7, 5)])
def test_labels_equal_the_full_buffer_path(out_shape: tuple[int, ...]) -> None:
    net, x = Local(5), image(16, 15, 14)
    labels = segment_array(net, x, (8, 8, 8), 0.5, out_shape=out_shape)
    logits = window_logits(net, torch.from_numpy(x)[None], (8, 8, 8), 0.5)
    full = functional.interpolate(logits, out_shape, mode="trilinear", align_corners=False)[0]
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, full.detach().numpy().argmax(0))


class Counted(nn.Module):
    """A small network with padding, so that no voxel of an even window need be like the next, that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 3, padding=1))
        self.windows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += len(x)
        return self.layers(x)


@pytest.mark.parametrize("window_batch", [1, 3])
@pytest.mark.parametrize("mirror_axes", [(), (0, 2)])
def test_even_windows_are_answered_once_and_change_no_label(window_batch: int, mirror_axes: tuple[int, ...]) -> None:
    """Half of the image is even, of two values one after the other; the labels are those of the whole sweep."""
    x = image(40, 24, 20)
    x[:, 16:28], x[:, 28:] = 0.0, -1.5
    net, told = Counted(), []
    options = {"window_batch": window_batch, "mirror_axes": mirror_axes}
    labels = segment_array(net, x, (8, 8, 8), 0.5, announce=told.append, **options)
    logits = window_logits(net.layers, torch.from_numpy(x)[None], (8, 8, 8), 0.5, mirror_axes=mirror_axes)
    assert np.array_equal(labels, logits[0].argmax(0).numpy())
    passes = 2 ** len(mirror_axes)
    assert told[0].even == (2 + 2) * 5 * 4, "by slices: two of one value, two of the other"
    assert told[0].air == 0
    assert net.windows == passes * (told[0].windows - told[0].even + 2)


def test_an_image_of_one_value_is_seen_once() -> None:
    net, told = Counted(), []
    x = np.full((2, 16, 16, 16), 3.0, np.float32)
    labels = segment_array(net, x, (8, 8, 8), 0.5, announce=told.append)
    assert net.windows == 1
    assert np.array_equal(
        labels, window_logits(net.layers, torch.from_numpy(x)[None], (8, 8, 8), 0.5)[0].argmax(0).numpy()
    )
    assert told[0].even == told[0].windows == 27


def test_windows_of_air_are_left_out_only_when_asked_and_only_if_all_of_them_is_air() -> None:
    x = np.abs(image(32, 16, 16)) + 1
    x[:, :16] = -x[:, :16] / 10 - 3  # uneven air
    x[0, 4, 4, 4] = 2.0  # a speck in one channel: the windows that hold it are seen
    net, told = Counted(), []
    whole = segment_array(net, x, (8, 8, 8), 0.0, announce=told.append)
    some = segment_array(net, x, (8, 8, 8), 0.0, air_below=-2.0, announce=told.append)
    assert [(found.even, found.air) for found in told] == [(0, 0), (7, 7)]
    assert np.array_equal(whole[16:], some[16:])
    assert np.array_equal(whole[:8, :8, :8], some[:8, :8, :8])
    assert net.windows == 16 + 9 + 1


def test_padding_counts_for_whether_a_window_is_even() -> None:
    x = np.full((2, 6, 16, 16), 2.0, np.float32)  # shorter than the window: padded with 0
    net, told = Counted(), []
    segment_array(net, x, (8, 8, 8), 0.0, announce=told.append)
    assert told[0].even == 0
    segment_array(net, 0 * x, (8, 8, 8), 0.0, announce=told.append)
    assert told[1].even == 4


def test_flat_images_and_many_classes() -> None:
    labels = segment_array(Local(300, dims=2), image(12, 10), (8, 8), out_shape=(24, 21))
    assert labels.shape == (24, 21)
    assert labels.dtype == np.uint16
    assert labels.max() > 255


def test_interpolated_edges_lie_half_way_between_voxels() -> None:
    x = np.full((1, 4, 4, 4), -1.0, dtype=np.float32)
    x[:, 2:] = 1.0  # the edge lies between voxels 1 and 2, so between 7 and 8 of 16
    labels = segment_array(Threshold(), x, (4, 4, 4), out_shape=(16, 4, 4))
    assert np.array_equal(labels[:, 0, 0], [0] * 8 + [1] * 8)


def test_mode_is_given_back_and_bad_networks_are_named() -> None:
    net = Local(2)
    net.train()
    segment_array(net, image(8, 8, 8), (8, 8, 8))
    assert net.training
    with pytest.raises(ValueError, match="1 output channel"):
        segment_array(Local(1), image(8, 8, 8), (8, 8, 8))
    with pytest.raises(ValueError, match="channel axis"):
        segment_array(net, image(8, 8), (8, 8, 8))
    with pytest.raises(ValueError, match="logits must match"):
        segment_array(nn.AvgPool3d(2), image(8, 8, 8), (8, 8, 8))
