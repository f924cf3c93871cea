"""Data files: JSON lines, JSON lists and Parquet, read record by record in bounded memory."""

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from spin.data.counts import drop
from spin.runtime.errors import UserError, explaining

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".parquet")
MAX_RECORD = 2**26  # bytes of one record: a longer one is no conversation
MAX_OBJECT = 2**30  # bytes of a file that is one JSON object, which has to be read at once
CHUNK = 2**20  # characters of a JSON list that are read together
ROWS = 64  # of a Parquet file that are decoded together: a small file may hold the same long text many times
FIX = "fix it, or save one record per line as .jsonl"
UTF8 = "convert it to UTF-8, for example with iconv -f latin1 -t utf-8"
# The first bytes of files.
UTF16 = (b"\xff\xfe", b"\xfe\xff")
COMPRESSED = (b"\x1f\x8b", b"(\xb5/\xfd", b"BZh", b"\xfd7zX", b"PK\3\4")
_BLANKS = re.compile(r"\s*")

Located = Iterator[tuple[str, Any]]  # where a record stands, and the record


def read_file(path: Path, name: str, cut_counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; `name` stands for it in errors.

    A .json file holds a list of records, an object of records by id, or JSON lines; a .jsonl file JSON lines or a list.
    Parquet is known by its content.
    With `cut_counts`, a list may be cut off, which is counted there.

    Raises UserError: unreadable content, with its line or the number of its record, or a record over MAX_RECORD.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(UTF16 + COMPRESSED):
        advice = UTF8.replace("latin1", "utf-16") if head.startswith(UTF16) else "unpack it"
        raise UserError(f"{name}: compressed, or not UTF-8; {advice}")
    is_parquet = head == b"PAR1" or (path.suffix.lower() == ".parquet" and head.lstrip()[:1] not in (b"{", b"["))
    read = _read_parquet if is_parquet else _read_json
    for where, record in read(path, name, cut_counts):
        if not isinstance(record, dict):
            raise UserError(f"{where}: a record is a JSON object, this is a {type(record).__name__}")
        yield record


def _read_json(path: Path, name: str, cut_counts: Counter[str] | None) -> Located:
    has_lines = path.suffix.lower() != ".json"
    with path.open("rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        lines = (line for line in iter(partial(file.readline, MAX_RECORD + 1), b"") if line.strip())
        first, second = next(lines, b""), next(lines, b"")
        file.seek(start)
        if first.lstrip().startswith(b"["):
            yield from _list_items(file, name, cut_counts)
        elif has_lines or (second and _is_json(first)):
            yield from _lines(file, name)
        else:
            yield from _object_items(file, name)


def _is_json(line: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        json.loads(line.decode(errors="replace"))
        return True
    return False


def _lines(file: BinaryIO, name: str) -> Located:
    for number, line in enumerate(iter(partial(file.readline, MAX_RECORD + 1), b""), start=1):
        where = f"{name}:{number}"
        if len(line) > MAX_RECORD:
            raise UserError(f"{where}: a record of more than {MAX_RECORD >> 20} MiB; remove it")
        if line.strip():
            with explaining(f"{where}: not a line of UTF-8", UTF8, UnicodeDecodeError):
                text = line.decode()
            with explaining(f"{where}: not a line of JSON", "fix or remove it"):
                record = json.loads(text)
            yield where, record


class _Scanner:
    """A JSON text, read in chunks: what was read is dropped, so that one value or CHUNK characters are in memory."""

    def __init__(self, file: BinaryIO, name: str):
        self.reader, self.name, self.decoder = io.TextIOWrapper(file, "utf-8", newline=""), name, json.JSONDecoder()
        self.text, self.position, self.line = "", 0, 1

    def read_more(self) -> bool:
        """Read as much as there is left of the text, at least a chunk; False at the end."""
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :], 0
        with explaining(f"{self.name}: not UTF-8", UTF8, UnicodeDecodeError):
            chunk = self.reader.read(max(CHUNK, len(self.text)))
        self.text += chunk
        return bool(chunk)

    def mark(self) -> str:
        """Move to the next character that is no blank and return it; "" at the end."""
        while True:
            self.position = _BLANKS.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text) or not self.read_more():
                return self.text[self.position : self.position + 1]

    def value(self) -> Any:
        """Read the next value. Raises EOFError if the text ends in it."""
        self.mark()
        while True:
            try:
                value, self.position = self.decoder.raw_decode(self.text, self.position)
                return value
            except RecursionError:
                self.fail("nested too deep", self.position)
            except json.JSONDecodeError as error:
                position, reason = error.pos - self.position, error.msg
            if len(self.text) > MAX_RECORD:
                self.fail(f"{reason}, or a record of more than {MAX_RECORD >> 20} MiB", self.position + position)
            if not self.read_more():
                raise EOFError(f"{reason}: line {self.line + self.text.count(chr(10), 0, position)}")

    def fail(self, reason: str, position: int) -> NoReturn:
        line = self.line + self.text.count("\n", 0, position)
        raise UserError(f"{self.name}: not JSON ({reason}: line {line}); {FIX}.")


def _list_items(file: BinaryIO, name: str, cut_counts: Counter[str] | None) -> Located:
    scanner, number = _Scanner(file, name), 0
    scanner.mark()
    scanner.position += 1  # the list's "["
    mark = scanner.mark()
    try:
        while mark != "]":
            number += 1
            yield f"{name}: record {number}", scanner.value()
            if (mark := scanner.mark()) == ",":
                scanner.position += 1
            elif mark == "":
                raise EOFError(f"Expecting ',' delimiter: line {scanner.line}")
            elif mark != "]":
                scanner.fail("Expecting ',' delimiter", scanner.position)
    except EOFError as error:
        if cut_counts is None:
            raise UserError(f"{name}: not JSON ({error}); {FIX}.") from error
        cut_counts["read"] += 1
        drop(cut_counts, "truncated record", {"file": name})
        return
    scanner.position += 1
    if scanner.mark():
        scanner.fail("Extra data after the list", scanner.position)


def _object_items(file: BinaryIO, name: str) -> Located:
    """The values of an object that holds records by id."""
    raw = file.read(MAX_OBJECT + 1)
    if len(raw) > MAX_OBJECT:
        raise UserError(f"{name}: a JSON object of more than {MAX_OBJECT >> 30} GiB; {FIX}")
    with explaining(f"{name}: not UTF-8", UTF8, UnicodeDecodeError):
        text = raw.decode()
    with explaining(f"{name}: not JSON", FIX):
        records = json.loads(text)
    if not isinstance(records, dict) or not records or not all(isinstance(item, dict) for item in records.values()):
        raise UserError(f"{name}: holds no list of records, but a {type(records).__name__}; make it a list of objects")
    yield from ((f"{name}: record {number}", record) for number, record in enumerate(records.values(), start=1))


def _read_parquet(path: Path, name: str, cut_counts: Counter[str] | None) -> Located:
    import pyarrow.parquet

    with explaining(f"{name}: no parquet file that can be read"), pyarrow.parquet.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if group.total_byte_size > MAX_RECORD * max(1, group.num_rows):
                raise UserError(f"{name}: records of more than {MAX_RECORD >> 20} MiB; remove them")
        for batch in file.iter_batches(batch_size=ROWS):
            batch.validate(full=True)
            yield from ((name, record) for record in batch.to_pylist())
