"""Stages in the store are found by their inputs, and are complete or absent."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.runtime.store import RESUME, Store, key_of
from spin.runtime.store_cli import entries, main, remove

ROOT = Path(__file__).parents[2]


def build(folder):
    (folder / "result.txt").write_text("done")
    (folder / "metrics.jsonl").write_text('{"a": 1}\n')
    return {"fact": 1}


def test_get_builds_once(tmp_path):
    store = Store(tmp_path)
    first = store.get("score", {"x": 1, "y": [2]}, build)
    second = Store(tmp_path).get("score", {"y": [2], "x": 1}, lambda folder: pytest.fail("built again"))
    assert not first.reused and second.reused and first.folder == second.folder == tmp_path / "score" / first.key
    assert second.rows() == [{"a": 1}] and second.manifest["facts"] == {"fact": 1}
    assert second.manifest["made_from"] == {"x": 1, "y": [2]}


def test_key_of_every_input():
    base = {"beta": 0.1, "settings": {"lr": 1e-6}}
    assert key_of(base) == key_of({"settings": {"lr": 1e-6}, "beta": 0.1})
    assert (
        len({key_of(base), key_of({**base, "beta": 0.2}), key_of({**base, "settings": {"lr": 2e-6}}), key_of({})}) == 4
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.text(max_size=3), JSON)
def test_key_of_equal_inputs(inputs, name, value):
    assert key_of(inputs) == key_of(dict(reversed(inputs.items())))
    changed = {**inputs, name: value}
    # In Python 1 == 1.0 and True == 1, but as settings they differ.
    assert (key_of(inputs) == key_of(changed)) == (repr(sorted(inputs.items())) == repr(sorted(changed.items())))


def test_failed_build_keeps_resume(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        build(folder)
        (folder.parent / RESUME / "half").write_text("way")
        raise RuntimeError("half way")

    def resume(folder):
        assert list(folder.iterdir()) == []  # files of the first attempt are removed
        assert (folder.parent / RESUME / "half").read_text() == "way"
        return build(folder)

    with pytest.raises(RuntimeError):
        store.get("train", {}, fail)
    assert store.peek("train", {}) is None
    stage = store.get("train", {}, resume)
    assert not stage.reused and sorted(p.name for p in stage.folder.iterdir()) == [
        "manifest.json",
        "metrics.jsonl",
        "result.txt",
    ]
    assert [path.name for path in (tmp_path / "train").iterdir() if path.is_dir()] == [stage.key]


@pytest.mark.parametrize("name", ["result.txt", "metrics.jsonl", "manifest.json"])
def test_damaged_stage_is_rebuilt(tmp_path, name):
    messages = []
    store = Store(tmp_path, messages.append)
    folder = store.get("score", {}, build).folder
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    rebuilt = store.get("score", {}, build)
    assert not rebuilt.reused and rebuilt.folder == folder and (folder / "result.txt").read_text() == "done"
    assert len(messages) == 1 and name in messages[0] and str(folder) in messages[0]
    assert store.get("score", {}, build).reused


def _get_stage(folder: Path, is_waiting, messages) -> None:
    def build_while_other_waits(stage_folder):
        assert is_waiting.wait(60)
        messages.put("built")
        return build(stage_folder)

    def say(text):
        messages.put(text)
        is_waiting.set()

    stage = Store(folder, say).get("train", {"a": 1}, build_while_other_waits)
    messages.put(stage.reused)


def test_two_processes_build_a_stage_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    is_waiting, messages = context.Event(), context.Queue()
    processes = [context.Process(target=_get_stage, args=(tmp_path, is_waiting, messages)) for _ in range(2)]
    for process in processes:
        process.start()
    received = [messages.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join()
    assert sorted(message for message in received if isinstance(message, bool)) == [False, True]
    waiting, built = sorted(message for message in received if isinstance(message, str))
    assert built == "built" and waiting.startswith("another run is building the same train stage: waiting")


def test_killed_process_releases_lock(tmp_path):
    script = (
        "import os, sys, pathlib; from spin.runtime.store import Store\n"
        "def die(folder): (folder.parent / 'resume' / 'shard').write_text('1'); os.kill(os.getpid(), 9)\n"
        f"Store(pathlib.Path({str(tmp_path)!r})).get('train', {{}}, die)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert result.returncode == -9
    messages = []
    assert not Store(tmp_path, messages.append).get("train", {}, build).reused
    assert messages == []


# --- room -------------------------------------------------------------------------------------------------------------


def used_store(tmp_path: Path) -> tuple[Store, list[str]]:
    """Return a store with finished stages of a run, a removed run and no run and an unfinished one, and their names."""
    store, names = Store(tmp_path / "store"), []
    for number, run in enumerate(("here", "gone", None)):
        stage = store.get("train", {"number": number}, build)
        names.append(f"train/{stage.key}")
        if run:
            (tmp_path / run).mkdir()
            store.refer(tmp_path / run, [names[-1]])
    (tmp_path / "gone" / "stages.json").unlink()
    (tmp_path / "gone").rmdir()

    def fail(folder: Path) -> dict:
        (store.resume("train", {"number": 3}) / "shard").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.get("train", {"number": 3}, fail)
    names.append(f"train/{key_of({'number': 3})}")
    return store, names


def test_clean_removes_unused(tmp_path, capsys):
    store, names = used_store(tmp_path)
    listed = {entry.name: entry for entry in entries(store)}
    assert set(listed) == set(names)
    assert [bool(listed[name].used_by) for name in names] == [True, False, False, False]
    assert [listed[name].finished for name in names] == [True, True, True, False]
    main(["list", "--path", str(store.path)])
    listed = capsys.readouterr().out
    assert all(name in listed for name in names) and "4 stages" in listed and "(unfinished)" in listed
    main(["clean", "--path", str(store.path)])
    assert "0 stages" in capsys.readouterr().out  # all were used within the hour
    main(["clean", "--path", str(store.path), "--older-than", "0"])
    assert "3 stages" in capsys.readouterr().out and len(entries(store)) == 4  # only listed
    main(["clean", "--path", str(store.path), "--older-than", "0", "--yes"])
    assert "3 stages removed" in capsys.readouterr().out
    assert [entry.name for entry in entries(store)] == names[:1]
    assert store.get("train", {"number": 0}, build).reused


def test_remove_locked_stage(tmp_path):
    store, names = used_store(tmp_path)
    part = next(entry for entry in entries(store) if not entry.finished)
    with FileLock(str(store.path / f"{names[3]}.lock")):
        assert not remove(store, part) and part.folder.is_dir()
    assert remove(store, part) and not part.folder.exists()


def test_remove_stage_used_meanwhile(tmp_path):
    store, names = used_store(tmp_path)
    unused = next(entry for entry in entries(store) if entry.name == names[2])
    store.refer(tmp_path / "here", [names[2]])
    assert not remove(store, unused) and unused.folder.is_dir()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_during_commit(tmp_path, moment):
    """A kill before a stage is renamed leaves its resume folder; a kill after it leaves the complete stage."""
    script = f"""
