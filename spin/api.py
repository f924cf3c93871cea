"""The Python interface, for notebooks and scripts: `spin.play(model=..., data=...)`."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.config.hydra import load_run, to_words
from spin.config.schema import Config
from spin.runtime.errors import UserError, user_message


@dataclass(frozen=True)
class Result:
    """The result of a finished game or, with stage="evaluate", the measures of a model.

    `policies` are model folders by label, in playing order ("sft", "iter0", ...). `best` is the folder of the selected
    policy or else the last. `measures` are those of all policies and the start on held-out prompts, by label and name
    ("nll_per_token", and "nll_per_token_interval" for its bounds). `pairs` are the parquet files of training pairs, by
    iteration. `summary` is the content of game.json. All files are in `folder`.
    """

    folder: Path
    policies: dict[str, Path]
    best: Path | None
    pairs: dict[int, Path]
    measures: dict[str, dict[str, Any]] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    config: Config = field(repr=False)


def play(*words: str, **settings: Any) -> Result:
    """Play a game as `python run.py` does, in the same folder and with the same store, reusing stages played before.

    `settings` are groups and keys: `model="zephyr"`, `loss={"beta": 0.1}`, `iter=2`. `words` are settings as on the
    command line: "loss=hinge". `model` and `data` may also be a path or a hub name. Raises UserError with one line.
    """
    try:
        given = [*words, *to_words(settings)]
        config, folder = load_run(given)
        if config.plan or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("spin.play plays one game in one process: use run.py for plan=true and with torchrun.")
        from spin.game import play as play_game

        summary = play_game(config, folder, shlex.join(["python", "run.py", *given]))
    except Exception as error:
        if (line := user_message(error)) is None:
            raise
        raise UserError(line) from None
    policies = {"sft": folder / "sft" / "policy"} if (folder / "sft" / "policy").is_dir() else {}
    policies |= {f"iter{played['iter']}": folder / played["policy"] for played in summary["iterations"]}
    best = next(reversed(policies.values()), None)
    if summary["selected"]:
        path = Path(summary["selected"]["path"])  # absolute for the start
        best = path if path.is_absolute() else folder / "best" / "policy"
    return Result(
        folder,
        policies,
        best,
        {played["iter"]: folder / f"iter{played['iter']}" / "pairs.parquet" for played in summary["iterations"]},
        {row["policy"]: row for row in summary["evaluations"]},
        summary,
        config,
    )
