"""Metrics to metrics.jsonl and W&B, lines and progress bars to the console; silent except on the main process."""

import json
import math
import netrc
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from spin.runtime.errors import UserError
from spin.runtime.progress import Progress

MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
START = -1  # `iter` in W&B, which cannot plot null, of policies before iteration 0


class Tracker:
    """Writes a run's metrics to `folder/metrics.jsonl` and, unless disabled, to Weights & Biases.

    `wandb`: see `wandb_mode`, which may raise UserError. W&B starts with the first new row. If it fails, one line says so
    and the run goes on without it. The first row empties metrics.jsonl: a run that is repeated writes all rows again. On
    ranks other than 0 nothing is written, shown or sent.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        config: dict,
        wandb: str = "auto",
        project: str = "spin",
        entity: str | None = None,
        rank: int = 0,
        group: str | None = None,
        console: Console | None = None,
    ):
        self.folder, self.console, self.active = Path(folder), console or _console(), rank == 0
        self._run: Any = None
        self._file: Any = None
        self._mode = wandb_mode(wandb) if self.active else "disabled"
        self._about: dict[str, Any] = {
            "name": name,
            "config": to_json_types(config),
            "project": project,
            "entity": entity,
            "group": group,
        }
        self._steps, self._before = 0, 0
        self._part: tuple | None = None
        self._samples: list[Iterable[Any]] = []
        self._waiting: list[Callable[[Any], None]] = []  # rows of reused stages, until W&B starts
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)

    def log(self, row: dict, reused: bool = False) -> None:
        """Write one row to metrics.jsonl, keys as they are (NaN and infinity become null), and send it to W&B.

        `stage`, `iter` and `step` identify the row. In W&B other keys are prefixed with the stage (`train/loss`), an
        interval [lo, hi] becomes keys `_low` and `_high`, and `global_step` counts the steps of all iterations. Rows of
        `reused` stages are sent with the first new row: a run that reuses everything leaves nothing in W&B.
        """
        if not self.active:
            return
        row = to_json_types(row)
        if self._file is None:  # not earlier: a run that fails at once keeps the previous record
            self._file = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self._send(lambda run: run.log(self._wandb_row(row)), reused)

    def say(self, text: str) -> None:
        """Print one line; brackets in it are text, not markup."""
        if self.active:
            self._print(text)

    def samples(self, iteration_label: str, rows: list[dict], reused: bool = False) -> None:
        """Add `rows` of {"prompt", "real", "generated"} to the one W&B table of samples, under `iteration_label`."""
        self._samples += [[iteration_label, row["prompt"], row["real"], row["generated"]] for row in rows]

        # The complete table each time: W&B shows the last one.
        def send(run: Any) -> None:
            import wandb

            columns: list[str | int] = ["iteration", "prompt", "real", "generated"]
            run.log({"samples": wandb.Table(columns=columns, data=self._samples), "global_step": self._steps})

        self._send(send, reused)

    def leaderboard(self, columns: list[str], rows: list[list], figures: list[Path]) -> None:
        """Send a sweep's table and figures to W&B."""

        def send(run: Any) -> None:
            import wandb

            # Mixed: some rows have null, or "mean of 3" for a seed.
            table = wandb.Table(columns=list(columns), data=to_json_types(rows), allow_mixed_types=True)
            run.log({"leaderboard": table, **{path.stem: wandb.Image(str(path)) for path in figures}})

        self._send(send, reused=False)

    def progress(self, title: str, total: int, unit: str) -> "Progress":
        """Show the progress of a stage of `total` `unit` ("pairs"): `with tracker.progress(...) as bar`.

        A bar on a terminal, elsewhere a line about every ten seconds; then one line that stays.
        """
        return Progress(self.console if self.active else None, title, total, unit)

    def close(self, summary: dict | None = None) -> None:
        """End the log with `summary` for W&B, which shows a failed run if an exception is passing. `say` still works."""
        if self._file:
            self._file.close()
        run, mode = self._run, self._mode
        self._run, self._mode = None, "disabled"
        if run is None:
            return
        try:
            run.summary.update(to_json_types(summary or {}))
            run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
        except Exception as error:
            self._lost(error)
        else:
            if mode == "offline":
                self._print(f"W&B is offline; to upload this run: wandb sync {Path(run.dir).parent}")

    def _send(self, action: Callable[[Any], None], reused: bool) -> None:
        """Call `action(run)`, starting W&B if needed; a failure switches W&B off."""
        if self._mode == "disabled":
            return
        self._waiting.append(action)
        if reused and self._run is None:
            return
        try:
            if self._run is None:
                self._run = self._start()
            for waiting in self._waiting:
                waiting(self._run)
            self._waiting.clear()
        except Exception as error:  # whatever fails in W&B must not end the run
            self._mode, self._run = "disabled", None
            self._lost(error)

    def _start(self) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # `init` applies its settings after the login's output
        run = wandb.init(
            dir=self.folder,
            mode=self._mode,  # type: ignore[arg-type]
            reinit="create_new",  # leaves another open run of this process alone
            save_code=False,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,  # git state would upload a diff of the working tree
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=30,  # W&B's defaults, 90 s and no limit, would delay a run without network
                finish_timeout=60,
            ),
            **self._about,
        )
        for stage in ("train", "sft"):
            run.define_metric(f"{stage}/*", step_metric="global_step")
        for stage in ("generate", "score", "evaluate", "harness", "mt_bench", "compare"):
            run.define_metric(f"{stage}/*", step_metric="iter")
        if self._mode == "online":
            self._print(f"W&B: {run.url}")
        return run

    def _wandb_row(self, row: dict) -> dict:
        stage = row.get("stage")
        sent: dict[str, Any] = {}
        for key, value in row.items():
            name = f"{stage}/{key}" if stage else key
            if key in ("stage", "iter") or value is None:
                continue
            if isinstance(value, list) and len(value) == 2:
                ends = (f"{name}_low", f"{name}_high")
                sent |= {end: bound for end, bound in zip(ends, value, strict=True) if bound is not None}
            else:
                sent[name] = value
        if stage in ("train", "sft"):
            # `step` restarts with each stage and iteration; the global step continues.
            part = (stage, row["iter"])
            if part != self._part:
                self._part, self._before = part, self._steps + 1 - row["step"]
            self._steps = self._before + row["step"]
        iteration = row.get("iter")
        return sent | {"iter": START if iteration is None else iteration, "global_step": self._steps}

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _lost(self, error: Exception) -> None:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        self._print(f"Warning: W&B stopped working and is off for this run; metrics.jsonl has everything. ({reason})")


