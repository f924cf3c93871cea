"""Any data file gives one printable line that states the problem, or counts that add up; no file causes a hang."""

import errno
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spin.config.schema import DataConfig
from spin.data import examples, prose, templates
from spin.data.counts import Counts
from spin.data.sources import find_source
from spin.models import tiny
from spin.models import wheels as packages
from spin.runtime.errors import UserError

FORMATS = ["auto", "messages", "prompt", "alpaca", "sharegpt", "chitchat"]
ROWS = [
    {"id": f"x{n}_0", "messages": [{"role": "user", "content": f"Wie heißt {n}?"}, {"role": "gpt", "content": f"{n}."}]}
    for n in range(4)
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ROOT = Path(__file__).parents[2]


def read_records(config, cache):
    return find_source(config, cache).read(Counts())


def fuzz(examples: int) -> settings:
    """Return settings with the same examples every time, so that the last change caused a failure."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def check(tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def check(path, **changes):
        """Return the data set, or the error message, which contains the file's name or the setting."""
        config = DataConfig.from_defaults(path=str(path), **{"template": "paper", **changes})
        try:
            dataset = examples.load_dataset(config, tokenizer, {1}, 0, cache)
        except UserError as error:
            message = str(error)
            assert 10 < len(message) < 1000 and message.isprintable(), message
            assert Path(path).name in message or message.startswith("data"), message
            return message
        assert 2 * dataset.counts["read"] == sum(dataset.counts.values())
        assert dataset.counts["kept"] == len(dataset.train) + len(dataset.held_out) > 0
        return dataset

    return check


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def table() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, compression="none")
    return sink.getvalue().to_pybytes()


VALID = {".jsonl": JSONL, ".json": json.dumps(ROWS, ensure_ascii=False).encode(), ".parquet": table()}


def damage(draw, raw: bytes) -> bytes:
    """Return `raw` with some bytes replaced, inserted or removed."""
    offset = draw(st.integers(0, len(raw)))
    width = draw(st.sampled_from([0, 1, 4]))
    new = draw(st.binary(max_size=4) | st.sampled_from([b"\xff\xff\xff\x7f", b"\0", b"\n", b"\x80", b'"', b"{", b"]"]))
    return raw[:offset] + new + raw[offset + width :]


# ------------------------------------------------------------------------------------------------- any bytes


@fuzz(150)
@given(raw=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".parquet", ".JSON", ".txt", ""]))
def test_any_bytes(check, root, raw, suffix):
    path = root / f"bytes{suffix}"
    path.write_bytes(raw)
    check(path)


@pytest.mark.parametrize("suffix", VALID)
def test_truncated_anywhere(check, root, suffix):
    path, raw = root / f"cut{suffix}", VALID[suffix]
    path.write_bytes(raw)
    assert check(path).counts == {"read": 4, "kept": 4}
    for length in range(0, len(raw), 1 if suffix == ".jsonl" else 3):
        path.write_bytes(raw[:length])
        result = check(path)
        # Only JSON lines can be truncated to a valid file.
        assert isinstance(result, str) or suffix == ".jsonl"


@pytest.mark.parametrize("suffix", VALID)
@fuzz(150)
@given(draw=st.data())
def test_damaged_anywhere(check, root, suffix, draw):
    path = root / f"damaged{suffix}"
    path.write_bytes(damage(draw.draw, VALID[suffix]))
    check(path)


# --------------------------------------------------------------------------------------------- any JSON for a record


NAMES = st.sampled_from(
    "id messages conversations role from content value prompt response completion instruction input output text".split()
)
ROLES = st.sampled_from("user assistant system human gpt tool USER".split())
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**30, 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zs", "Po"]), max_size=4)
    | ROLES
    | st.sampled_from(["</s>", "<|end|>", " <|start|>", "\ud83d", "\ufeff", "x_30"])
)
SHAPE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=15,
)
TURN = st.fixed_dictionaries({}, optional={"role": ROLES | SHAPE, "from": ROLES, "content": SHAPE, "value": SHAPE})
TALK = st.lists(TURN | SHAPE, max_size=4) | st.lists(st.lists(st.fixed_dictionaries({"text": SHAPE})), max_size=3)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("messages", "conversations", "prompt"), TALK | SHAPE),
        **dict.fromkeys(("response", "completion", "instruction", "input", "output", "id"), SHAPE | TALK),
    },
)


