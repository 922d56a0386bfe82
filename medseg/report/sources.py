"""What the pages read: JSON, YAML and CSV files, and text that may be shown outside this machine."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from medseg.files import UserError, read_json, read_rows


def read_mapping(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object; `missing` where there is no file, if given.

    Raises:
        UserError: the file is damaged or holds something else, or is missing.
    """
    if missing is not None and not path.is_file():
        return missing
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; run the step that writes it again.")
    return content


def read_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects; empty where there is no file. Raises UserError when it is something else."""
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UserError(f"{path} holds no JSON list of objects; run the step that writes it again.")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; empty where there is no file. Raises UserError when it is not YAML."""
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); restore it.") from error
    return tree if isinstance(tree, dict) else {}


def read_history(path: Path) -> list[dict[str, float]]:
    """`history.csv` as one mapping per epoch, without the figures that were not measured in it."""
    if not path.is_file():
        return []
    try:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in read_rows(path)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds a cell that is no number ({error}); restore it.") from error


def simulated_cohort(images: Iterable[str]) -> bool:
    """Whether the first image lies in a cohort of simulated subjects."""
    for image in images:
        about = read_mapping(Path(image).parent.parent / "cohort.json", missing={})
        return bool((about.get("provenance") or {}).get("simulated"))
    return False


def without_folders(text: str) -> str:
    """Absolute paths reduced to their last part: a page may travel further than the folders it speaks of."""
    return re.sub(r"(?<![\w./])/(?:[^\s/:;,'\"()]+/)+(?=[^\s/])", "", text)
