"""What lies in a bundle's folder, and the hashes that vouch for it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.files import UserError, dump_json, plain, sha256_file

SCHEMA_VERSION, JOINED_VERSION = 1, 2
WEIGHTS = "weights.safetensors"
VERDICT, EXPLANATION, DISTANCE = "verdict.json", "explanation.json", "distance.safetensors"
LUNGS = "lungs"
ABOUT = ("config.yaml", "plan.yaml", "MODEL_CARD.md")


def digest(facts: Mapping[str, Any]) -> str:
    """Hash over all facts but the hash itself, independent of their order."""
    tree = plain({name: value for name, value in facts.items() if name != "sha256"})
    return hashlib.sha256(dump_json(sorted(tree.items())).encode()).hexdigest()


def verify(folder: Path, facts: Any) -> None:
    """Raises UserError when `bundle.json`, whose content are the facts, or a file differs from what was written."""
    where = folder / "bundle.json"
    if not isinstance(facts, dict) or facts.get("schema_version") not in (SCHEMA_VERSION, JOINED_VERSION):
        known = f"{SCHEMA_VERSION} or {JOINED_VERSION}"
        raise UserError(f"{where} is not of schema version {known}; train the model with this version.")
    needed = {*ABOUT, *(member["weights"] for member in facts.get("members") or ({"weights": WEIGHTS},))}
    if facts.get("sha256") != digest(facts) or not _whole(facts.get("files"), needed):
        raise UserError(f"{where} was changed since the bundle was made; copy the bundle again from its run.")
    for name, recorded in facts["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the bundle again from its run.")
        if sha256_file(path) != recorded:
            raise UserError(f"{path} differs from its hash in bundle.json; copy the bundle again from its run.")


def _whole(files: object, needed: set[str]) -> bool:
    """Every needed file is listed, and none that lies elsewhere."""
    return isinstance(files, dict) and needed <= set(files) and all(Path(name).name == name for name in files)
