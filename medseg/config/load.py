"""From YAML and `--set` to a validated tree, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medseg.config.tree import Config
from medseg.files import UserError, resource_dir

_WHOLE = ("labels", "segments")  # replaced, not merged, by a config that extends another


def load_config(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration from a path or from its name in configs/, apply `a.b=c` overrides, validate.

    Raises:
        UserError: no such file, not YAML, an unknown key or a wrong value; the sentence carries the field's path.
    """
    path = find_config(path_or_name)
    tree = _read_tree(path)
    for override in overrides:
        apply_override(tree, override)
        if override.startswith(("task=", "task.labels")):
            _forget_codes(tree, tree)
    return validate_config(tree, str(path))


def validate_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a plain tree. `source` is named in the error."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from error


def find_config(path_or_name: str | Path) -> Path:
    """The file meant by a path or a name. Raises UserError listing the names there are."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    named = resource_dir("configs") / f"{path_or_name}.yaml"
    if named.is_file():
        return named
    names = ", ".join(sorted(p.stem for p in resource_dir("configs").glob("*.yaml")))
    raise UserError(f"config {str(path_or_name)!r} is neither a file nor one of: {names}.")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every field shown."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, child: Path | None = None) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct the file.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of fields; see configs/ for examples.")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if child is not None:
        raise UserError(f"{path}: extends stands in a file that {child} extends already; one level is allowed.")
    sibling = path.parent / f"{parent}.yaml"
    below = _read_tree(sibling if sibling.is_file() else find_config(parent), path)
    _forget_codes(below, tree)
    return _merge(below, tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _changes_kind(old, value) and key not in _WHOLE:
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _forget_codes(tree: dict[str, Any], changed: Mapping[str, Any]) -> None:
    """Drop from `tree` the codes of labels that are not among the labels of `changed`, where it names any."""
    export, task = tree.get("export"), changed.get("task")
    segments = export.get("segments") if isinstance(export, dict) else None
    labels = task.get("labels") if isinstance(task, dict) else None
    if isinstance(segments, dict) and isinstance(labels, dict):
        tree["export"] = {**tree["export"], "segments": {name: segments[name] for name in segments if name in labels}}


def _changes_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in new and new["name"] != old.get("name")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in a plain tree. Raises UserError when it is malformed."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form field.path=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not YAML ({error}).") from error
    *parents, last = path.split(".")
    for parent in parents:
        branch = tree.setdefault(parent, {})
        if not isinstance(branch, dict):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a group of fields.")
        tree = branch
    tree[last] = value


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"]) or "config"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place} is not a known field; remove it or correct its name")
        elif problem["type"] == "missing":
            lines.append(f"{place} is required")
        else:
            shown = repr(problem["input"])
            value = f" (got {shown})" if len(shown) < 80 and not isinstance(problem["input"], dict) else ""
            lines.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}{value}")
    return f"{source}: " + "; ".join(lines) + "."
