"""Logits made from features in parts: the same labels as from whole windows, and a network that stays as it is."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.models import build_model
from medseg.models.sliding import window_logits
from medseg.predict import answers, segment_array
from medseg.predict.heads import Headless, ending, is_pointwise
from medseg.predict.windows import WorkingSet

CLASSES = 40


class Body(nn.Module):
    """Ends with a pointwise convolution that is reached by name, or only through a list."""

    def __init__(self, *, hidden: bool = False, after: bool = False, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.ReLU())
        self.tail = nn.ModuleDict({"head": nn.Conv3d(6, classes, 1)})
        self.ways, self.after = [self.tail["head"]], after
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.ways[0] if self.hidden else self.tail["head"])(self.body(x))
        return logits.mul_(-1) if self.after else logits


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)


def full_buffer(net: nn.Module, x: np.ndarray, patch: tuple[int, ...], overlap: float) -> Tensor:
    return window_logits(net.eval(), torch.from_numpy(x)[None], patch, overlap)[0]


def asked(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a network is asked for features from here on."""
    calls, forward = [], Headless.forward
    monkeypatch.setattr(Headless, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    return calls


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_labels_are_equal_bit_for_bit(overlap: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, patch = Body().eval(), image(40, 32, 32), (16, 16, 16)
    calls = asked(net, monkeypatch)
    monkeypatch.setattr(answers, "ADD_VALUES", 30_000)
    labels = segment_array(net, x, patch, overlap, window_batch=batch)
    assert calls
    assert np.array_equal(labels, full_buffer(net, x, patch, overlap).argmax(0).numpy())


def test_on_another_grid_and_with_even_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, patch = Body().eval(), image(40, 32, 32), (16, 16, 16)
    x[:, :18] = -1  # among them the first window
    calls, out = asked(net, monkeypatch), (61, 50, 30)
    labels = segment_array(net, x, patch, 0.5, out)
    assert calls
    logits = functional.interpolate(full_buffer(net, x, patch, 0.5)[None], out, mode="trilinear")[0]
    chosen = logits.gather(0, torch.from_numpy(labels.astype(np.int64))[None])[0]
    assert bool((logits.amax(0) - chosen <= 1e-5 * logits.abs().max()).all())
    assert (labels != logits.argmax(0).numpy()).mean() <= 1e-5


def test_less_is_announced_and_the_network_stays_as_it_is() -> None:
    many = 10 * CLASSES  # so that their logits take more than all else together
    net, told = Body(classes=many).train(), list[WorkingSet]()
    before = dict(net.named_modules())
    segment_array(net, image(64, 64, 100), (64, 64, 64), announce=told.append)
    assert dict(net.named_modules()) == before
    assert net.training
    assert net.tail["head"].training
    assert net(torch.zeros(1, 1, 4, 4, 4)).shape[1] == many
    assert told[0].network_gb < 4e-9 * many * 64**3  # of the logits alone


@pytest.mark.parametrize("net", [Body(hidden=True), Body(after=True)], ids=["reached another way", "changed after"])
def test_a_network_that_does_not_end_so_is_asked_for_logits(net: Body) -> None:
    x, patch = image(40, 32, 32), (16, 16, 16)
    assert np.array_equal(segment_array(net, x, patch), full_buffer(net, x, patch, 0.5).argmax(0).numpy())


def test_who_watches_a_network_sees_its_logits() -> None:
    net, x, seen = Body().eval(), image(40, 32, 32), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    segment_array(net, x, (16, 16, 16))
    assert set(seen) == {CLASSES}
    assert len(seen) == 4 * 3 * 3


def test_only_a_convolution_that_sees_one_voxel_is_a_head() -> None:
    assert is_pointwise(nn.Conv3d(2, 3, 1))
    assert not is_pointwise(nn.Conv3d(2, 3, 3, padding=1))
    assert not is_pointwise(nn.Conv3d(2, 3, 1, stride=2))
    assert not is_pointwise(nn.Conv3d(2, 3, 1, padding=1))
    assert not is_pointwise(nn.Linear(2, 3))


@pytest.mark.parametrize(("name", "splits"), [("dynunet", True), ("unetpp", True), ("unet", False)])
def test_registered_networks_give_their_features(name: str, splits: bool) -> None:
    """The U-Net of MONAI ends with a convolution of 3×3×3."""
    shape = {"dynunet": {"channels": [4, 8, 16]}, "unetpp": {"depth": 2}, "unet": {"channels": [4, 8], "strides": [2]}}
    net = build_model(name, spatial_dims=3, in_channels=1, out_channels=40, **shape[name]).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode(), ending(net, lambda: 0.0) as ended:
        logits = net(x)
    found = ended(logits)
    assert (found is not None) == splits
    if found is not None:
        with torch.inference_mode():
            features = Headless(net, found.name)(x)
            assert features is not None
            assert torch.equal(found.head(features), logits)