@pytest.mark.parametrize("format", FORMATS)
@fuzz(30)
@given(
    records=st.lists(RECORD, min_size=1, max_size=4),
    valid_first=st.booleans(),
    changes=st.fixed_dictionaries(
        {
            "turns": st.sampled_from(["first", "all"]),
            "filter": st.sampled_from(["none", "prose"]),
            "template": st.sampled_from(["paper", "chat"]),
            "overlong": st.sampled_from(["drop", "cut"]),
        }
    ),
)
def test_any_json_as_records(check, root, format, records, valid_first, changes):
    path = root / "shapes.jsonl"
    valid_row = {"messages": ROWS[0]["messages"], "conversations": ROWS[0]["messages"], **dict.fromkeys(
        ("prompt", "response", "instruction", "output"), "Is it? It is.")}  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in [valid_row, *records][1 - valid_first :]))
    check(path, format=format, **changes)


@fuzz(50)
@given(shape=SHAPE)
def test_any_json_as_a_file(check, root, shape):
    for name, content in (("shape.json", shape), ("listed.json", {"rows": shape}), ("shape.jsonl", shape)):
        (root / name).write_text(json.dumps(content))
        check(root / name)


DEEP = 900
ODD = {
    "empty": (b"", "read: 0"),
    "blanks": (b" \n\t\r\n \n", "read: 0"),
    "bom": (b"\xef\xbb\xbf" + JSONL, 4),
    "crlf": (JSONL.replace(b"\n", b"\r\n"), 4),
    "no last line feed": (JSONL.rstrip(), 4),
    "line separators in a text": ('{"prompt": "a\u2028b\x85c", "response": "d"}\n'.encode(), 1),
    "utf-16": (JSONL.decode().encode("utf-16"), "odd.jsonl: compressed, or not UTF-8; .* -f utf-16"),
    "zero bytes": (b"\0" * 100, ":1: not a line of JSON"),
    "nan": (b'{"prompt": NaN, "response": Infinity}\n' + JSONL, 4),
    "huge integer": (b'{"prompt": "a", "response": "b", "n": ' + b"9" * 4000 + b"}", 1),
    "integer too long": (b'{"prompt": ' + b"9" * 5000 + b"}", "not a line of JSON"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d", "response": "b"}\n{"prompt": "a", "response": "b"}', 1),
    "deep": (b'{"prompt": "a", "response": "b", "x": ' + b"[" * DEEP + b"]" * DEEP + b"}", 1),
    "deep id": (b'{"id": ' + b"[" * DEEP + b"]" * DEEP + b', "conversations": []}', "no prompt: 1"),
    "too deep": (b"[" * 200_000, "nested too deep"),
    "too deep objects": (b'{"a":' * 100_000, "not a line of JSON"),
    "a very long line": (json.dumps({"prompt": "a", "response": "b " * 400_000}).encode(), "answer too long: 1"),
    "a very long broken line": (b'{"prompt": "' + b"x" * 8_000_000, "not a line of JSON"),
    "long column names": (json.dumps({"x" * 9999: 1, "\x1b[2J\n\ud800": 2}).encode(), "no known format has xxx"),
    "control characters": (json.dumps({"\x1b[2J\n\ud800\u202e": 2}).encode(), r"has \\x1b\[2J \\ud800\\u202e"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files(check, tmp_path, name):
    raw, expected = ODD[name]
    path = tmp_path / "odd.jsonl"
    path.write_bytes(raw)
    result = check(path)
    if isinstance(expected, int):
        assert not isinstance(result, str) and result.counts["kept"] == expected, result
    else:
        assert isinstance(result, str) and re.search(expected, result), result


# ------------------------------------------------------------------------------------------------- parquet columns


def columns() -> dict[str, pa.Array]:
    bad_text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    structs = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["x"])], names=["role", "role"])
    return {
        "integer": pa.array([1]),
        "null": pa.array([None]),
        "text": pa.array(["x"], pa.large_string()),
        "bad text": bad_text,
        "binary": pa.array([b"\xff\0"]),
        "struct": pa.array([{"role": "user", "content": "x"}]),
        "struct with a name twice": structs,
        "list of nulls": pa.array([[None, None]]),
        "list of structs": pa.array([[{"role": "user", "content": None}, None]]),
        "list of lists": pa.array([[["x"], None, []]]),
        "map": pa.array([[("role", "user")]], pa.map_(pa.string(), pa.string())),
        "dictionary": pa.array(["x"]).dictionary_encode(),
        "date out of range": pa.array([2**31 - 1], pa.date32()),
        "time out of range": pa.array([2**62], pa.duration("ms")),
        "no such time zone": pa.array([1], pa.timestamp("s", tz="No/Where")),
        "decimal": pa.array([None], pa.decimal128(38)),
        "nan": pa.array([float("nan")], pa.float16()),
    }


