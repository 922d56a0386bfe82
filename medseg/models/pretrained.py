"""Pretrained weights into a network: all of them, or an error that says which names and shapes do not fit.

Only training calls this, and only at its start: a bundle holds its own weights, a resumed run its checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.files import UserError, sha256_file
from medseg.ingest.download import Expected, Patience, download

HUB = "hub"
_HUB_URL = "https://download.pytorch.org/models/"
# ImageNet weights, version 1, as torchvision publishes them for 3 channels and 1000 classes. A file's name ends with
# the first eight digits of its SHA-256.
_HUB_FILES = {
    "densenet121": "densenet121-a639ec97.pth",
    "densenet169": "densenet169-b2777c0a.pth",
    "densenet201": "densenet201-c1103571.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "vgg19_bn": "vgg19_bn-c79401a0.pth",
    "inception_v3": "inception_v3_google-0cc3c7bd.pth",
    "squeezenet1_0": "squeezenet1_0-b66bff10.pth",
    "squeezenet1_1": "squeezenet1_1-b8a52dc0.pth",
    "mobilenet_v2": "mobilenet_v2-b0353104.pth",
}
_MOST_NAMED = 6
PATIENCE = Patience(attempts=3)


@dataclass(frozen=True)
class Pretrained:
    """What was loaded.

    Attributes:
        source: the file, or its address. sha256: of the file.
        loaded: how many weights and buffers were set. skipped: names of the network's that kept their random values.
        summed: names of convolutions made for 3 channels whose weights were summed for an image of one.
    """

    source: str
    sha256: str
    loaded: int
    skipped: tuple[str, ...]
    summed: tuple[str, ...]


def load_pretrained(net: nn.Module, config: NetworkConfig) -> Pretrained | None:
    """Set the weights of `net` to those that `config.weights` names; None when it names none.

    A convolution of the file over 3 channels, where the network has one over 1, is summed over them: on a grey image
    given three times it is the same function.

    Raises:
        UserError: no such file, another hash than expected, or a name or shape that does not fit. Nothing is set then.
    """
    if config.weights is None:
        return None
    path, source = _hub_file(config) if config.weights == HUB else (Path(config.weights), config.weights)
    sha256 = _checked_hash(path, config)
    found = _named_for(net, _read(path))
    wanted = net.state_dict()
    for entry in config.weights_skip:
        if not any(_under(name, entry) for name in (*wanted, *found)):
            raise UserError(f"model.weights_skip {entry!r} names nothing in the network or in {path}; remove it.")
    found = {name: value for name, value in found.items() if not _skipped(name, config)}
    found, summed = _summed_to_grey(net, found)
    skipped = tuple(name for name in wanted if _skipped(name, config))
    # A counter that only a batch norm without momentum reads; older files do not have it.
    optional = {name for name in wanted if name.endswith(".num_batches_tracked")}
    _check_match({n: v for n, v in wanted.items() if n not in skipped}, found, optional, path)
    net.load_state_dict(found, strict=False)
    return Pretrained(source, sha256, len(found), skipped, summed)


def _hub_file(config: NetworkConfig) -> tuple[Path, str]:
    """The published file in torch's own cache, downloaded if it is not there yet, and its address."""
    name = _HUB_FILES.get(config.variant)
    if name is None:
        raise UserError(
            f"model.weights 'hub': none are published for {config.variant}; name a file, or choose one of "
            f"{', '.join(_HUB_FILES)}."
        )
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    url = _HUB_URL + name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            download([url], target, Expected(), progress=lambda *_: None, patience=PATIENCE)
        except UserError as error:
            raise UserError(
                f"model.weights 'hub': {url} cannot be had ({error}); without a network put the file at {target}, or "
                "name a local file."
            ) from error
    return target, url


