"""A stage is found by what made it, whole or not at all."""

import pytest

from spin.store import Store, key_of, link_file, link_tree


def build(folder):
    (folder / "result.txt").write_text("done")
    (folder / "metrics.jsonl").write_text('{"a": 1}\n')
    return {"fact": 1}


def test_a_stage_is_built_once_and_then_found(tmp_path):
    store = Store(tmp_path)
    first = store.get("score", {"x": 1, "y": [2]}, build)
    again = Store(tmp_path).get("score", {"y": [2], "x": 1}, lambda folder: pytest.fail("built again"))
    assert not first.reused and again.reused and first.folder == again.folder == tmp_path / "score" / first.key
    assert again.rows() == [{"a": 1}] and again.manifest["facts"] == {"fact": 1}
    assert again.manifest["made_from"] == {"x": 1, "y": [2]}


def test_every_input_counts():
    base = {"beta": 0.1, "settings": {"lr": 1e-6}}
    assert key_of(base) == key_of({"settings": {"lr": 1e-6}, "beta": 0.1})
    assert (
        len({key_of(base), key_of({**base, "beta": 0.2}), key_of({**base, "settings": {"lr": 2e-6}}), key_of({})}) == 4
    )


def test_a_stage_that_fails_leaves_nothing_and_is_built_the_next_time(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        build(folder)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        store.get("train", {}, fail)
    assert not store.has("train", {})
    assert [path.name for path in (tmp_path / "train").iterdir() if path.is_dir()] == []
    assert not store.get("train", {}, build).reused


def test_what_a_killed_run_left_is_replaced(tmp_path):
    store = Store(tmp_path)
    left = tmp_path / "train" / f"{key_of({})}.123.tmp"
    left.mkdir(parents=True)
    (tmp_path / "train" / key_of({})).mkdir()
    assert not store.get("train", {}, build).reused
    assert not left.exists()


def test_links_replace_what_is_there_and_take_no_space(tmp_path):
    for content in ("old", "new"):
        source = tmp_path / content
        source.mkdir()
        (source / "weights").write_text(content)
        link_tree(source, tmp_path / "shown")
        link_file(source / "weights", tmp_path / "file")
    assert (tmp_path / "shown" / "weights").read_text() == (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "old" / "weights").read_text() == "old"
    assert (tmp_path / "file").stat().st_ino == (tmp_path / "new" / "weights").stat().st_ino
