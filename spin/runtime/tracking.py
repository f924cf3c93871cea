"""Log metrics to metrics.jsonl and W&B, and print lines and progress bars, on the main process only."""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.text import Text

from spin.runtime.errors import UserError, brief
from spin.runtime.files import write_text
from spin.runtime.output import hide
from spin.runtime.progress import Progress
from spin.runtime.signals import received_signal

TRAINING = ("sft", "train")  # stages whose rows are steps
START = -1  # `iter` of policies before iteration 0 in W&B, which cannot plot null
SENT = "wandb/sent.jsonl"  # in the run's folder: settings and id of the W&B run, then a line for each row that was sent
VOLATILE = ("plan", "iter", "store", "cache", "checkpoint", "tracking")  # may change in a continued W&B run


class Tracker:
    """Write a run's metrics to `folder/metrics.jsonl` and, unless disabled, to Weights & Biases.

    `wandb` is described at `wandb_mode`, which may raise UserError; `about` has the run's name, config, project, entity and
    group for W&B. W&B starts with the first new row. If it fails, one line says so and the run continues without it. The
    first row empties metrics.jsonl, since a repeated run logs all rows again. The W&B run is continued with the missing rows
    as long as the settings are the same. On ranks other than 0 nothing is written, printed or sent.
    """

    def __init__(
        self, folder: Path, *, wandb: str = "auto", rank: int = 0, console: Console | None = None, **about: Any
    ):
        self.folder, self.active = Path(folder), rank == 0
        # Without a terminal rich assumes 80 columns, which is narrow for tables in a log file.
        self.console = console or Console(width=None if sys.stdout.isatty() else 100)
        self._mode = wandb_mode(wandb) if self.active else "disabled"
        self._about = _shown(about) | {key: about[key] for key in ("project", "entity") if key in about}
        self._run: Any = None
        self._rows = self._steps = 0
        self._samples: list[list[str]] = []
        self._waiting: list[tuple[str, Callable[[Any], Any]]] = []  # to be sent when W&B starts, with a name
        self._earlier: set[str] = set()  # names that an earlier attempt has sent
        self._next = 0  # step of the W&B run

    def log(self, row: dict, reused: bool = False) -> None:
        """Write one row to metrics.jsonl with unchanged keys (NaN and infinity become null), and send it to W&B.

        `stage`, `iter` and `step` identify the row. In W&B other keys are prefixed with the stage (`train/loss`), an
        interval becomes two keys, `_low` and `_high`, and `global_step` counts the steps of all iterations. Rows of `reused`
        stages are sent with the first new row, so a run that reuses all stages sends only
        the policies that tracking.policies selects.
        """
        if not self.active:
            return
        row = _shown(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a" if self._rows else "w", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._rows += 1
        sent = self._wandb_row(row)
        # The name has no floats, because timings differ when a step is repeated.
        self._send({k: v for k, v in row.items() if not isinstance(v, float | list)}, lambda wandb: sent, reused)

    def say(self, text: str) -> None:
        """Print one line without interpreting markup."""
        if self.active:
            self._print(text)

    def samples(self, iteration_label: str, rows: list[dict], reused: bool = False) -> None:
        """Add `rows` of {"prompt", "real", "generated"} to the W&B table of samples, labelled `iteration_label`."""
        self._samples += [[iteration_label, row["prompt"], row["real"], row["generated"]] for row in rows]

        steps, table = self._steps, [*self._samples]  # always the complete table, because W&B shows the last one
        columns = ["iteration", "prompt", "real", "generated"]
        make = lambda wandb: {"samples": wandb.Table(columns, table), "global_step": steps}  # noqa: E731
        self._send({"samples": iteration_label}, make, reused)

    def policy(self, label: str, folder: Path) -> None:
        """Upload a policy's folder as an artifact, `<name of the run>-<label>`."""

        def make(wandb: Any) -> Any:
            name = re.sub(r"[^\w.-]+", "-", f"{self._about['name']}-{label}")[-128:]
            artifact = wandb.Artifact(name, "model", metadata=self._about["config"])
            # No copy in the cache: offline, W&B reads the files when it uploads them.
            artifact.add_dir(str(folder), skip_cache=True, policy="immutable")
            return artifact

        self._send({"policy": label}, make)

    def leaderboard(self, columns: list[str], rows: list[list], figures: list[Path]) -> None:
        """Send a sweep's table and figures to W&B."""

        def make(wandb: Any) -> dict:
            # Some rows have null, or "mean of 3" for a seed.
            table = wandb.Table([*columns], to_json_types(rows), allow_mixed_types=True)
            return {"leaderboard": table, **{path.stem: wandb.Image(str(path)) for path in figures}}

        self._send({"leaderboard": to_json_types(rows)}, make)

    def progress(self, title: str, total: int, unit: str) -> "Progress":
        """Return the progress of a stage of `total` `unit` ("pairs"): `with tracker.progress(...) as bar`.

        It is a bar on a terminal, elsewhere a line about every ten seconds, and at the end one line with the total.
        """
        return Progress(self.console if self.active else None, title, total, unit)

    def close(self, summary: dict | None = None) -> None:
        """End logging with `summary` for W&B, as failed if an exception is being handled. `say` still works."""
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

    def _send(self, name: dict, make: Callable[[Any], Any], reused: bool = False) -> None:
        """Send the row or artifact that `make(wandb)` returns, unless an earlier attempt has sent it under this `name`.

        Start W&B if needed; a failure turns W&B off.
        """
        if self._mode == "disabled":
            return
        self._waiting.append((json.dumps(name, ensure_ascii=False), make))
        if reused and self._run is None:
            return
        try:
            import wandb

            if self._run is None:
                self._run = self._start()
            for key, make_waiting in self._waiting:
                if key not in self._earlier:
                    self._send_now(key, make_waiting(wandb))
            self._waiting.clear()
        except Exception as error:  # a failure of W&B must not end the run
            self._mode, self._run = "disabled", None
            self._lost(error)

    def _send_now(self, key: str, value: Any) -> None:
        if isinstance(value, dict):
            self._run.log(value, step=self._next, commit=True)
        else:
            sent = self._run.log_artifact(value)
            if self._mode == "online":
                sent.wait()  # `finish` has a short timeout
        self._next += 1
        if not received_signal():  # after a signal, a batch system may have ended W&B's process
            with (self.folder / SENT).open("a", encoding="utf-8") as file:
                file.write(key + "\n")

    def _id(self) -> str:
        """Return the id of the W&B run: that of an earlier attempt with these settings, or a new one. Set `_earlier`."""
        config = {key: value for key, value in self._about["config"].items() if key not in VOLATILE}
        about = json.dumps([self._mode, self._about | {"config": config}], ensure_ascii=False)
        path = self.folder / SENT
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []  # the last line may be cut
        if lines[:1] != [about]:
            lines = [about, secrets.token_hex(4)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{line}\n" for line in lines))
        self._earlier, self._next = set(lines[2:]), len(lines) - 2
        return lines[1]

    def _start(self) -> Any:
        import wandb

        if self._mode == "auto":
            self._mode = "online" if _logged_in() else "offline"
        wandb.setup(wandb.Settings(silent=True))  # `init` applies its settings only after the login has printed
        run = wandb.init(
            dir=self.folder,
            mode=self._mode,  # type: ignore[arg-type]
            id=self._id(),
            resume="allow",
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
                x_transaction_log_flush_interval=0.02,  # seconds; W&B's process may be killed at any time
                init_timeout=30,  # W&B's defaults, 90 s and no limit, delay a run without network
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
        if isinstance(error, OSError):  # W&B's process has ended; its exit hook would raise
            with suppress(Exception):
                sys.modules["wandb"].teardown()
        if received_signal():  # a batch system sends signals to W&B's process, too
            return
        with suppress(OSError):
            (self.folder / SENT).unlink(missing_ok=True)  # the next attempt sends everything, as a new run
        self._print(
            f"Warning: W&B stopped working and is off for this run; metrics.jsonl has everything. ({brief(error)})"
        )


def to_json_types(value: Any) -> Any:
    """Convert `value` to JSON types: torch and numpy to numbers, NaN and infinity to null, paths to text."""
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda array: array.tolist())


def _shown(value: Any) -> Any:
    """Return `value` in JSON types, without secrets."""
    return json.loads(hide(json.dumps(to_json_types(value))))


def wandb_mode(setting: str) -> str:
    """Return the W&B mode of `tracking.wandb=setting`; `auto` means WANDB_MODE, or else online if there is a login.

    The login is checked here for `online` only, otherwise when W&B starts. Raises UserError if there is none.
    """
    mode = os.environ.get("WANDB_MODE", "auto") if setting == "auto" else setting
    if mode == "online" and not _logged_in():
        raise UserError(
            "W&B is set to online (tracking.wandb or WANDB_MODE), but you are not logged in: run `wandb login`, or set "
            "tracking.wandb=offline."
        )
    return mode


def _logged_in() -> bool:
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))
    return wandb.login(prompt=False, verify=False)
