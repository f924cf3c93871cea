"""Dataclass rows in Arrow tables, in memory or memory-mapped. A row is created when it is read."""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Row = TypeVar("Row", covariant=True)
Item = TypeVar("Item", covariant=True)
TYPES = {str: pa.string(), int: pa.int64(), tuple[int, ...]: pa.list_(pa.int32())}
BLOCK = 1024  # rows that are read together
BATCH_BYTES = 2**24  # size of a file's record batches: reading a row maps little else


class Lazy(Sequence[Item], Generic[Item]):
    """A sequence of `size` items, each computed by `make(index)` when it is read. It has no slices."""

    def __init__(self, size: int, make: Callable[[int], Item]):
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.make(range(self.size)[index])


class Rows(Sequence[Row], Generic[Row]):
    """Rows of the dataclass `type` in record batches: all rows, or those at `indices`, in that order.

    Lists are read as tuples. For batches in a memory-mapped file, `mapped` is the mapping and `path` the file.
    """

    def __init__(
        self,
        type: type[Row],
        batches: Sequence[pa.RecordBatch],
        indices: np.ndarray | None = None,
        mapped: mmap.mmap | None = None,
        path: Path | None = None,
    ):
        self.type, self.batches, self.mapped, self.path = type, batches, mapped, path
        self.names = [field.name for field in fields(cast(Any, type))]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.indices = np.arange(self._starts[-1]) if indices is None else indices

    @staticmethod
    def of(type: type[Any], rows: Sequence[Any]) -> "Rows[Any]":
        """Return `rows` unchanged if they are Rows, otherwise converted to Arrow in memory."""
        if isinstance(rows, Rows):
            return rows
        blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
        schema = schema_of(type)
        return Rows(type, [pa.RecordBatch.from_pylist([vars(row) for row in block], schema=schema) for block in blocks])

    @staticmethod
    def open(type: type[Any], path: Path, indices: np.ndarray | None = None) -> "Rows[Any]":
        """Memory-map a file that `write_arrow` wrote."""
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        return Rows(type, [reader.get_batch(i) for i in range(reader.num_record_batches)], indices, mapped, path)

    def __reduce__(self) -> tuple:
        if self.path:
            return Rows.open, (self.type, self.path, self.indices)
        return Rows, (self.type, self.batches, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows[Row]": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.at(np.arange(len(self))[index])
        row = int(self.indices[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, row = self.batches[number], row - int(self._starts[number])
        return self.type(**{name: _value(batch.column(name)[row].as_py()) for name in self.names})

    def __iter__(self) -> Iterator[Row]:
        for table in self.blocks(self.names):
            for row in table.to_pylist():
                yield self.type(**{name: _value(value) for name, value in row.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(row == other_row for row, other_row in zip(self, other, strict=True))

    def __add__(self, other: "Rows[Any]") -> "Rows[Row]":
        """Concatenate two tables, or two selections of rows from one table."""
        if self.batches is other.batches:
            indices = np.concatenate([self.indices, other.indices])
            return Rows(self.type, self.batches, indices, self.mapped, self.path)
        batches = [batch for rows in (self, other) for table in rows.blocks(self.names) for batch in table.to_batches()]
        return Rows(self.type, batches)

    def at(self, positions: np.ndarray) -> "Rows[Row]":
        """Return the rows at `positions`, in this order, without a copy."""
        return Rows(self.type, self.batches, self.indices[positions], self.mapped, self.path)

    def gather(self, positions: np.ndarray, names: Sequence[str] | None = None) -> pa.Table:
        """Copy the columns `names` of the rows at `positions`, of which there is at least one, into one table.

        `Table.take` would first copy whole columns.
        """
        rows = self.indices[positions]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        parts, places = [], []
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            batch = self.batches[number].select(names or self.names)
            parts.append(batch.take(pa.array(rows[chosen] - self._starts[number])))
            places.append(chosen)
        table = pa.Table.from_batches(parts).combine_chunks()
        return table.take(np.argsort(np.concatenate(places)))

    def blocks(self, names: Sequence[str], size: int = BLOCK) -> Iterator[pa.Table]:
        """Yield the columns `names` of all rows, `size` rows at a time."""
        for count, start in enumerate(range(0, len(self), size), 1):
            yield self.gather(np.arange(start, min(start + size, len(self))), names)
            if self.mapped and count % 64 == 0:
                self.mapped.madvise(mmap.MADV_DONTNEED)  # pages that were read count as resident memory

    @property
    def table(self) -> pa.Table:
        """All rows as one table."""
        return pa.concat_tables([schema_of(self.type).empty_table(), *self.blocks(self.names)])

    def column(self, name: str) -> list[Any]:
        """Return a column of short values."""
        values = pa.chunked_array([batch.column(name) for batch in self.batches]).to_pylist() if self.batches else []
        return [values[i] for i in self.indices]

    def lengths(self, name: str) -> np.ndarray:
        """Return the lengths of the lists in a column, int64."""
        parts = [pc.list_value_length(batch.column(name)).to_numpy() for batch in self.batches]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)[self.indices]

    def first(self, name: str) -> list[int]:
        """Return the first item of every list in a column; none is empty."""
        return [item for table in self.blocks([name]) for item in pc.list_element(table[name], 0).to_pylist()]

    @cached_property
    def digest(self) -> str:
        """A hash of all ids and token ids, in order, and thus of texts, template and tokenizer."""
        digest = hashlib.sha256()
        names = [name for name in self.names if name == "id" or name.endswith("ids")]
        for table in self.blocks(names):
            for name in names:
                column = table[name]
                shape = column.to_pylist() if name == "id" else pc.list_value_length(column).to_pylist()
                digest.update(json.dumps([name, shape]).encode())
                if name != "id":
                    digest.update(pc.list_flatten(column).to_numpy().tobytes())
        return digest.hexdigest()


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def schema_of(type: type[Any]) -> pa.Schema:
    """Return the Arrow schema of a dataclass."""
    return pa.schema([(field.name, TYPES[cast(Any, field.type)]) for field in fields(type)])


def write_arrow(rows: Iterable[dict], schema: pa.Schema, path: Path) -> None:
    """Write rows one batch at a time, which takes memory of about BATCH_BYTES."""
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        batch: list[dict] = []
        size = 0
        for row in rows:
            batch.append(row)
            size += sum(len(value) for value in row.values() if isinstance(value, str | tuple))
            if size >= BATCH_BYTES or len(batch) == 8 * BLOCK:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch, size = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table as a Parquet file, through a Python file: Arrow's own writer prints a line if the disk fails."""
    with path.open("wb") as file:
        pq.write_table(table, file)


def read_parquet(type: type[Row], path: Path) -> Rows[Row]:
    """Read the columns of a dataclass from a Parquet file."""
    table = pq.read_table(path, columns=[field.name for field in fields(cast(Any, type))])
    return Rows(type, table.cast(schema_of(type)).to_batches(max_chunksize=8 * BLOCK))
