"""Read the files of a model folder, and report errors in them in one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from spin.runtime.errors import UserError, brief, explaining


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises UserError, which calls the model `name`."""
    with explaining(f"{name}: cannot read its {path.name} as JSON"):
        value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{name}: its {path.name} must hold a JSON object.")
    return value


def safetensors_shapes(path: Path, name: str) -> dict[str, list[int]]:
    """Return the shapes of the tensors in `path` by name, from its header. Raises UserError if it is incomplete."""
    problem = f"{name}: its {brief(path.name)} is broken"
    with explaining(problem, "download or copy it again"), safe_open(path, "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}