class _Console(Console):
    """A console that a closed pipe (`| head`) or a lost terminal silences, and does not end the run."""

    def print(self, *objects: Any, **settings: Any) -> None:
        try:
            super().print(*objects, **settings)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True


def _console() -> Console:
    console = _Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 100  # rich's default of 80 is narrow for tables in a log file
    return console


def to_json_types(value: Any) -> Any:
    """Convert `value` to JSON types: torch and numpy to numbers, NaN and infinity to null, paths to text."""
    if isinstance(value, dict):
        return {str(key): to_json_types(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(entry) for entry in value]
    if isinstance(value, float):  # also numpy's float64; other types have `tolist`
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return to_json_types(value.tolist())
    return str(value) if isinstance(value, Path) else value


def wandb_mode(setting: str) -> str:
    """Return the W&B mode of `tracking.wandb=setting`: online, offline or disabled.

    `auto` follows WANDB_MODE, then WANDB_DISABLED, and else is online if there is a login and offline if not.
    Raises UserError: online without a login, or an unknown WANDB_MODE.
    """
    source, mode = f"tracking.wandb={setting}", setting
    if setting == "auto":
        variable = os.environ.get("WANDB_MODE", "").lower()
        if variable:
            source = f"WANDB_MODE={variable}"
            if variable not in MODES:
                raise UserError(f"{source}: must be online, offline or disabled; unset it or use one of these.")
            mode = MODES[variable]
        elif os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            return "disabled"
        else:
            return "online" if _logged_in() else "offline"
    if mode == "online" and not _logged_in():
        raise UserError(f"{source}, but there is no login for W&B: run `wandb login`, or set tracking.wandb=offline.")
    return mode


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
