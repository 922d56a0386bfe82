"""Each explanation method against an answer known in closed form, and against MONAI called with an explicit class."""

import copy

import pytest
import torch
from monai.visualize import GradCAMpp, OcclusionSensitivity
from torch import nn

from medseg.config import MethodConfig
from medseg.explain import explain
from medseg.explain.eigencam import eigencam
from medseg.explain.fullgrad import full_gradients
from medseg.explain.gradients import activation_and_gradient, gradcampp
from medseg.explain.hooks import frozen
from medseg.explain.occlusion import occlude
from medseg.explain.targets import Score, make_score
from medseg.files import UserError
from medseg.models import build_model


class Linear(nn.Module):
    """Score of class k: the sum of weight_k * x over the image, and a bias."""

    def __init__(self, weight_KHW: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_KHW)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return (
            (x_BCHW * self.weight).flatten(2).sum(2) + 3.0 if x_BCHW.shape[1] == 1 else x_BCHW.sum((1, 2, 3))[:, None]
        )


class Picks(nn.Module):
    """Two channels, x and its mirror image; the score is the sum of x over the left half."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1, bias=False)
        self.layer.weight.data = torch.eye(2).view(2, 2, 1, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        self.layer(x_BCHW)
        left = x_BCHW[:, :1, :, : x_BCHW.shape[3] // 2].flatten(1).sum(1, keepdim=True)
        return torch.cat([-left, left], 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _densenet(dims: int = 2) -> nn.Module:
    net = build_model("densenet", spatial_dims=dims, in_channels=1, out_channels=3, block_config=(2, 2))
    for module in net.modules():  # as if trained: the running statistics and shifts of batch norm are not 0 and 1
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    return net.eval()


def test_gradcampp_by_hand() -> None:
    """alpha = g^2 / (2 g^2 + sum(A) g^3), the weights of positive gradients, then the ReLU of the sum."""
    A, g = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    alpha = g**2 / (2 * g**2 + A.sum((2, 3), keepdim=True) * g**3)
    weights = (alpha * g.relu()).sum((2, 3), keepdim=True)
    torch.testing.assert_close(gradcampp(A, g), (weights * A).sum(1).relu())


def test_gradcampp_keeps_the_weight_of_small_gradients() -> None:
    """With an epsilon in the denominator a thousandth of the gradient would be a millionth of the map."""
    A, g = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    tiny = gradcampp(A * 1e6, g * 1e-6)  # sum(A) g stays, so alpha stays
    torch.testing.assert_close(tiny, gradcampp(A, g))
    assert not gradcampp(A, torch.zeros_like(g)).any()


def test_gradcampp_agrees_with_monai_behind_global_pooling() -> None:
    """There the two sums that MONAI confuses are equal; its factor exp(score) is taken out."""
    net = _densenet().double()
    net.class_layers.out.weight.data *= 100  # against its epsilon
    for image in torch.randn(2, 1, 1, 32, 32, dtype=torch.float64):  # one by one, since its batches fail
        theirs = GradCAMpp(copy.deepcopy(net), "class_layers.relu").compute_map(image, class_idx=1)[:, 0]
        ours = explain(net, image, "gradcampp", 1, "class_layers.relu", size="layer")
        assert float(ours.max()) > 0
        torch.testing.assert_close(ours / ours.max(), (theirs / theirs.max()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", [(6, 7), (4, 5, 3)])
def test_eigencam_finds_the_pattern_and_its_sign(space: tuple[int, ...]) -> None:
    """Activations of one pattern times one vector: the map is the pattern, whichever sign the vector has."""
    pattern = torch.rand(2, 1, *space) + 0.1
    vector = torch.randn(2, 8, *[1] * len(space))
    expected = pattern[:, 0] * vector.flatten(1).norm(dim=1).view(-1, *[1] * len(space))
    torch.testing.assert_close(eigencam(pattern * vector), expected)
    torch.testing.assert_close(eigencam(-pattern * vector), expected)


def test_eigencam_turns_the_farthest_value_up_and_knows_no_class() -> None:
    A = torch.randn(3, 5, 6, 6)
    found = eigencam(A)
    assert bool((found.flatten(1).amax(1) >= -found.flatten(1).amin(1)).all())
    net, x = _densenet(), torch.randn(1, 1, 32, 32)
    first, second = (explain(net, x, "eigencam", target) for target in (0, 1))
    torch.testing.assert_close(first, second)


def test_scorecam_by_hand() -> None:
    """Channel 0 shows the left half, on which the score rests; channel 1 the right one."""
    x = torch.zeros(1, 2, 4, 4)
    x[:, 0, :, :2], x[:, 1, :, 2:] = 0.5, 0.25
    found = explain(Picks(), x, "scorecam", 1, "layer", size="layer")[0]
    # the mask of channel 0 keeps the sum of 8 * 0.5, that of channel 1 leaves 0
    keep, drop = torch.tensor([4.0, 0.0]).softmax(0)
    expected = torch.cat([torch.full((4, 2), float(keep) * 0.5), torch.full((4, 2), float(drop) * 0.25)], 1)
    torch.testing.assert_close(found, expected)


def test_scorecam_takes_the_channels_that_vary_most_and_no_constant_one() -> None:
    x = torch.zeros(1, 2, 4, 4)
    x[:, 0, :, :2], x[:, 1, :, 2:] = 0.5, 0.25
    one = explain(Picks(), x, "scorecam", 1, "layer", size="layer", config=MethodConfig(score_channels=1))[0]
    torch.testing.assert_close(one, x[0, 0])  # the softmax over one channel is 1
    assert not explain(Picks(), torch.ones(1, 2, 4, 4), "scorecam", 1, "layer").any()


def test_scorecam_of_a_segmentation_is_not_one_channel() -> None:
    """The mean over the region keeps the softmax from saturating."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x, region = torch.randn(1, 1, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool)
    found = explain(net, x, "scorecam", 1, "1", region_BDHW=region)[0]
    with torch.no_grad():
        channels = net[1](net[0](x))[0]
    assert all(not torch.allclose(found / found.max(), part / part.max(), atol=1e-2) for part in channels)