import os, pathlib, spin.runtime.store as store
def die(*arguments):
    if {moment!r} == "after":
        seal(*arguments)
    os.kill(os.getpid(), 9)
seal, store.commit_atomically = store.commit_atomically, die
def build(folder):
    (folder / "policy").write_text("long work")
    (folder.parent / "resume" / "checkpoint").write_text("long work")
    return {{}}
store.Store(pathlib.Path({str(tmp_path)!r})).get("train", {{}}, build)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == -9
    store = Store(tmp_path)
    if moment == "after":
        assert store.get("train", {}, lambda folder: pytest.fail("built again")).reused
    else:
        assert (store.resume("train", {}) / "checkpoint").read_text() == "long work"
        assert not store.get("train", {}, build).reused
    assert [path.suffix for path in (tmp_path / "train").iterdir() if path.is_dir()] == [""]


def test_clean_keeps_other_folders(tmp_path, capsys):
    """`clean` refuses folders that are not a store, and keeps other folders inside a store."""
    store, _ = used_store(tmp_path)
    for path in (tmp_path, tmp_path / "here"):
        with pytest.raises(SystemExit, match="not a store"):
            main(["clean", "--yes", "--older-than", "0", "--path", str(path)])
    user_folder = store.path / "train" / "my_own_notes"
    user_folder.mkdir()
    main(["clean", "--yes", "--older-than", "0", "--path", str(store.path)])
    assert user_folder.is_dir() and len(list((store.path / "train").glob("[0-9a-f]*"))) >= 1
    assert f"removed run folder, whose stages count as unused: {tmp_path}/gone" in capsys.readouterr().out


def test_store_by_another_path(tmp_path):
    store, names = used_store(tmp_path)
    (tmp_path / "link").symlink_to(store.path)
    for path in (tmp_path / "link", tmp_path / "here" / ".." / "store"):
        assert [bool(entry.used_by) for entry in sorted(entries(Store(path)), key=lambda e: names.index(e.name))] == [
            True,
            False,
            False,
            False,
        ]


@pytest.mark.parametrize("record", ["entry", "noted"])
def test_clean_with_damaged_record(tmp_path, record):
    store, _ = used_store(tmp_path)
    for path in [tmp_path / "here" / "stages.json"] if record == "noted" else (store.path / "runs").glob("*.json"):
        path.write_text("")
    with pytest.raises(SystemExit, match="can't be read"):
        main(["clean", "--yes", "--older-than", "0", "--path", str(store.path)])
    assert len(entries_of(store)) == 4


def entries_of(store: Store) -> list:
    return [path for path in (store.path / "train").iterdir() if path.is_dir()]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"stages": 3, "store": "x"}'])
def test_refer_replaces_a_damaged_record(tmp_path, text):
    store, run = Store(tmp_path / "store"), tmp_path / "run"
    run.mkdir()
    (run / "stages.json").write_text(text)
    store.refer(run, ["train/a"])
    assert store.users() == {"train/a": [run]}


def test_refer_only(tmp_path):
    store = Store(tmp_path / "store")
    run = tmp_path / "run"
    run.mkdir()
    store.refer(run, ["train/a"])
    store.refer(run, ["train/b"])
    assert set(store.users()) == {"train/a", "train/b"}  # an unfinished run may resume from all of its stages
    store.refer(run, ["train/b"], only=True)
    assert store.users() == {"train/b": [run]}


def test_missing_store_is_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "spin", "store", "--path", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "no such folder" in result.stderr


def test_moved_project(tmp_path):
    """A run still uses its stages after its folder and the store were moved together."""
    project = tmp_path / "project"
    (project / "runs" / "a").mkdir(parents=True)
    store = Store(project / "store")
    store.get("train", {"a": 1}, build)
    name = f"train/{key_of({'a': 1})}"
    store.refer(project / "runs" / "a", [name])
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    project.rename(moved)
    assert Store(moved / "store").users() == {name: [moved / "runs" / "a"]}
