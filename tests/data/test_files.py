"""Data files named .json and .jsonl, whatever their actual format, are read in bounded memory."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.data import files
from spin.data.counts import Counts
from spin.data.files import read_file
from spin.runtime.errors import UserError

ROWS = [{"prompt": f"What is {n}? é ☃", "response": ["a", {"b": None}], "n": n * 1.5} for n in range(30)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ROOT = Path(__file__).parents[2]


def read(path, cut_counts=None):
    return list(read_file(path, path.name, cut_counts))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_json_kind_is_detected_by_content(tmp_path, monkeypatch, suffix, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    path = tmp_path / f"rows{suffix}"
    texts = [LINES, f"\n\n{LINES}", LINES.rstrip(), json.dumps(ROWS), json.dumps(ROWS, indent=2, ensure_ascii=False)]
    for text in (*texts, *(f"\ufeff{text}" for text in texts), LINES.replace("\n", "\r\n")):
        path.write_bytes(text.encode())
        assert read(path) == ROWS
    path.write_text("[]")
    assert read(path) == []


@pytest.mark.parametrize("indent", [None, 1])
def test_object_of_records_by_id(tmp_path, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({str(n): row for n, row in enumerate(ROWS)}, indent=indent))
    assert read(path) == ROWS


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize("text", ['[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[,{"a": 1}]', '[{"a": 1}] x', '[{"a": 1}]]',
                                  '[{"a": 1}', '[{"a": 1},', "[", '[{"a"', '[{"a": tru}]', '[{"a": 1}, {"a": "\\x"}]'])  # fmt: skip
def test_strict_lists(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^rows.json: not JSON \(.*line 1\); fix it"):
        read(path)


def test_line_of_the_error(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1).replace('"n": 30.0', '"n": ?'))
    line = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if "?" in line and '"n"' in line)
    with pytest.raises(UserError, match=rf"Expecting value: line {line}\)"):
        read(path)


@pytest.mark.parametrize("end", ["", ",", ', {"prompt', ', {"prompt": "a"'])
def test_truncated_list(tmp_path, end):
    path, counts = tmp_path / "rows.json", Counts()
    path.write_text(json.dumps(ROWS).removesuffix("]") + end)
    assert read(path, counts) == ROWS and counts == {"read": 1, "truncated record": 1}
    path.write_text(json.dumps(ROWS))
    assert read(path, counts) == ROWS and counts.total() == 2


def test_misplaced_text_in_a_list(tmp_path):
    """A missing comma is an error even if the list may be truncated, and text after the list is located."""
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}\n\n{"b": 2}]')
    for counts in (None, Counts()):
        with pytest.raises(UserError, match=r"Expecting ',' delimiter: line 3\)"):
            read(path, counts)
    path.write_text('[{"a": 1}\n]\n\nx')
    with pytest.raises(UserError, match=r"Extra data after the list: line 4\)"):
        read(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "lines.json", "list.jsonl"])
def test_other_encodings(tmp_path, name):
    path, text = (
        tmp_path / name,
        LINES if name in ("rows.jsonl", "lines.json") else json.dumps(ROWS, ensure_ascii=False),
    )
    path.write_bytes(text.replace("☃", "").encode("latin-1"))
    with pytest.raises(UserError, match=r"not (a line of )?UTF-8 .*; convert it to UTF-8, for example with iconv"):
        read(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.parquet"])
def test_file_type_is_detected_by_content(tmp_path, name):
    path = tmp_path / name
    path.write_text(LINES)
    assert read(path) == ROWS
    path.write_text(LINES.splitlines()[0])
    assert read(path) == ROWS[:1]
    pq.write_table(pa.table({"prompt": ["é"]}), path)
    assert read(path) == [{"prompt": "é"}]


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (gzip.compress(LINES.encode()), "unpack it"),
        (LINES.encode("utf-16"), "convert it to UTF-8, for example with iconv -f utf-16 -t utf-8"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_files_that_are_not_text(tmp_path, name, content, advice):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{name}: compressed, or not UTF-8; {advice}$"):
        read(tmp_path / name)


BOMBS = {
    "long line": lambda path: path.with_suffix(".jsonl").write_bytes(b'{"prompt": "' + b"x" * 2 * 10**8 + b'"}\n'),
    "long item": lambda path: path.with_suffix(".json").write_bytes(b'[{"prompt": "' + b"x" * 2 * 10**8 + b'"}]'),
    "deep line": lambda path: path.with_suffix(".jsonl").write_bytes(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "deep item": lambda path: path.with_suffix(".json").write_bytes(b"[" * 10**5 + b"]" * 10**5),
    "long cell": lambda path: inflate(path, ["x" * 2 * 10**8]),
    "long cells": lambda path: inflate(path, ["x" * 10**7] * 1000),
    "many rows": lambda path: inflate(path, ["x" * 10**5] * 50_000),
}


def inflate(path: Path, texts: list[str]) -> None:
    """Write a small Parquet file that holds large texts."""
    values = pa.array(dict.fromkeys(texts))
    column = pa.DictionaryArray.from_arrays(pa.array([0] * len(texts), pa.int32()), values)
    table = pa.table({"prompt": column.cast(pa.string()) if len(texts) == 1 else column})
    pq.write_table(table, path.with_suffix(".parquet"), compression="zstd")


READ = """
import sys
from pathlib import Path
from spin.data.files import read_file
from spin.runtime.errors import UserError
path = Path(sys.argv[1])
rows = 0
try:
    for row in read_file(path, path.name):
        rows += 1
        if rows == 5000:
            break
except UserError as error:
    print("refused:", error)
status = Path("/proc/self/status").read_text()
print(rows, int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(tmp_path, bomb):
    BOMBS[bomb](tmp_path / "bomb")
    (path,) = tmp_path.iterdir()
    result = subprocess.run([sys.executable, "-c", READ, path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    *errors, last_line = result.stdout.splitlines()
    rows, mib = map(int, last_line.split())
    assert mib < 1500, (bomb, mib)
    assert rows == {"long cells": 1000, "many rows": 5000}.get(bomb, 0) and bool(errors) == (rows == 0)
    assert all(line.startswith(f"refused: {path.name}") and len(line) < 500 for line in errors)
