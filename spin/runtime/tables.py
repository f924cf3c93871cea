"""Dataclass rows as Parquet files, and a hash of their token ids."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def fingerprint(rows: Iterable[Any]) -> str:
    """Hash all ids and token ids of `rows`, in order: text, template and tokenizer count."""
    digest = hashlib.sha256()
    for row in rows:
        values = {f.name: getattr(row, f.name) for f in fields(row) if f.name == "id" or f.name.endswith("ids")}
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def write_parquet(rows: Sequence[Any], path: Path) -> None:
    """Write dataclass rows as a Parquet file, one column per field."""
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), path)


def with_tuples(row: dict) -> dict:
    """Return `row` with tuples in place of lists, as frozen dataclasses have them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
