"""Read the offline files of W&B's client: `run-<id>.wandb`, a LevelDB log of protobuf records.

After a header of 7 bytes, blocks of 32 KiB contain chunks: checksum (4 bytes), length (2), kind (1: a whole record, 2: its
first part, 3: a middle part, 4: the last part).
"""

import json
from pathlib import Path

BLOCK, HEADER = 32768, 7


def records(path: Path) -> list:
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, parts, result = path.read_bytes(), HEADER, b"", []
    while offset + HEADER <= len(data):
        if BLOCK - offset % BLOCK < HEADER:  # padding
            offset += BLOCK - offset % BLOCK
            continue
        size, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        parts += data[offset + HEADER : offset + HEADER + size]
        offset += HEADER + size
        if kind in (1, 4):
            result.append(Record.FromString(parts))
            parts = b""
    return result


class Log:
    """An offline run: its id, group, rows of history in order, summary, exit code and artifacts."""

    def __init__(self, folder: Path):
        (path,) = folder.glob("run-*.wandb")
        self.rows: list[dict] = []
        self.summary: dict = {}
        self.artifacts: dict[str, list[str]] = {}
        self.exit_code: int | None = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, self.group, self.name = record.run.run_id, record.run.run_group, record.run.display_name
                self.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                self.rows.append(items(record.history.item))
            elif kind == "summary":
                self.summary |= items(record.summary.update)
            elif kind == "artifact":
                self.artifacts[record.artifact.name] = [entry.path for entry in record.artifact.manifest.contents]
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def items(entries) -> dict:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def runs(folder: Path) -> list[Log]:
    """Return the offline runs in a run's folder, oldest first."""
    return [
        Log(path) for path in sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    ]
