"""A small network, trained from scratch and judged on patients it has not seen: what an image gives away at sight."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medseg.progress import progress

_WIDTHS = (12, 24, 48, 48)
_BATCH = 16


class Probe(nn.Module):
    """Four strided convolutions, the mean over space beside a coarse 4 × 4 map, one linear layer.

    The map keeps the place of what was seen, which a mean over space would blur: markers have a place.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(17 * _WIDTHS[-1], classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        seen = self.body(x_BCHW)
        coarse = functional.adaptive_avg_pool2d(seen, 4).flatten(1)
        logits: Tensor = self.head(torch.cat([coarse, seen.mean((2, 3))], 1))
        return logits


def name_unseen(
    images: NDArray[np.float32],
    classes: NDArray[np.int64],
    patients: Sequence[str],
    *,
    folds: int,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    what: str = "Small network",
) -> NDArray[np.float64]:
    """Probabilities (n, K) of each image's class by networks that saw no image of its patient.

    Args:
        images: (n, H, W), each of mean 0 and deviation 1.
        classes: (n,) 0..K-1; each class weighs the same in training whatever its size.
        patients: (n,); folds hold whole patients, dealt within the class of their first image.

    Raises:
        ValueError: a class has too few patients for the folds.
    """
    fold = deal_folds(classes, patients, folds, seed)
    probs = np.zeros((len(images), int(classes.max()) + 1))
    with torch.random.fork_rng(devices=[]), progress(what, folds * epochs) as shown:
        for number in range(folds):
            torch.manual_seed(seed * 1000 + number)
            unseen = fold == number
            net = Probe(probs.shape[1])
            _train(net, images[~unseen], classes[~unseen], epochs, learning_rate, seed + number, shown.advance)
            with torch.inference_mode():
                logits = net.eval()(torch.from_numpy(images[unseen])[:, None])
            probs[unseen] = logits.softmax(1).double().numpy()
    return probs


def deal_folds(classes: NDArray[np.int64], patients: Sequence[str], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each image: whole patients, spread evenly within the class of their first image.

    Raises:
        ValueError: without some fold, a class has no image left to learn from.
    """
    first: dict[str, int] = {}
    for patient, value in zip(patients, classes.tolist(), strict=True):
        first.setdefault(patient, value)
    rng = np.random.default_rng(seed)
    fold_of: dict[str, int] = {}
    for value in sorted(set(first.values())):
        members = sorted(patient for patient, owner in first.items() if owner == value)
        for place, index in enumerate(rng.permutation(len(members))):
            fold_of[members[index]] = (place + value) % folds
    dealt = np.array([fold_of[patient] for patient in patients])
    for number in range(folds):
        if set(classes[dealt != number].tolist()) != set(classes.tolist()) or number not in dealt:
            raise ValueError(f"too few patients of some class for {folds} folds.")
    return dealt


def _train(
    net: nn.Module,
    images: NDArray[np.float32],
    classes: NDArray[np.int64],
    epochs: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[], object],
) -> None:
    counts = np.bincount(classes, minlength=int(classes.max()) + 1)
    weight = torch.tensor(len(classes) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)
    x, y = torch.from_numpy(images)[:, None], torch.from_numpy(classes)
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, weight_decay=1e-2)
    steps = epochs * -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    rng = np.random.default_rng(seed)
    net.train()
    for _ in range(epochs):
        for chosen in np.array_split(rng.permutation(len(x)), -(-len(x) // _BATCH)):
            index = torch.from_numpy(chosen)
            loss = functional.cross_entropy(net(x[index]), y[index], weight)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        advance()