@pytest.mark.parametrize("name", columns())
def test_odd_parquet_columns(check, tmp_path, name):
    column, text = columns()[name], pa.array(["x"])
    path = tmp_path / "odd.parquet"
    reads = name not in ("bad text", "struct with a name twice") and not name.endswith(("range", "zone"))
    for format, parts in {
        "prompt": {"prompt": text, "response": column},
        "alpaca": {"instruction": column, "output": text},
        "messages": {"messages": column},
        "sharegpt": {"id": column, "conversations": column},
        "chitchat": {"messages": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), column)},
    }.items():
        pq.write_table(pa.table(parts), path)
        result = check(path, format=format)
        assert ("no parquet file that can be read" in str(result)) != reads, result
    pq.write_table(pa.table([text, text, column], names=["prompt", "response", "more"]), path)
    assert isinstance(check(path), str) != reads
    pq.write_table(pa.table([column, text, text], names=["prompt", "prompt", "response"]), path)
    check(path)
    pq.write_table(pa.table({"prompt": column[:0], "response": text[:0]}), path)
    assert "read: 0" in check(path)


@fuzz(50)
@given(records=st.lists(RECORD, min_size=1, max_size=3), format=st.sampled_from(FORMATS))
def test_any_records_as_parquet(check, root, records, format):
    path = root / "records.parquet"
    try:
        pq.write_table(pa.Table.from_pylist(records), path)
    except (pa.ArrowException, OverflowError, UnicodeError, ValueError):
        return  # Parquet cannot store these records
    check(path, format=format)


# ---------------------------------------------------------------------------------------------------------- folders


def saved(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    return folder


ARROW = "data-00000-of-00001.arrow"
EVERY_BYTE = """
import os, sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock
from spin.config.schema import DataConfig
from spin.runtime.errors import UserError
from spin.data.counts import Counts
from spin.data.formats import exchanges
from spin.data.sources import find_source

folder = Path(sys.argv[1])
file = folder / sys.argv[2]
raw, seen = file.read_bytes(), Counter()
cut = [raw[:length] for length in range(0, len(raw), 9)]
flipped = [raw[:at] + bytes([raw[at] ^ 128]) + raw[at + 1 :] for at in range(len(raw))]
for variant in [raw, *cut, *flipped]:
    # A new file: the old one's pages are mapped into memory.
    file.unlink()
    file.write_bytes(variant)
    try:
        counts = Counts()
        records = find_source(DataConfig.from_defaults(path=str(folder)), folder / "cache").read(counts)
        list(exchanges(records, DataConfig.from_defaults(), counts, False, lambda text: None))
        seen["read" if counts["read"] == 4 else "read less"] += 1
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1000 and folder.name in message, message
        seen["refused"] += 1
print(len(cut) + len(flipped) + 1, sum(seen.values()), seen["refused"], seen["read"])
"""


@pytest.mark.parametrize("name", [ARROW, "state.json", "dataset_info.json"])
def test_saved_folder_damaged_anywhere(tmp_path, name):
    """A damaged folder is refused or read; in a separate process, as damaged offsets may crash Arrow."""
    folder = saved(tmp_path / "saved")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EVERY_BYTE, str(folder), name]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    variants, outcomes, refused, read = map(int, result.stdout.split())
    assert variants == outcomes and refused > outcomes / 2 and read > 0


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"x"', "{}", "[" * 10_000, '{"_data_files": [{}]}',
                                     '{"splits": 3}', '{"splits": ["a\\nb"]}'])  # fmt: skip
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "dataset_dict.json"])
def test_saved_folder_with_broken_json(check, tmp_path, name, content):
    folder = saved(tmp_path / "saved")
    (folder / name).write_text(content)
    result = check(folder)
    assert isinstance(result, str) or name != "state.json"


