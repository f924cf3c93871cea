"""Atomic files, links into the store, and locks."""

import os
import signal

import pytest
from filelock import FileLock

from spin.runtime import signals as signals_module
from spin.runtime.files import hold_lock, link_file, link_tree, write_text


@pytest.fixture
def source(tmp_path):
    return write_policy(tmp_path / "source", "weights")


def write_policy(folder, weights):
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "note.txt").write_text(f"of {weights}")
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_write_text_replaces(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert content(tmp_path) == {"a.json": "new"}


def test_link_tree_shares_only_weights(source, tmp_path):
    target = tmp_path / "target"
    link_tree(source, target)
    assert content(target) == content(source)
    assert (target / "model.safetensors").samefile(source / "model.safetensors")
    (target / "config.json").write_text("edited")
    assert (source / "config.json").read_text() == "{}"


def test_link_tree_keeps_files_of_the_user(source, tmp_path):
    target = tmp_path / "target"
    for _ in range(2):
        link_tree(source, target)
        (target / "inner" / "mine.txt").write_text("mine")
        (target / "mine.safetensors").write_text("mine")
    new_source = write_policy(tmp_path / "other", "new")
    link_tree(new_source, target)
    link_tree(None, target)
    assert content(target) == {"inner/mine.txt": "mine", "mine.safetensors": "mine"}


def test_link_tree_replaces_only_changed_files(source, tmp_path):
    target = tmp_path / "target"
    link_tree(source, target)
    before = {path: path.stat().st_ino for path in target.rglob("*")}
    (target / "inner" / "note.txt").write_text("edited by the user")
    link_tree(source, target)
    assert content(target) == content(source)
    changed = {path.name for path in before if path.stat().st_ino != before[path]}
    assert changed == {"note.txt"}


def test_link_tree_removes_stale_links(source, tmp_path):
    target = tmp_path / "target"
    (source / "model-2.safetensors").write_text("second")
    (source / "old.json").write_text("old")
    link_tree(source, target)
    new_source = write_policy(tmp_path / "other", "new")
    link_tree(new_source, target)
    assert content(target) == content(new_source)
    assert (source / "model.safetensors").read_text() == "weights"


def test_link_tree_of_nothing_removes_all(source, tmp_path):
    link_tree(source, tmp_path / "target")
    link_tree(None, tmp_path / "target")
    assert content(tmp_path) == {f"source/{name}": text for name, text in content(source).items()}


def test_link_tree_copies_on_another_disk(source, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    target = tmp_path / "target"
    link_tree(source, target)
    assert content(target) == content(source)
    inode = (target / "model.safetensors").stat().st_ino
    link_tree(source, target)
    assert (target / "model.safetensors").stat().st_ino == inode  # not copied again


@pytest.mark.parametrize("text", ["{", "null", "3", "[1, null]"])
def test_link_tree_with_damaged_record(source, tmp_path, text):
    link_tree(source, tmp_path / "target")
    (tmp_path / ".target.linked").write_text(text)
    link_tree(source, tmp_path / "target")
    assert content(tmp_path / "target") == content(source)


def test_link_file_replaces(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
        link_file(tmp_path / name, tmp_path / "file")
    assert (tmp_path / "file").samefile(tmp_path / "new") and (tmp_path / "old").read_text() == "old"


def test_signal_ends_wait_for_lock(tmp_path):
    """A signal ends the wait for a lock although signals are deferred, as they are with several processes."""
    before, messages = {number: signal.getsignal(number) for number in signals_module.SIGNALS}, []

    def wait():
        with FileLock(tmp_path / "lock"), signals_module.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            with hold_lock(tmp_path / "lock", "another run", messages.append):
                raise AssertionError

    signals_module.install_handlers()
    try:
        with pytest.raises(signals_module.Interrupted):
            wait()
    finally:
        signals_module.install_handlers()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(messages) == 1
