"""A disk that fails at any call: files are complete or absent, and the next game ends with the same bits.

`failing_disk.c` counts the calls that change files below a folder, and makes the n-th fail: with an error, with this
error from then on (a full disk), or with a short write.
"""

import ctypes
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.runtime.artifacts import commit_atomically, verify_artifact
from spin.runtime.cache import cached_folder
from spin.runtime.checkpoints import Checkpoints, TrainState
from spin.runtime.errors import user_message
from spin.runtime.files import link_tree, write_text
from spin.runtime.shards import ResumableShards, Shard
from spin.runtime.store import Store
from spin.runtime.tables import write_arrow
from tests.games import Games, Place

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)
ALL = ",write,fsync,truncate,rename,link,mkdir,remove,chmod,utime,close,open,"
FAULTS = {  # kinds of calls, errno, whether all later calls fail as well
    "full": (",write,rename,link,mkdir,open,fsync,close,", errno.ENOSPC, True),
    "over quota at close": (",close,", errno.EDQUOT, False),
    "input/output error": (ALL, errno.EIO, False),
    "stale handle": (ALL.replace(",remove,", ","), errno.ESTALE, True),
    "another disk": (",rename,link,", errno.EXDEV, False),
    "short write": (",write,", 0, False),
}
WORDS = (
    "iter=0",
    "data.size=8",
    "data.held_out=4",
    "generation.max_new_tokens=16",
    "checkpoint.steps=1",
    "checkpoint.shard_size=4",
    "schedule.batch_size=4",
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Games and other code in separate processes, on a disk that can fail."""
    folder = tmp_path_factory.mktemp("disk")
    source = Path(__file__).with_name("failing_disk.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", folder / "disk.so", source, "-ldl"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(folder / "disk.so"))
        games = Games(folder)
        games.play("--help")  # starts the server
    yield games
    games.close()


def arm(folder: Path, kinds: str = ALL, number: int = 0, code: int = 0, lasting: bool = False, log: str = "") -> None:
    """Make the `number`-th call from now on fail; with 0, only count calls."""
    ctypes.CDLL(None).disk_arm(str(folder).encode(), kinds.encode(), ctypes.c_long(number), code, lasting, log.encode())


def disarm() -> int:
    return ctypes.CDLL(None).disk_disarm()


# --- the parts, at every call -----------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder, except manifests, which contain times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "manifest.json"}


class Commit:
    """A part to test. `run` does the work, `check` tests it after a fault, `result` is equal after runs without one."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self) -> None:
        beside = self.folder / "beside"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(self.folder / "done", ignore_errors=True)
        (beside / "inner").mkdir(parents=True)
        (beside / "inner" / "a.txt").write_text("a" * 100_000)
        save_file({"w": torch.arange(50_000.0)}, beside / "w.safetensors")
        commit_atomically(beside, self.folder / "done", {"fact": 1})

    def check(self) -> None:
        for manifest in (self.folder / "done").glob("manifest.json"):
            verify_artifact(manifest.parent)

    def result(self) -> object:
        verify_artifact(self.folder / "done")
        return files(self.folder)


class Text(Commit):
    def __init__(self, folder: Path):
        super().__init__(folder)
        write_text(folder / "a.json", "old")

    def run(self) -> None:
        write_text(self.folder / "a.json", "new" * 10_000)

    def check(self) -> None:
        assert files(self.folder) in ({"a.json": b"old"}, {"a.json": b"new" * 10_000})

    def result(self) -> object:
        return files(self.folder)


class Links(Text):
    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "source").mkdir()
        save_file({"w": torch.arange(1000.0)}, folder / "source" / "w.safetensors")
        (folder / "source" / "a.json").write_text("{}" * 5000)

    def run(self) -> None:
        link_tree(self.folder / "source", self.folder / "target")

    def check(self) -> None:
        shown = files(self.folder / "target")
        assert shown.items() <= files(self.folder / "source").items()


