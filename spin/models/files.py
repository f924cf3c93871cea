"""Read the files of a model folder, and report what is wrong with them in one line."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spin.runtime.errors import UserError, brief, user_message


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in `path`. Errors call the model `name`."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError includes invalid UTF-8
        raise UserError(f"{name}: cannot read its {path.name} as JSON ({brief(error)}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: its {path.name} must hold a JSON object, but holds one {type(value).__name__}.")
    return value


def safetensors_keys(path: Path, name: str) -> list[str]:
    """The tensor names in `path`. Reads only the header, and checks that the file has the length that it states."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{name}: its {brief(path.name)} is broken ({brief(error)}); download or copy it again."
        ) from error


@contextlib.contextmanager
def library_errors(problem: str, advice: str = "") -> Iterator[None]:
    """Turn any exception of a library that reads a user's files into "`problem` (exception)`advice`.".

    Exceptions that have a message of their own (`user_message`: out of memory, disk full) pass unchanged.
    """
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        if user_message(error) is not None:
            raise
        raise UserError(f"{problem} ({brief(error, 300)}){advice}.") from error