@pytest.mark.parametrize("size", [1, 2])
def test_occlusion_of_a_linear_model_is_exact(size: int) -> None:
    """S is linear, so covering a window loses the sum of w (x - mean) over it; windows tile the image."""
    weight, x = torch.randn(2, 6, 8), torch.randn(1, 1, 6, 8)
    net, score = Linear(weight), Score(torch.tensor([1]))
    with torch.no_grad():
        found = occlude(net, x, score, (size, size), (size, size), batch_size=5)
    lost = weight[1] * (x[0, 0] - x.mean())
    tiles = lost.unfold(0, size, size).unfold(1, size, size).sum((2, 3))
    torch.testing.assert_close(found, tiles.repeat_interleave(size, 0).repeat_interleave(size, 1))
    torch.testing.assert_close(found.sum() / size**2, (weight[1] * (x[0, 0] - x.mean())).sum())


def test_occlusion_agrees_with_monai() -> None:
    """Theirs is the score that is left, ours what is lost; windows overlap by half and end with the image."""
    net, x = _densenet(), torch.randn(1, 1, 25, 32)
    theirs = OcclusionSensitivity(net, mask_size=10, mode="mean_img", overlap=0.5, activate=False, verbose=False)
    with torch.no_grad():
        whole = net(x)[0, 2]
        ours = occlude(net, x, Score(torch.tensor([2])), (10, 10), (5, 5), batch_size=7)
    torch.testing.assert_close(ours, whole - theirs(x)[0].as_tensor()[0, 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_fullgrad_parts_sum_to_the_logit(dims: int) -> None:
    """Completeness (Srinivas and Fleuret 2019, proposition 1): dense blocks, batch norm, pooling, linear head."""
    net, x = _densenet(dims).double(), torch.randn(2, 1, *[24] * dims, dtype=torch.float64)
    logits = net(x)
    with frozen(net):
        parts = full_gradients(net, x, make_score(logits, [2, 0]))
    torch.testing.assert_close(parts.total_B(), logits[[0, 1], [2, 0]].detach(), rtol=1e-9, atol=1e-9)
    assert float(parts.total_B().sub(parts.input_BCDHW.flatten(1).sum(1)).abs().min()) > 1e-3, "biases matter here"


def test_fullgrad_parts_of_a_segmentation_sum_to_the_score() -> None:
    """A skip connection, a transposed convolution, an activation in place, a head with bias."""
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2), nn.BatchNorm3d(4),
        nn.ConvTranspose3d(4, 3, 2, stride=2), nn.LeakyReLU(0.1, inplace=True), nn.Conv3d(3, 2, 1),
    ).double().eval()  # fmt: skip
    x, region = torch.randn(1, 1, 8, 8, 8).double(), torch.rand(1, 8, 8, 8) > 0.5
    score = make_score(net(x), 1, region)
    with frozen(net):
        parts = full_gradients(net, x, score)
    torch.testing.assert_close(parts.total_B(), score(net(x)).detach())
    assert float(explain(net, x, "fullgrad", 1, region_BDHW=region).sum()) >= float(parts.total_B().abs().sum()) - 1e-6


def test_fullgrad_of_a_linear_model_is_weight_times_input() -> None:
    weight, x = torch.randn(2, 6, 8), torch.randn(1, 1, 6, 8)
    torch.testing.assert_close(explain(Linear(weight), x, "fullgrad", 1)[0], (weight[1] * x[0, 0]).abs())


def test_a_layer_that_leads_nowhere_is_named() -> None:
    with pytest.raises(UserError, match="does not lead"), frozen(net := Picks()):
        activation_and_gradient(net, torch.rand(1, 2, 4, 4), Score(torch.tensor([1])), "layer")


def test_probability_of_a_score() -> None:
    logits = torch.randn(2, 3)
    torch.testing.assert_close(make_score(logits, [2, 0]).probability(logits), logits.softmax(1)[[0, 1], [2, 0]])
    single = torch.randn(2, 1)
    expected = torch.stack([single[0, 0].sigmoid(), 1 - single[1, 0].sigmoid()])
    torch.testing.assert_close(make_score(single, [1, 0]).probability(single), expected)
    volume, region = torch.randn(1, 2, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bool)
    region[0, 1] = True
    found = make_score(volume, 1, region).probability(volume)
    torch.testing.assert_close(found[0], volume.softmax(1)[0, 1, 1].mean())


def test_the_probability_of_a_label_that_excludes_no_other_is_its_own_sigmoid() -> None:
    logits = torch.tensor([[2.0, 5.0], [-1.0, 0.0]])
    score = make_score(logits, 0, exclusive=False)
    torch.testing.assert_close(score.probability(logits), logits[:, 0].sigmoid())
    torch.testing.assert_close(score.take([1, 1, 0]).probability(logits[[1, 1, 0]]), logits[[1, 1, 0], 0].sigmoid())