class Cache(Commit):
    def run(self) -> None:
        def build(folder: Path) -> dict:
            rows = ({"id": f"{n}", "ids": (n, 2)} for n in range(300))
            schema = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int32()))])
            write_arrow(rows, schema, folder / "rows.arrow")
            return {"count": 300}

        self.entry, self.facts = cached_folder(self.folder, "rows", {"x": 1}, build, lambda text: None)

    def check(self) -> None:
        for manifest in self.folder.glob("rows/*[0-9a-f]/manifest.json"):
            verify_artifact(manifest.parent)

    def result(self) -> object:
        assert self.facts == {"count": 300} and self.entry.is_relative_to(self.folder)
        return files(self.folder)


class FakeEngine:
    """An engine whose state is one tensor, which holds the step."""

    def __init__(self, step: int = 0):
        self.weights = {"w": torch.full((5000,), float(step))}

    def save_state(self, folder: Path) -> None:
        save_file(self.weights, folder / "masters.safetensors")

    def load_state(self, folder: Path) -> None:
        self.weights = load_file(folder / "masters.safetensors")


class Training(Commit):
    """Three steps with a checkpoint after each, from the newest checkpoint on. A written checkpoint is never lost."""

    written = 0

    def restored(self) -> tuple[Checkpoints, int]:
        checkpoints, engine = Checkpoints(self.folder, steps=1), FakeEngine()
        state = checkpoints.restore(engine)
        assert len(state.rows) == state.step and engine.weights["w"].unique().tolist() == [state.step]
        return checkpoints, state.step

    def run(self) -> None:
        checkpoints, step = self.restored()
        while step < 3:
            step += 1
            checkpoints.write(FakeEngine(step), TrainState(step=step, rows=[{"n": n} for n in range(step)]))
            self.written = step

    def check(self) -> None:
        assert self.restored()[1] >= self.written

    def result(self) -> object:
        assert self.restored()[1] == 3
        return files(self.folder / "step-00000003")


