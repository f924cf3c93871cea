"""Plays games in processes that need not import anything first.

Most of a tiny game's time is the import of torch and what comes with it. A server, `python -m tests.games`, does that
once; every game is a process that was forked from it: with signals, a process group, an exit status and an end of its
own, as if `python run.py ...` had been started. The server computes nothing and starts no thread, so a game finds what
a fresh interpreter would have imported, and nothing else. Two things are the server's and the same for all games: the
seed of `hash`, and what libraries read from the environment when they are imported.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
# One thread, no network; and pyarrow's allocator, which is not even the one it uses, must not start a thread.
FIXED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "PYTHON", "MPL")
# What a game imports, the libraries' own late imports too. Not wandb: it makes temporary folders when it is imported,
# and the first game to end would take them away from all.
IMPORTS = """
    hydra spin.game spin.models.tiny datasets pandas pyarrow.dataset pyarrow.parquet
    matplotlib.backends.backend_agg transformers.generation.utils transformers.models.llama.modeling_llama
""".split()


class Game:
    """A game that runs, or has ended: then `returncode` is its exit status, or minus the signal that killed it."""

    def __init__(self, games: "Games", words: tuple[str, ...], out: Path, err: Path):
        self.games, self.args, self.out, self.err = games, ["python", "run.py", *words], out, err
        self.pid, self.returncode = 0, None

    def poll(self) -> int | None:
        while self.returncode is None and self.games.listen(0):
            pass
        return self.returncode

    def wait(self, timeout: float = 280) -> subprocess.CompletedProcess:
        """The ended game, or TimeoutExpired: then it goes on."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            if not self.games.listen(max(0, end - time.monotonic())):
                raise subprocess.TimeoutExpired(self.args, timeout, self.out.read_text(), self.err.read_text())
        return subprocess.CompletedProcess(self.args, self.returncode, self.out.read_text(), self.err.read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the signal to the game's process, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Games:
    """The server, started with the first game; `folder` takes what games and server print."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.server: subprocess.Popen | None = None
        self.starting: Game | None = None
        self.running: dict[int, Game] = {}

    def start(self, *words: str, env: dict[str, str] | None = None) -> Game:
        """`python run.py *words`, in this process' environment with `env` on top."""
        here = {**os.environ, **FIXED}
        if self.server is None:
            self.env = here
            with (self.folder / "server.err").open("w") as err:
                self.server = subprocess.Popen(
                    [sys.executable, "-m", "tests.games"],
                    cwd=ROOT,
                    env=here,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    start_new_session=True,  # Ctrl-C is for the tests, which then end the server
                )
        env = here | (env or {})
        late = [key for key in env.keys() | self.env.keys() if env.get(key) != self.env.get(key)]
        if late := [key for key in late if key.startswith(READ_AT_IMPORT)]:
            raise ValueError(f"{', '.join(late)}: too late for a forked game, libraries read it when they are imported")
        self.count += 1
        out, err = (self.folder / f"{self.count}.{end}" for end in ("out", "err"))
        for path in (out, err):
            path.touch()  # a game may be killed, or looked at, before it opens them
        game = self.starting = Game(self, words, out, err)
        request = {"words": words, "out": str(out), "err": str(err), "env": env, "cwd": str(ROOT)}
        with suppress(BrokenPipeError):  # a dead server is found in `listen`, which says what it died of
            self.server.stdin.write(json.dumps(request).encode() + b"\n")
        while not game.pid:
            self.listen(None)
        return game

    def play(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        game = self.start(*words, env=env)
        try:
            return game.wait()
        finally:
            game.kill()  # where the wait did not end well; as `subprocess.run` does

    def listen(self, timeout: float | None) -> bool:
        """Take in what the server says next, within `timeout` seconds; False if it says nothing."""
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            return False
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(
                f"tests/games.py ended with {self.server.wait()}:\n{(self.folder / 'server.err').read_text()}"
            )
        said = json.loads(line)
        if "returncode" in said:
            self.running.pop(said["pid"]).returncode = said["returncode"]
        else:
            self.starting.pid = said["pid"]
            self.running[said["pid"]] = self.starting
        return True

    def close(self) -> None:
        """End the server, and with it the games that still run."""
        if self.server:
            self.server.stdin.close()
            self.server.wait(timeout=60)
            self.server.stdout.close()


class Place:
    """A folder with a cache, a store and runs of its own."""

    def __init__(self, folder: Path, games: Games):
        self.folder, self.games = folder, games

    def words(self, *words: str, run: str = "run") -> list[str]:
        """What to put behind `run.py` to play the smoke game with the settings `words` here."""
        settings = {
            "cache.path": self.folder / "cache",
            "store.path": self.folder / "store",
            "hydra.run.dir": self.folder / run,
            "tracking.wandb": "disabled",
            "evaluation.bootstrap": 50,
        }
        given = {word.split("=")[0] for word in words}
        return [*words, "experiment=smoke", *(f"{key}={value}" for key, value in settings.items() if key not in given)]

    def start(self, *words: str, run: str = "run", env: dict[str, str] | None = None) -> Game:
        return self.games.start(*self.words(*words, run=run), env=env)

    def play(
        self, *words: str, run: str = "run", status: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        done = self.games.play(*self.words(*words, run=run), env=env)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def stages(self) -> Counter:
        return Counter(path.parent.parent.name for path in (self.folder / "store").glob("*/*/manifest.json"))

    def metrics(self, run: str = "run") -> list[dict]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]


def serve() -> list[str]:
    """Fork a process for every request until there are no more. Returns in these: the words of the game to play."""
    for name in IMPORTS:
        importlib.import_module(name)
    tasks = Path("/proc/self/task")  # threads that Python knows nothing of; Linux only
    if (threads := len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()) > 1:
        sys.exit(f"{threads} threads run after the imports: they, and locks that they hold, would be lost in a fork")
    gc.freeze()  # half a million objects: without it each game takes a second to tear them down at its end
    running: set[int] = set()

    def tell(**what: int) -> None:  # one write: a signal handler can't come in between
        os.write(1, json.dumps(what).encode() + b"\n")

    def reap(*_) -> None:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                tell(pid=pid, returncode=os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # a start is told before an end
        if not (pid := os.fork()):
            become(request)
            return request["words"]
        running.add(pid)
        tell(pid=pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pid in running:
        for kill in (os.kill, os.killpg):  # its own children, too; the first one is for a game that has no group yet
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    sys.exit()


def become(request: dict) -> None:
    """Make this process, just forked, what the start of a program is given: signals, files, environment, folder."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):  # the last is ignored where nohup started the tests
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])


if __name__ == "__main__":
    sys.argv = ["run.py", *serve()]
    # Nothing is caught here: how a program ends, and what it prints then, is left to the interpreter.
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