def _checked_hash(path: Path, config: NetworkConfig) -> str:
    if not path.is_file():
        raise UserError(f"model.weights {str(path)!r} is no file; name a safetensors or torch file, or 'hub'.")
    sha256 = sha256_file(path)
    if config.weights == HUB and not sha256.startswith(digits := path.stem.rpartition("-")[2]):
        raise UserError(f"{path} has SHA-256 {sha256}, published as {digits}…; remove it to download it again.")
    if config.weights_sha256 is None and config.weights != HUB and path.suffix != ".safetensors":
        raise UserError(f"model.weights {str(path)!r} is a torch file and needs model.weights_sha256; it has {sha256}.")
    if config.weights_sha256 not in (None, sha256):
        raise UserError(
            f"{path} has SHA-256 {sha256}, not model.weights_sha256 {config.weights_sha256}; take the file that was "
            "meant, or correct the hash if you know where this one comes from."
        )
    return sha256


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; of a checkpoint with several parts, the weights."""
    from safetensors.torch import load_file

    try:
        tree: Any = (
            load_file(path, device="cpu")
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged or foreign file raises nearly anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model.weights {str(path)!r} cannot be read as weights alone ({reason}).") from error
    for part in ("state_dict", "model_state_dict", "model"):
        if isinstance(tree, Mapping) and isinstance(tree.get(part), Mapping):
            tree = tree[part]
    named = dict(tree) if isinstance(tree, Mapping) else {}
    if not named or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in named.items()):
        raise UserError(f"model.weights {str(path)!r} holds no table of named tensors; save net.state_dict().")
    if bad := next((n for n, v in named.items() if v.is_floating_point() and not torch.isfinite(v).all()), None):
        raise UserError(f"model.weights {str(path)!r}: {bad} is not finite; the file is damaged.")
    return named


def _named_for(net: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under the network's names, where the difference is known.

    That is a wrapper's prefix which every name carries (`module.`, of data-parallel training), and torchvision's names
    of a DenseNet's layers.
    """
    own = {name.partition(".")[0] for name in net.state_dict()}
    named = dict(found)
    while True:
        heads = {name.partition(".")[0] for name in named}
        if len(heads) != 1 or heads <= own or not all("." in name for name in named):
            break
        named = {name.partition(".")[2]: value for name, value in named.items()}
    if hasattr(net, "class_layers"):  # also where it is a backbone, without a head
        named = {_densenet_name(name): value for name, value in named.items()}
    return named


def _densenet_name(name: str) -> str:
    """torchvision's name of a weight, of today or of its first versions, as MONAI calls it."""
    parts = name.split(".")
    if parts[0] == "classifier":
        return ".".join(["class_layers", "out", parts[-1]])
    if len(parts) > 3 and parts[2].startswith("denselayer") and parts[3] != "layers":
        rest = parts[3:] if parts[3][-1].isdigit() else [parts[3] + parts[4], *parts[5:]]  # norm1, once norm.1
        return ".".join([*parts[:3], "layers", *rest])
    return name


def _summed_to_grey(net: nn.Module, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    named, summed = dict(found), []
    for module_name, module in net.named_modules():
        name = f"{module_name}.weight"
        if not isinstance(module, nn.Conv2d | nn.Conv3d) or module.in_channels != 1 or name not in named:
            continue
        shape, own = named[name].shape, module.weight.shape
        if len(shape) == len(own) and shape[1] == 3 and (shape[0], *shape[2:]) == (own[0], *own[2:]):
            named[name] = named[name].sum(1, keepdim=True)
            summed.append(name)
    return named, tuple(summed)


def _check_match(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], optional: set[str], path: Path) -> None:
    missing = [name for name in wanted if name not in found and name not in optional]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise UserError(
            f"model.weights {str(path)!r} do not fit the network: {', '.join(problems)}; take the network they are of, "
            "or leave out what is meant to be new, such as the head, by name in model.weights_skip."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", …" if len(names) > _MOST_NAMED else "")


def _under(name: str, entry: str) -> bool:
    return name == entry or name.startswith(entry + ".")


def _skipped(name: str, config: NetworkConfig) -> bool:
    return any(_under(name, entry) for entry in config.weights_skip)