class Shards(Commit):
    """Three shards. A stored shard is not computed again."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.computed: Counter = Counter()
        self.stored: set[int] = set()

    def shard(self, number: int) -> Shard:
        def compute() -> list[dict]:
            assert number not in self.stored
            return [{"id": f"{number}", "ids": [number] * 20}] * 20

        return Shard([f"id{number}"], compute)

    def run(self) -> None:
        shards = [self.shard(number) for number in range(3)]
        self.rows = []
        for number, rows in enumerate(ResumableShards(self.folder / "answers", print)(shards)):
            self.rows.append(rows)
            self.stored.add(number)

    def check(self) -> None:
        for manifest in self.folder.glob("answers/[0-9]*/manifest.json"):
            verify_artifact(manifest.parent)

    def result(self) -> object:
        return self.rows


class Stored(Commit):
    """A stage in the store and a run folder that uses it."""

    def run(self) -> None:
        def build(folder: Path) -> dict:
            (folder / "metrics.jsonl").write_text('{"a": 1}\n')
            pq.write_table(pa.table({"n": range(5000)}), folder / "n.parquet")
            return {"fact": 1}

        store = Store(self.folder / "store", lambda text: None)
        (self.folder / "run").mkdir(exist_ok=True)
        self.stage = store.get("train", {"x": 1}, build)
        store.refer(self.folder / "run", [f"train/{self.stage.key}"])

    def check(self) -> None:
        for manifest in self.folder.glob("store/train/*[0-9a-f]/manifest.json"):
            verify_artifact(manifest.parent)

    def result(self) -> object:
        assert self.stage.manifest["facts"] == {"fact": 1}
        assert not list(self.folder.glob("store/train/*.part"))
        return {name: text for name, text in files(self.folder).items() if "runs" not in name and "run/" not in name}


PARTS = {part.__name__.lower(): part for part in (Commit, Text, Links, Cache, Training, Shards, Stored)}


def fail_each_call(name: str, fault: str, folder: Path) -> None:
    """Make each call of a part fail in turn, and run the part again. Prints the number of calls."""
    kinds, code, lasting = FAULTS[fault]

    def new_part(name: str, number: int) -> Commit:
        (folder / f"{number}").mkdir(parents=True)
        return PARTS[name](folder / f"{number}")

    undisturbed = new_part(name, 0)
    arm(folder, kinds)
    undisturbed.run()
    count = disarm()
    for number in range(1, count + 1):
        disturbed, position = new_part(name, number), f"call {number} of {count}"
        arm(folder, kinds, number, code, lasting)
        error, line = None, "none"
        try:
            disturbed.run()
        except Exception as raised:
            error, line = raised, user_message(raised) if code else None
        disarm()
        assert line and "\n" not in line, (position, repr(error))
        disturbed.check()
        disturbed.run()
        assert disturbed.result() == undisturbed.result(), position
        assert not [path for path in files(disturbed.folder) if path.endswith(f".{os.getpid()}")], position
        shutil.rmtree(disturbed.folder)
    print(json.dumps(count))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", PARTS)
def test_each_call(disk, tmp_path, name, fault):
    arguments = (name, fault, str(tmp_path))
    code = "import os, sys; from tests.runtime import test_failing_disk as t; "
    result = disk.start(code=f"{code}t.fail_each_call(*{arguments[:2]}, t.Path({arguments[2]!r})); sys.exit()").wait()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) >= 1


# --- games ------------------------------------------------------------------------------------------------------------


def bits(place: Place) -> list:
    """Return what must be equal after any fault: the weights of all policies, the pairs and all measures."""
    manifest = json.loads((place.folder / "run" / "iter0" / "manifest.json").read_text())
    game = json.loads((place.folder / "run" / "game.json").read_text())
    weights = [load_file(place.folder / "run" / name / "policy" / "model.safetensors") for name in ("sft", "iter0")]
    pairs = pq.read_table(place.folder / "run" / "iter0" / "pairs.parquet").to_pylist()
    ids = [manifest[player]["weights"] for player in ("policy", "opponent")]
    return [ids, [{k: v.tolist() for k, v in tensors.items()} for tensors in weights], pairs, game["evaluations"]]


def armed(place: Place, **settings: object) -> str:
    """Return code that arms the disk in a game's process."""
    return f"from tests.runtime.test_failing_disk import arm, Path; arm(Path({str(place.folder)!r}), **{settings!r})"


@pytest.fixture(scope="module")
def reference(disk, tmp_path_factory):
    """The results of an undisturbed game and the kinds of its calls."""
    place = Place(tmp_path_factory.mktemp("reference"), disk)
    log = place.folder.parent / "calls"
    result = place.start(*WORDS, code=armed(place, log=str(log))).wait()
    assert result.returncode == 0, result.stderr
    return bits(place), [line.split()[0] for line in log.read_text().splitlines()]


@pytest.mark.parametrize(("seed", "games"), [(0, 5), pytest.param(1, 30, marks=pytest.mark.slow)])
def test_games(disk, reference, tmp_path, seed, games):
    """Games in one folder fail until one ends despite its fault; then a new folder is used."""
    expected, calls = reference
    rng, statuses, place = random.Random(seed), Counter(), None
    for count in range(games):
        if place is None:
            place = Place(tmp_path / f"{count}", disk)
            place.folder.mkdir()
        fault = [*FAULTS][count % len(FAULTS)]
        kinds, code, lasting = FAULTS[fault]
        number = rng.randint(1, sum(f",{kind}," in kinds for kind in calls) // 2)
        result = place.start(*WORDS, code=armed(place, kinds=kinds, number=number, code=code, lasting=lasting)).wait()
        details = (fault, number, place.folder, result.stdout[-2000:], result.stderr)
        assert result.returncode == 0 or (code and result.returncode == 1), details
        statuses[fault, result.returncode] += 1
        if result.returncode:
            assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: "), details
        assert "Traceback" not in result.stdout + result.stderr, details
        if result.returncode == 0 or count == games - 1:
            place.play(*WORDS)
            assert bits(place) == expected, details
            place = None
    print(dict(statuses))
