"""Metrics to metrics.jsonl and W&B, lines and progress bars to the console; silent except on the main process."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.text import Text

from spin.runtime.errors import UserError, brief
from spin.runtime.output import hide
from spin.runtime.progress import Progress

TRAINING = ("sft", "train")  # stages whose rows are steps
START = -1  # `iter` in W&B, which cannot plot null, of policies before iteration 0


class Tracker:
    """Writes a run's metrics to `folder/metrics.jsonl` and, unless disabled, to Weights & Biases.

    `wandb`: see `wandb_mode`, which may raise UserError; `about` is what W&B shows of the run: name, config, project,
    entity, group. W&B starts with the first new row. If it fails, one line says so and the run continues without it. The
    first row empties metrics.jsonl: a run that is repeated writes all rows again. On ranks other than 0 nothing is
    written, shown or sent.
    """

    def __init__(
        self, folder: Path, *, wandb: str = "auto", rank: int = 0, console: Console | None = None, **about: Any
    ):
        self.folder, self.active = Path(folder), rank == 0
        # rich's width where there is no terminal, 80, is narrow for tables in a log file.
        self.console = console or Console(width=None if sys.stdout.isatty() else 100)
        self._mode = wandb_mode(wandb) if self.active else "disabled"
        self._about = _shown(about) | {key: about[key] for key in ("project", "entity") if key in about}
        self._run: Any = None
        self._rows = self._steps = 0
        self._samples: list[list[str]] = []
        self._waiting: list[Callable[[Any], None]] = []  # rows of reused stages, until W&B starts

    def log(self, row: dict, reused: bool = False) -> None:
        """Write one row to metrics.jsonl, keys as they are (NaN and infinity become null), and send it to W&B.

        `stage`, `iter` and `step` identify the row. In W&B other keys are prefixed with the stage (`train/loss`), an
        interval becomes keys `_low` and `_high`, and `global_step` counts the steps of all iterations. Rows of `reused`
        stages are sent with the first new row: a run that reuses everything leaves nothing in W&B.
        """
        if not self.active:
            return
        row = _shown(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a" if self._rows else "w", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._rows += 1
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

            table = wandb.Table(["iteration", "prompt", "real", "generated"], self._samples)
            run.log({"samples": table, "global_step": self._steps})

        self._send(send, reused)

    def leaderboard(self, columns: list[str], rows: list[list], figures: list[Path]) -> None:
        """Send a sweep's table and figures to W&B."""

        def send(run: Any) -> None:
            import wandb

            # Mixed: some rows have null, or "mean of 3" for a seed.
            table = wandb.Table([*columns], to_json_types(rows), allow_mixed_types=True)
            run.log({"leaderboard": table, **{path.stem: wandb.Image(str(path)) for path in figures}})

        self._send(send, reused=False)

    def progress(self, title: str, total: int, unit: str) -> "Progress":
        """Show the progress of a stage of `total` `unit` ("pairs"): `with tracker.progress(...) as bar`.

        A bar on a terminal, elsewhere a line about every ten seconds; then one line that stays.
        """
        return Progress(self.console if self.active else None, title, total, unit)

    def close(self, summary: dict | None = None) -> None:
        """End the log with `summary` for W&B, which shows a failed run if an exception is passing. `say` still works."""
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

        if self._mode == "auto":
            self._mode = "online" if _logged_in() else "offline"
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
        for stage in (*TRAINING, "generate", "score", "validate", "evaluate", "harness", "mt_bench", "compare"):
            run.define_metric(f"{stage}/*", step_metric="global_step" if stage in TRAINING else "iter")
        if self._mode == "online":
            self._print(f"W&B: {run.url}")
        return run

    def _wandb_row(self, row: dict) -> dict:
        stage, iteration = row.get("stage"), row.get("iter")
        self._steps += stage in TRAINING
        sent: dict[str, Any] = {"iter": START if iteration is None else iteration, "global_step": self._steps}
        for key, value in row.items():
            if isinstance(value, list) and len(value) == 2:
                sent |= {f"{stage}/{key}_low": value[0], f"{stage}/{key}_high": value[1]}
            elif key not in ("stage", "iter"):
                sent[f"{stage}/{key}"] = value
        return sent

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _lost(self, error: Exception) -> None:
        self._print(
            f"Warning: W&B stopped working and is off for this run; metrics.jsonl has everything. ({brief(error)})"
        )


def to_json_types(value: Any) -> Any:
    """Convert `value` to JSON types: torch and numpy to numbers, NaN and infinity to null, paths to text."""
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda array: array.tolist())


def _shown(value: Any) -> Any:
    """`value` in JSON types, without secrets."""
    return json.loads(hide(json.dumps(to_json_types(value))))


def wandb_mode(setting: str) -> str:
    """Return the W&B mode of `tracking.wandb=setting`; `auto` is WANDB_MODE, or online if there is a login, else offline.

    The login is looked up when W&B starts; only for `online` here. Raises UserError if there is none.
    """
    mode = os.environ.get("WANDB_MODE", "auto") if setting == "auto" else setting
    if mode == "online" and not _logged_in():
        raise UserError("W&B is to be online and has no login: run `wandb login`, or set tracking.wandb=offline.")
    return mode


def _logged_in() -> bool:
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))
    return wandb.login(prompt=False, verify=False)