def test_saved_format(check, tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}]).with_format("numpy", columns=["prompt"])
    dataset.save_to_disk(tmp_path / "saved")
    assert check(tmp_path / "saved").counts == {"read": 1, "kept": 1}


@pytest.mark.parametrize("suffix", VALID)
def test_folder_with_a_broken_file(check, tmp_path, suffix):
    rng = random.Random(suffix)
    refused = 0
    for number in range(6):
        folder = tmp_path / f"hub{number}"
        folder.mkdir()
        raw = VALID[suffix]
        (folder / f"test{suffix}").write_bytes(raw)
        at = rng.randrange(len(raw) // 4, len(raw) - 4)
        broken = raw[:at] if number % 2 else raw[:at] + bytes([rng.randrange(256) for _ in range(3)]) + raw[at + 3 :]
        (folder / f"train{suffix}").write_bytes(broken)
        refused += isinstance(check(folder), str)
    assert refused > 0
    (tmp_path / "hub0" / "README.md").write_text("---\nconfigs: [\n---\n")
    assert "no data set that can be read" in check(tmp_path / "hub0")


def test_folder_error_names_the_cause(check, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"\n')
    assert "train.jsonl:1: not a line of JSON" in check(tmp_path)


def test_folder_is_read_again(check, tmp_path, monkeypatch):
    """No cache is written, and a replaced file is read again even if its time and size are equal."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "folder" / "train.jsonl"
    path.parent.mkdir()
    for prompt in ("a", "b"):
        path.write_text(json.dumps({"prompt": prompt, "response": "c"}) + "\n")
        os.utime(path, (0, 0))
        assert [example.prompt for example in check(path.parent).train] == [prompt]
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["folder", "train.jsonl"]


def test_folder_named_json(check, tmp_path, monkeypatch):
    """A folder named `json` is read itself, not by `load_dataset("json")`, and its script is not run."""
    folder = tmp_path / "json"
    folder.mkdir()
    (tmp_path / "other.json").write_text('[{"prompt": "wrong", "response": "wrong"}]')
    (folder / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    monkeypatch.chdir(tmp_path)
    assert [example.prompt for example in check("json").train] == ["a"]
    (folder / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "scripts are no longer supported" in check("json") and not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------- special files


@pytest.mark.timeout(60)
def test_pipes_and_devices(check, tmp_path):
    for name in ("pipe", "pipe.jsonl"):
        os.mkfifo(tmp_path / name)
        assert "a pipe or device" in check(tmp_path / name)
    for name in ("/dev/null", "/dev/zero"):
        assert "a pipe or device" in check(name)
    reader, writer = os.pipe()  # like /dev/stdin
    try:
        assert "a pipe or device" in check(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        os.close(writer)


def test_odd_paths(check, tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    assert "no data set" in check(tmp_path / "x.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "no such file" in check(tmp_path / "loop.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "none")
    assert "no such file" in check(tmp_path / "dangling.jsonl")
    assert "no such file" in check(tmp_path / "x.jsonl" / "y.jsonl" / "z.jsonl")
    with pytest.raises(UserError, match=r"^~nobody-of-this-name/x.jsonl: cannot be read \(.*home"):
        list(read_records(DataConfig.from_defaults(path="~nobody-of-this-name/x.jsonl"), tmp_path))
    for path in ("a" * 5000, f"/{'a' * 5000}.jsonl", "zero\0byte.jsonl", "two\nlines.jsonl", "\udcff.jsonl", ""):
        with pytest.raises(UserError) as error:
            list(read_records(DataConfig.from_defaults(path=path), tmp_path))
        assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_full_disk(tmp_path, monkeypatch):
    """A full disk below the cache is not reported as unreadable data."""
    (tmp_path / "x.jsonl").write_bytes(JSONL)
    monkeypatch.setattr("spin.data.sources.file_digest", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        find_source(DataConfig.from_defaults(path=str(tmp_path / "x.jsonl")), tmp_path)


def test_names_with_line_feeds(check, tmp_path):
    (tmp_path / "a\nb.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"a b.jsonl:1: not a line of JSON"):
        list(read_records(DataConfig.from_defaults(path=str(tmp_path / "a\nb.jsonl")), tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(check, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(JSONL)
    (tmp_path / "x.jsonl").chmod(0)
    assert "Permission denied" in check(tmp_path / "x.jsonl")
    (tmp_path / "folder").mkdir(mode=0)
    assert "Permission denied" in check(tmp_path / "folder" / "x.jsonl")


# ------------------------------------------------------------------------------------------ slow texts


@pytest.mark.timeout(60)
def test_long_texts(check, tmp_path):
    path = tmp_path / "long.jsonl"
    answer = "Yes" + "\n" * 400_000 + "it is."
    path.write_text(json.dumps({"prompt": "What is it to you?", "response": answer}) + "\n")
    assert "answer too long" in check(path, filter="prose")


@fuzz(300)
@given(text=st.lists(st.sampled_from(list("ab1.)- •–\n\r\t\v\u2028\u00a0")), max_size=12).map("".join))
def test_list_marks(text):
    # The simple form of the pattern, which is slow for texts with many empty lines.
    assert bool(prose._MARKUP.search(text)) == bool(re.search(r"^\s*(?:[-•–]|\d+[.)])\s", text, re.M))


# --------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ raise_exception('one\nline\x1b') }}", r"one line\\x1b"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages.x.y }}", "no attribute 'x'"),
        ("{% if %}", "[Ee]xpected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_failing_chat_templates(tmp_path, template, reason):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": ("user", "assistant")[n % 2], "content": "x"} for n in range(999)]
    with pytest.raises(UserError, match=f"refuses messages of user, assistant.*{reason}") as error:
        templates.encode_prompts(tokenizer, [messages], "chat")
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


# ------------------------------------------------------------------------------------------------------------ wheels


def zipped(method: int = zipfile.ZIP_DEFLATED) -> bytes:
    raw = io.BytesIO()
    info = "spin_cargo-1.0.dist-info"
    with zipfile.ZipFile(raw, "w", method) as archive:
        for name, text in {
            "spin_cargo/rows.jsonl": JSONL.decode() * 3,
            f"{info}/METADATA": "Metadata-Version: 2.1\nName: spin-cargo\nVersion: 1.0\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }.items():
            archive.writestr(zipfile.ZipInfo(name), text, method)
    return raw.getvalue()


ARCHIVES = [
    zipped(method) for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
]


@pytest.mark.parametrize("kind", range(len(ARCHIVES)))
def test_wheels_damaged_anywhere(tmp_path, kind):
    """A file from a damaged archive is intact, or one line states that the wheel is damaged."""
    raw, wheel = ARCHIVES[kind], tmp_path / "spin_cargo-1.0-py3-none-any.whl"
    rng = random.Random(kind)
    refused = 0
    variants = [raw[:length] for length in range(0, len(raw), 7)]
    for offset in range(len(raw)):
        variants.append(raw[:offset] + bytes([raw[offset] ^ (1 << rng.randrange(8))]) + raw[offset + 1 :])
    for variant in variants:
        wheel.write_bytes(variant)
        try:
            extracted = packages._extract(wheel, "spin_cargo/rows.jsonl", tmp_path, "cargo")
        except UserError as error:
            refused += 1
            message = str(error)
            assert message.startswith("cargo: ") and message.isprintable() and len(message) < 1000
        else:
            assert extracted.read_bytes() == JSONL * 3
    assert refused > len(variants) / 4


@pytest.mark.parametrize("raw", [b"", b"no archive", ARCHIVES[0][:300], ARCHIVES[0].replace(b"rows", b"ro", 1)])
def test_broken_wheels(tmp_path, raw):
    wheel = tmp_path / "spin_cargo-1.0-py3-none-any.whl"
    wheel.write_bytes(raw)
    config = DataConfig.from_defaults(package=str(wheel), file="spin_cargo/rows.jsonl")
    with pytest.raises(UserError, match=r"spin_cargo-1.0-py3-none-any.whl: ") as error:
        list(read_records(config, tmp_path / "cache"))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert not list((tmp_path / "cache").rglob("rows.jsonl"))


@pytest.mark.parametrize("file", ["", "..", "spin_cargo/..", "x" * 300, "/", "zero\0byte"])
def test_odd_names_in_a_wheel(tmp_path, file):
    wheel = tmp_path / "spin_cargo-1.0-py3-none-any.whl"
    wheel.write_bytes(ARCHIVES[0])
    with pytest.raises(UserError) as error:
        list(read_records(DataConfig.from_defaults(package=str(wheel), file=file), tmp_path / "cache"))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
