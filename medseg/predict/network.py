"""A bundle's network with its weights, where it is to compute."""

import torch
from torch import nn

from medseg.bundle import Bundle, read_weights
from medseg.bundle_files import WEIGHTS
from medseg.files import UserError
from medseg.models import build_from_config
from medseg.models.ensemble import Ensemble
from medseg.models.layout import placed
from medseg.models.norms import with_norms


def load_network(bundle: Bundle, device: torch.device | None = None) -> nn.Module:
    """The bundle's network with its weights, in evaluation mode; of joined folds, an `Ensemble` of theirs.

    Raises:
        UserError: the weights are damaged or belong to another network.
    """
    members = [_network(bundle, str(member["weights"])) for member in bundle.members]
    net = Ensemble(members) if members else _network(bundle, WEIGHTS)
    return placed(with_norms(net), device or choose_device(bundle)).eval()


def _network(bundle: Bundle, weights: str) -> nn.Module:
    task = bundle.config.task
    net = build_from_config(
        bundle.config.model,
        spatial_dims=task.spatial_dims,
        in_channels=len(task.channels),
        out_channels=task.out_channels,
    )
    try:
        net.load_state_dict(read_weights(bundle, weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{bundle.folder}: the weights do not fit model {bundle.config.model.name!r} ({reason})."
        ) from error
    return net


def choose_device(bundle: Bundle) -> torch.device:
    """A GPU where there is one, unless the config says `cpu`; a model trained on a GPU still predicts without."""
    return torch.device("cuda" if bundle.config.device != "cpu" and torch.cuda.is_available() else "cpu")
