"""Play games in forked processes, which saves the time of importing torch.

A server, `python -m tests.games`, imports everything once and forks a process for each game, with its own signals, process
group and exit status, as if `python run.py ...` had been started. The server computes nothing and starts no threads, so the
state of a game is that of a new interpreter after the imports. Games share the seed of `hash`, and the environment variables
that libraries read at import.
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
# One thread, no network, and no background thread of pyarrow's allocator.
FIXED = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_XET_HIGH_PERFORMANCE": "1",  # lm_eval sets it when a test imports it
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "PYTHON", "MPL")
# The modules that a game imports, including late imports of libraries. wandb is not preloaded, because the first game that
# ends would remove the temporary folders that wandb creates at import.
IMPORTS = """
    hydra spin.game spin.models.tiny datasets pandas pyarrow.dataset pyarrow.parquet
    matplotlib.backends.backend_agg transformers.generation.utils transformers.models.llama.modeling_llama
""".split()


class Game:
    """A running or finished game. `returncode` is its exit status, or the negative number of the signal that killed it."""

    def __init__(self, games: "Games", words: tuple[str, ...], out: Path, err: Path):
        self.games, self.args, self.out, self.err = games, ["python", "run.py", *words], out, err
        self.pid, self.returncode = 0, None

    def poll(self) -> int | None:
        while self.returncode is None and self.games.listen(0):
            pass
        return self.returncode

    def wait(self, timeout: float = 280) -> subprocess.CompletedProcess:
        """Wait for the game to end. If it does not, raise TimeoutExpired and leave the game running."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            if not self.games.listen(max(0, end - time.monotonic())):
                raise subprocess.TimeoutExpired(self.args, timeout, self.out.read_text(), self.err.read_text())
        return subprocess.CompletedProcess(self.args, self.returncode, self.out.read_text(), self.err.read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the game's process if it is still running."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Games:
    """The server, which starts with the first game. Games and server write their output to `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.server: subprocess.Popen | None = None
        self.starting: Game | None = None
        self.running: dict[int, Game] = {}

    def start(self, *words: str, env: dict[str, str] | None = None, code: str = "") -> Game:
        """Start `python run.py *words` in this process's environment updated by `env`, after running `code`."""
        test_env = {**os.environ, **FIXED}
        if self.server is None:
            self.env = test_env
            with (self.folder / "server.err").open("w") as err:
                self.server = subprocess.Popen(
                    [sys.executable, "-m", "tests.games"],
                    cwd=ROOT,
                    env=test_env,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    start_new_session=True,  # Ctrl-C goes to the tests, which then end the server
                )
        env = test_env | (env or {})
        changed = [key for key in env.keys() | self.env.keys() if env.get(key) != self.env.get(key)]
        if too_late := [key for key in changed if key.startswith(READ_AT_IMPORT)]:
            raise ValueError(f"{', '.join(too_late)}: libraries read this at import, before a game is forked")
        self.count += 1
        out, err = (self.folder / f"{self.count}.{end}" for end in ("out", "err"))
        for path in (out, err):
            path.touch()  # a game may be killed before it opens them
        game = self.starting = Game(self, words, out, err)
        request = {"words": words, "out": str(out), "err": str(err), "env": env, "cwd": str(ROOT), "code": code}
        with suppress(BrokenPipeError):  # `listen` reports a dead server
            self.server.stdin.write(json.dumps(request).encode() + b"\n")
        while not game.pid:
            self.listen(None)
        return game

    def play(self, *words: str, env: dict[str, str] | None = None, code: str = "") -> subprocess.CompletedProcess:
        game = self.start(*words, env=env, code=code)
        try:
            return game.wait()
        finally:
            game.kill()  # after a timeout, like `subprocess.run`

    def listen(self, timeout: float | None) -> bool:
        """Read the server's next message within `timeout` seconds. Returns False if there is none."""
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            return False
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(
                f"tests/games.py ended with {self.server.wait()}:\n{(self.folder / 'server.err').read_text()}"
            )
        message = json.loads(line)
        if "returncode" in message:
            self.running.pop(message["pid"]).returncode = message["returncode"]
        else:
            self.starting.pid = message["pid"]
            self.running[message["pid"]] = self.starting
        return True

    def close(self) -> None:
        """Stop the server and the games that are still running."""
        if self.server:
            self.server.stdin.close()
            self.server.wait(timeout=60)
            self.server.stdout.close()


class Place:
    """A folder with its own cache, store and runs."""

    def __init__(self, folder: Path, games: Games):
        self.folder, self.games = folder, games

    def words(self, *words: str, run: str = "run") -> list[str]:
        """Return the arguments of run.py that play the smoke game in this folder with the settings `words`."""
        settings = {
            "cache.path": self.folder / "cache",
            "store.path": self.folder / "store",
            "hydra.run.dir": self.folder / run,
            "tracking.wandb": "disabled",
            "evaluation.bootstrap": 50,
        }
        given = {word.split("=")[0] for word in words}
        return [*words, "experiment=smoke", *(f"{key}={value}" for key, value in settings.items() if key not in given)]

    def start(self, *words: str, run: str = "run", env: dict[str, str] | None = None, code: str = "") -> Game:
        return self.games.start(*self.words(*words, run=run), env=env, code=code)

    def play(
        self, *words: str, run: str = "run", status: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        result = self.games.play(*self.words(*words, run=run), env=env)
        assert result.returncode == status, result.stdout + result.stderr
        return result

    def stages(self) -> Counter:
        return Counter(path.parent.parent.name for path in (self.folder / "store").glob("*/*/manifest.json"))

    def metrics(self, run: str = "run") -> list[dict]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]


def serve() -> list[str]:
    """Fork a process for every request. Returns only in the forked processes, with the arguments of the game to play."""
    for name in IMPORTS:
        importlib.import_module(name)
    tasks = Path("/proc/self/task")  # includes threads that Python does not list; Linux only
    if (threads := len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()) > 1:
        sys.exit(f"{threads} threads run after the imports; a fork would lose them and the locks that they hold")
    gc.freeze()  # saves each game a second of collecting half a million objects at exit
    running: set[int] = set()

    def send(**message: int) -> None:  # one write, which a signal handler cannot interrupt
        os.write(1, json.dumps(message).encode() + b"\n")

    def reap(*_) -> None:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                send(pid=pid, returncode=os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # report the start before the end
        if not (pid := os.fork()):
            become(request)
            return request["words"]
        running.add(pid)
        send(pid=pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pid in running:
        for kill in (os.kill, os.killpg):  # the group includes children, but may not exist yet
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    sys.exit()


def become(request: dict) -> None:
    """Give this forked process the signals, files, environment and folder of a newly started program."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):  # SIGHUP is ignored if nohup started the tests
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
    exec(request["code"], {})


if __name__ == "__main__":
    sys.argv = ["run.py", *serve()]
    # No exception is caught here: the interpreter ends the program as usual.
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
