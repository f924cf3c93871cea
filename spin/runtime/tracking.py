"""W&B, metrics.jsonl, progress bars and lines for a person; silent off rank 0. Nothing here knows of the game."""

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
START = -1  # W&B cannot plot a null: policies from before iteration 0 stand at iter = -1 there


class Tracker:
    """Where a run's numbers go: `folder/metrics.jsonl` and, unless disabled, Weights & Biases.

    `wandb` is auto, online, offline or disabled. `auto` follows WANDB_MODE, then WANDB_DISABLED, then is online where a
    login for W&B is found and offline where none is. W&B starts with the first row and never ends a run: when it
    fails, one line says so and the run goes on without it.

    metrics.jsonl is emptied with the first row: a run that is played again writes its results whole. On ranks other than 0 nothing
    is written, shown or sent, and `folder` is not touched.

    Raises UserError: online is asked for without a login, or WANDB_MODE has a value that W&B does not know.
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
        if not self.active:
            return
        self._mode = wandb_mode(wandb)
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
        self._waiting: list[Callable[[Any], None]] = []  # for W&B, once something new is logged
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = None

    def log(self, row: dict, reused: bool = False) -> None:
        """Write one row to metrics.jsonl, keys as they are (NaN and infinity become null), and send it to W&B.

        `stage`, `iter` and `step` say what the row belongs to. In W&B every other key is put under its stage
        (`train/loss`), an interval [lo, hi] becomes two keys `_low` and `_high`, and `global_step` counts the steps of
        all stages and iterations through. Rows of a `reused` stage wait: W&B gets them once something new comes, so that
        its record of a run is whole and a run that finds everything done leaves none.
        """
        if not self.active:
            return
        row = to_json_types(row)
        if self._file is None:  # not before: a run that fails at once leaves the record of the one before
            self._file = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self._send(lambda run: run.log(self._wandb_row(row)), reused)

    def say(self, text: str) -> None:
        """Show one line to the person who watches; brackets in it are text, not markup."""
        if self.active:
            self._print(text)

    def samples(self, iteration_label: str, rows: list[dict], reused: bool = False) -> None:
        """Add `rows` of {"prompt", "real", "generated"} to the one W&B table of samples, under `iteration_label`."""
        if not self.active:
            return
        self._samples += [[iteration_label, row["prompt"], row["real"], row["generated"]] for row in rows]

        # The whole table each time: W&B shows the last one, and a run that stops early has what there was until then.
        def send(run: Any) -> None:
            import wandb

            columns: list[str | int] = ["iteration", "prompt", "real", "generated"]
            run.log({"samples": wandb.Table(columns=columns, data=self._samples), "global_step": self._steps})

        self._send(send, reused)

    def leaderboard(self, columns: list[str], rows: list[list], figures: list[Path]) -> None:
        """Send the table of a sweep, and what was drawn of it, to W&B."""
        if not self.active:
            return

        def send(run: Any) -> None:
            import wandb

            # Whatever stands in a column, some row may have another type there: nothing, or "mean of 3" for a seed.
            table = wandb.Table(columns=list(columns), data=to_json_types(rows), allow_mixed_types=True)
            run.log({"leaderboard": table, **{path.stem: wandb.Image(str(path)) for path in figures}})

        self._send(send, reused=False)

    def progress(self, title: str, total: int, unit: str) -> "Progress":
        """Show how far a stage of `total` `unit` (say "pairs") has come: `with tracker.progress(...) as bar`.

        A bar on a terminal; elsewhere a line about every ten seconds; in both cases one line that stays at the end.
        """
        return Progress(self.console if self.active else None, title, total, unit)

    def close(self, summary: dict | None = None) -> None:
        """End the log; `summary` is kept with it in W&B. Called while an exception passes, W&B shows a failed run.

        `say` goes on working; a second `close` does nothing.
        """
        if not self.active:
            return
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
        """Run `action(run)`, starting W&B first where that has not happened; a failure switches W&B off."""
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
        except Exception as error:  # whatever breaks in W&B, the run is worth more than its log
            self._mode, self._run = "disabled", None
            self._lost(error)

    def _start(self) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # the settings of `init` come too late for what its login says
        run = wandb.init(
            dir=self.folder,
            mode=self._mode,  # type: ignore[arg-type]
            reinit="create_new",  # leaves a run alone that the caller's own process may have open
            save_code=False,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,  # git state would bring a diff of the working tree with it: that is code
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=30,  # W&B's own 90 s and endless upload would hold a run up where the network is gone
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
            # `step` starts again with every stage and iteration; the global one goes on from where the last stopped.
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
    """Goes quiet where nobody is left to read: a closed pipe (`| head`) or a lost terminal must not end a game."""

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
        console.width = 100  # rich takes 80 where it cannot ask; a log file has room for a table
    return console


def to_json_types(value: Any) -> Any:
    """`value` as JSON can hold it: scalars of torch and numpy become numbers, NaN and infinity null, paths text."""
    if isinstance(value, dict):
        return {str(key): to_json_types(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(entry) for entry in value]
    if isinstance(value, float):  # also numpy's float64; the others come as `tolist`
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return to_json_types(value.tolist())
    return str(value) if isinstance(value, Path) else value


def wandb_mode(setting: str) -> str:
    """What `tracking.wandb=setting` comes to here: online, offline or disabled.

    Raises UserError: online is asked for (by the setting or WANDB_MODE) without a login, or an unknown WANDB_MODE.
    """
    asked, mode = f"tracking.wandb={setting}", setting
    if setting == "auto":
        variable = os.environ.get("WANDB_MODE", "").lower()
        if variable:
            asked = f"WANDB_MODE={variable}"
            if variable not in MODES:
                raise UserError(f"{asked}: is online, offline or disabled; unset it or give one of these.")
            mode = MODES[variable]
        elif os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            return "disabled"
        else:
            return "online" if _logged_in() else "offline"
    if mode == "online" and not _logged_in():
        raise UserError(f"{asked}, but there is no login for W&B: run `wandb login`, or set tracking.wandb=offline.")
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
