"""Read data files (JSON lines, JSON lists, Parquet) record by record in bounded memory."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from spin.data.counts import Counts
from spin.runtime.errors import UserError, brief, explaining

MAX_RECORD = 2**26  # bytes of one record; a longer one is not a conversation
TOO_LONG = f"a record of more than {MAX_RECORD >> 20} MiB"
MAX_OBJECT = 2**30  # bytes of a file that is one JSON object, which must be read as a whole
CHUNK = 2**20  # characters of a JSON list read at a time
ROWS = 64  # rows of a Parquet file decoded at a time; a small file may repeat a long text many times
FIX = "fix it, or save one record per line as .jsonl"
UTF8 = "convert it to UTF-8, for example with iconv -f latin1 -t utf-8"
# Signatures at the start of files.
UTF16 = (b"\xff\xfe", b"\xfe\xff")
COMPRESSED = (b"\x1f\x8b", b"(\xb5/\xfd", b"BZh", b"\xfd7zX", b"PK\3\4")
DECODER = json.JSONDecoder()
# The delimiter before the first or next item of a JSON list, and the list's end.
FIRST = re.compile(r"\s*\[\s*"), re.compile(r"\s*\[\s*\]")
NEXT = re.compile(r"\s*,\s*"), re.compile(r"\s*\]")

Located = Iterator[tuple[str, Any]]  # the location of a record, for errors, and the record


def read_file(path: Path, name: str, cut_counts: Counts | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, which errors call `name`.

    A .json file has a list of records, an object with records by id, or JSON lines; a .jsonl file has lines or a list.
    Parquet is recognised by its content. With `cut_counts`, a list may be truncated, which is counted there.

    Raises UserError if content is unreadable, with its line or record number, or if a record is larger than MAX_RECORD.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(UTF16 + COMPRESSED):
        advice = UTF8.replace("latin1", "utf-16") if head.startswith(UTF16) else "unpack it"
        raise UserError(f"{name}: compressed, or not UTF-8; {advice}")
    is_parquet = head == b"PAR1" or (path.suffix.lower() == ".parquet" and head.lstrip()[:1] not in (b"{", b"["))
    records = _read_parquet(path, name) if is_parquet else _read_json(path, name, cut_counts)
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: a record must be a JSON object, not {brief(json.dumps(record), 60)}")
        yield record


def _read_json(path: Path, name: str, cut_counts: Counts | None) -> Located:
    with path.open("rb") as file, explaining(f"{name}: not UTF-8", UTF8, UnicodeDecodeError):
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        lines = (line for line in iter(partial(file.readline, MAX_RECORD + 1), b"") if line.strip())
        first, second = next(lines, b""), next(lines, b"")
        file.seek(start)
        if first.lstrip().startswith(b"["):
            yield from _list_items(io.TextIOWrapper(file, "utf-8", newline=""), name, cut_counts)
        elif path.suffix.lower() != ".json" or (second and _is_json(first)):
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
            raise UserError(f"{where}: {TOO_LONG}; remove it")
        if line.strip():
            with explaining(f"{where}: not a line of UTF-8", UTF8, UnicodeDecodeError):
                text = line.decode()
            with explaining(f"{where}: not a line of JSON", "fix or remove it"):
                record = json.loads(text)
            yield where, record


def _list_items(file: TextIO, name: str, cut_counts: Counts | None) -> Located:
    """Yield the items of a list, keeping one item or CHUNK characters in memory."""
    text, start, line, number = "", 0, 1, 0  # `text` begins on `line`, and the next item at `start`
    mark, end = FIRST
    while not (closing := end.match(text, start)):
        try:
            item, after = _next_item(text, start, mark)
        except (json.JSONDecodeError, RecursionError) as error:
            reason, position = getattr(error, "msg", "nested too deep"), getattr(error, "pos", start)
            is_too_long = len(text) - start > MAX_RECORD
            is_misplaced = mark.match(text, start) is None and bool(text[start:].strip())
            if is_too_long:
                reason += f", or {TOO_LONG}"
            problem = _not_json(name, reason, line + text.count("\n", 0, position))
            line += text.count("\n", 0, start)
            text, start = text[start:], 0
            if isinstance(error, RecursionError) or is_too_long or is_misplaced:
                raise problem from error
            if more := file.read(max(CHUNK, len(text))):
                text += more
            elif cut_counts is None:
                raise problem from error
            else:
                cut_counts["read"] += 1
                cut_counts.drop("truncated record", {"file": name})
                return
        else:
            number += 1
            yield f"{name}: record {number}", item
            start, (mark, end) = after, NEXT
    more_parts = iter(partial(file.read, CHUNK), "")
    tail = text[closing.end() :]
    if tail.strip() or any(part.strip() for part in more_parts):
        position = len(text) - len(tail.lstrip())
        raise _not_json(name, "Extra data after the list", line + text.count("\n", 0, position))


def _next_item(text: str, start: int, mark: re.Pattern[str]) -> tuple[Any, int]:
    """Return the item after the delimiter at `start`, and the position of its end. Raises JSONDecodeError."""
    before = mark.match(text, start)
    if before is None:
        raise json.JSONDecodeError("Expecting ',' delimiter", text, len(text) - len(text[start:].lstrip()))
    return DECODER.raw_decode(text, before.end())


def _not_json(name: str, reason: str, line: int) -> UserError:
    return UserError(f"{name}: not JSON ({reason}: line {line}); {FIX}.")


def _object_items(file: BinaryIO, name: str) -> Located:
    """Yield the values of a JSON object that holds records by id."""
    raw = file.read(MAX_OBJECT + 1)
    if len(raw) > MAX_OBJECT:
        raise UserError(f"{name}: a JSON object of more than {MAX_OBJECT >> 30} GiB; {FIX}")
    text = raw.decode()
    with explaining(f"{name}: not JSON", FIX):
        records = json.loads(text)
    if not isinstance(records, dict) or not records or not all(isinstance(item, dict) for item in records.values()):
        raise UserError(f"{name}: holds no records (a list of objects, or an object of objects)")
    for number, record in enumerate(records.values(), start=1):
        yield f"{name}: record {number}", record


def _read_parquet(path: Path, name: str) -> Located:
    import pyarrow.parquet

    with explaining(f"{name}: no parquet file that can be read"), pyarrow.parquet.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if group.total_byte_size > MAX_RECORD * max(1, group.num_rows):
                raise UserError(f"{name}: records of more than {MAX_RECORD >> 20} MiB; remove them")
        for batch in file.iter_batches(batch_size=ROWS):
            batch.validate(full=True)
            yield from ((name, record) for record in batch.to_pylist())
