"""The cache of records and token ids: shared by all runs, seeds and sizes, and never used for changed inputs."""

import json
import os
import shutil

import pytest

from spin.config.schema import DataConfig
from spin.data.examples import Encoder, load_dataset
from spin.models import tiny
from spin.runtime.errors import UserError
from tests.data.test_examples import write


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def load(tmp_path, tokenizer, monkeypatch):
    """Load a data set; `load.encoded` has the number of candidates that each call tokenised."""
    encode = Encoder.encode

    def counting(self, rows):
        load.encoded.append(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode", counting)

    def load(path, seed=0, tokenizer=tokenizer, say=lambda text: None, **changes):
        load.encoded = []
        config = DataConfig.from_defaults(**{"path": str(path), "template": "paper", **changes})
        return load_dataset(config, tokenizer, {1}, seed, tmp_path / "cache", say=say)

    return load


def rows(count, word="number"):
    return [{"prompt": f"What is {n}?", "response": f"It is {word} {n}."} for n in range(count)]


def test_one_tokenisation_for_all_seeds(load, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(300))
    first = load(path, held_out=20)
    assert load.encoded == [300]
    repeated, other_seed = load(path, held_out=20), load(path, seed=1, held_out=7, validation=30, size=100)
    assert load.encoded == [] and repeated.train == first.train and repeated.counts == first.counts
    assert {example.id for example in other_seed.train} != {example.id for example in first.train}
    shutil.copy(path, tmp_path / "copy.jsonl")
    assert load(tmp_path / "copy.jsonl", held_out=20).held_out == first.held_out and load.encoded == []
    changed = load(path, held_out=20, max_length=128, max_prompt_length=64)
    assert load.encoded == [300] and changed.counts["kept"] == 300


def test_few_examples_of_many(load, tmp_path):
    """If few examples are needed, only the first candidates are tokenised, and the result is the same."""
    path = write(tmp_path / "rows.jsonl", rows(6000))
    small = load(path, size=8, held_out=4, validation=4)
    (count,) = load.encoded
    assert count < 600
    complete = load(path, held_out=4, validation=4)
    assert load.encoded == [6000]
    assert small.train == complete.train[:8] and small.held_out == complete.held_out
    assert small.validation == complete.validation and small.counts["not needed"] == 6000 - 16
    # All candidates are tokenised if the first are not enough.
    long_rows = [{"prompt": f"What is {n}?", "response": "x" * (400 if n % 100 else 10)} for n in range(6000)]
    path = write(tmp_path / "long.jsonl", long_rows)
    dataset = load(path, size=20, held_out=4, max_length=128, max_prompt_length=64)
    assert load.encoded == [560, 6000] and len(dataset.train) == 20 and len(dataset.held_out) == 4
    assert dataset.counts["read"] == 6000 == sum(dataset.counts.values()) - 6000


def test_replaced_file(load, tmp_path):
    """A file with other content is read again even if its modification time and size are equal."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write(folder / "rows.jsonl", rows(30))
    before, stat = load(folder), path.stat()
    write(path, rows(30, word="figure"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert {example.real for example in load(folder).train}.isdisjoint(example.real for example in before.train)


def test_damaged_cache(load, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(30))
    expected = list(load(path).train)
    for name in ("candidates.arrow", "examples.arrow"):
        (file,) = (tmp_path / "cache").rglob(name)
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
        notes = []
        assert load(path, say=notes.append).train == expected and "has changed" in notes[0]
        file.unlink()
        assert load(path).train == expected
        file.parent.joinpath("manifest.json").write_text("{")
        assert load(path).train == expected


def test_other_tokenizer(load, tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", rows(30))
    load(path)
    other_tokenizer = tiny.tokenizer()
    other_tokenizer.add_tokens(["number"])
    assert load(path, tokenizer=other_tokenizer).train[0].real_ids != load(path).train[0].real_ids
    other_tokenizer = tiny.tokenizer()
    other_tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    changed = load(path, tokenizer=other_tokenizer, template="chat")
    assert len(load.encoded) == 1 and other_tokenizer.decode(changed.train[0].prompt_ids).startswith("<What")


def test_failed_read_is_not_cached(load, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(30))
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(UserError, match="31: not a line of JSON"):
        load(path)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix != ".lock" and file.is_file()]


def test_unwritable_cache(load, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(30))
    (tmp_path / "cache").write_text("a file in its place")
    notes = []
    assert len(load(path, say=notes.append).train) == 30 and "can't be written to" in notes[0]


def test_notes_are_repeated(load, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**row, "stars": 5} for row in rows(30)])
    first, second = [], []
    load(path, say=first.append)
    load(path, say=second.append)
    assert first == second and any("stars" in note for note in first)


def test_configurations(load, tmp_path):
    for name in ("short", "long"):
        (tmp_path / "town" / name).mkdir(parents=True)
        write(tmp_path / "town" / name / "train.jsonl", rows(3 if name == "short" else 9))
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("short", "long")
    )
    (tmp_path / "town" / "README.md").write_text(card + "---\n")
    assert len(load(tmp_path / "town", config="long").train) == 9
    with pytest.raises(UserError, match=r"set data.config to one of its configurations: short, long$"):
        load(tmp_path / "town")
    with pytest.raises(UserError, match=r"data.config=tall: .* it has short, long$"):
        load(tmp_path / "town", config="tall")
    (tmp_path / "town" / "README.md").write_text(card.replace("long\n", "long\n  default: true\n", 1) + "---\n")
    assert len(load(tmp_path / "town").train) == 9


def test_card_sets_the_parser(load, tmp_path):
    """The configuration and the parser's settings in README.md are a part of the cache's key."""
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "x.csv").write_text("prompt,response\n" + "".join(f"a {n};b,c {n}\n" for n in range(9)))
    swapped = "---\nconfigs:\n- config_name: plain\n  data_files: x.csv\n- config_name: swapped\n  data_files: x.csv\n"
    swapped += "  names: [response, prompt]\n  header: 0\n"
    (tmp_path / "csv" / "README.md").write_text(swapped + "---\n")
    assert load(tmp_path / "csv", config="plain").train[0].real.startswith("c ")
    assert load(tmp_path / "csv", config="swapped").train[0].real.startswith("a ")
    (tmp_path / "csv" / "README.md").write_text(swapped + '  sep: ";"\n---\n')
    assert ";" not in load(tmp_path / "csv", config="swapped").train[0].real


def test_unused_columns_of_several_types(load, tmp_path):
    """A column that is not used may have different types in different files."""
    folder = tmp_path / "ids"
    folder.mkdir()
    write(folder / "a.jsonl", [{**row, "id": n, "tags": ["x"]} for n, row in enumerate(rows(3))])
    write(folder / "b.jsonl", [{**row, "id": f"b{n}", "tags": {"x": 1}} for n, row in enumerate(rows(6)[3:])])
    assert len(load(folder).train) == 6
    (folder / "c.jsonl").write_text(json.dumps([1, 2]) + "\n")
    with pytest.raises(UserError, match=r"c\.jsonl: record 1: a record must be a JSON object, not 1"):
        load(folder)
