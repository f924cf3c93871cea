"""Define the studies: the comparisons and the plot of each."""

from dataclasses import dataclass, field
from typing import Any

from experiments.tables import Where, plain


@dataclass(frozen=True)
class Effect:
    """A paired difference between policies `a` and `b` over seeds. If `b` is None, `a` is compared with the start.

    `tuned` is a column (the learning rate) that `a` and `b` do not fix. For each of them and every seed, the value with
    the best mean over the other seeds is chosen, so that no policy is chosen by its own result.
    """

    text: str
    a: Where
    b: Where | None = None
    tuned: str | None = None


@dataclass(frozen=True)
class Study:
    """The effects of a study, and its plot: the mean change from the start against `x`, one panel per measure."""

    x: str
    label: str
    series: str
    names: dict[Any, str]
    effects: tuple[Effect, ...]
    facet: str | None = None
    facets: dict[Any, str] = field(default_factory=dict)
    where: Where = field(default_factory=dict)
    log: bool = False
    limits: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # of the y axis by measure, if outliers need them


STARTS = {8: "SFT too short (8 epochs)", 16: "SFT at its best (16)", 32: "SFT too long (32)"}
OBJECTIVES = {
    "spin 1": "SPIN, β 1",
    "spin 1 sft 0.1": "SPIN, β 1, SFT anchor 0.1",
    "spin 1 floor 1": "SPIN, β 1, floor 1",
    "space": "SPACE",
    "none 1": "no reference",
    "none 1 history 0.1": "T-SPIN",
}
METHODS = {"spin": "SPIN, 2 iterations of 2 passes", "sft": "continued SFT, 4 passes"}

STUDIES: dict[str, Study] = {
    "continued_sft": Study(
        x="lr",
        label="learning rate",
        log=True,
        series="method",
        names=METHODS,
        facet="start_epochs",
        facets=STARTS,
        where={"passes": 4},
        limits={"kl": (-0.55, 0.45), "right": (-0.15, 0.15)},
        effects=tuple(
            Effect(
                f"{name}; {rate}: {text}",
                {"method": a, "start_epochs": start, **at},
                {"method": b, "start_epochs": start, **at} if b else None,
                tuned,
            )
            for start, name in STARTS.items()
            for rate, tuned, at in (
                ("tuned lr", "lr", {"passes": 4}),
                ("lr 1e-5", None, {"passes": 4, "lr": 1e-5}),
                ("lr 3e-5", None, {"passes": 4, "lr": 3e-5}),
            )
            for text, a, b in (
                ("SPIN − start", "spin", None),
                ("continued SFT − start", "sft", None),
                ("SPIN − continued SFT", "spin", "sft"),
            )
        ),
    ),
    "iterations": Study(
        x="passes",
        label="passes over the prompts",
        series="part",
        names={"iterations": "a new opponent every 2 passes", "epochs": "the first opponent throughout"},
        effects=(
            Effect("iteration 0 − start", {"part": "iterations", "iter": 0}),
            *(
                Effect(
                    f"iteration {t} − iteration {t - 1}",
                    {"part": "iterations", "iter": t},
                    {"part": "iterations", "iter": t - 1},
                )
                for t in (1, 2, 3)
            ),
            *(
                Effect(
                    f"iterations 0 to {t} − {2 * t + 2} passes in iteration 0",
                    {"part": "iterations", "iter": t},
                    {"part": "epochs", "passes": 2 * t + 2},
                )
                for t in (1, 3)
            ),
        ),
    ),
    "data_size": Study(
        x="size",
        label="prompts (the start was fine-tuned on 512)",
        log=True,
        series="method",
        names={"spin": "SPIN, iteration 0", "sft": "continued SFT, same number of passes"},
        effects=(
            *(
                Effect(f"SPIN on {size} prompts − start", {"method": "spin", "size": size})
                for size in (128, 256, 512, 2048)
            ),
            Effect("SPIN: 2048 − 128 prompts", {"method": "spin", "size": 2048}, {"method": "spin", "size": 128}),
            Effect(
                "2048 prompts: SPIN − continued SFT", {"method": "spin", "size": 2048}, {"method": "sft", "size": 2048}
            ),
        ),
    ),
    "links": Study(
        x="iter",
        label="iteration",
        series="link",
        names={link: link for link in ("logistic", "hinge", "exponential", "correlation")},
        facet="lr",
        facets={3e-5: "lr 3e-5", 1e-4: "lr 1e-4"},
        effects=tuple(
            Effect(
                f"lr {plain(lr)}: {link} − logistic",
                {"lr": lr, "iter": 1, "link": link},
                {"lr": lr, "iter": 1, "link": "logistic"},
            )
            for lr in (3e-5, 1e-4)
            for link in ("hinge", "exponential", "correlation")
        ),
    ),
    "beta_lr": Study(
        x="lr",
        label="learning rate",
        log=True,
        series="beta",
        names={0.1: "β = 0.1", 1.0: "β = 1", 5.0: "β = 5"},
        facet="iter",
        facets={0: "iteration 0", 1: "iteration 1"},
        effects=tuple(
            Effect(f"lr {plain(lr)}, iteration 1: β {beta:g} − start", {"lr": lr, "beta": beta, "iter": 1})
            for lr in (1e-5, 3e-5, 1e-4)
            for beta in (0.1, 1.0, 5.0)
        ),
    ),
    "last_beta": Study(
        x="beta",
        label="β of the last iteration",
        log=True,
        series="lr",
        names={3e-5: "same learning rate (3e-5)", 6e-6: "a fifth of it (6e-6)"},
        where={"iter": 3},
        effects=(
            *(
                Effect(
                    f"lr {plain(lr)} in the last iteration: β {beta:g} − β 0.1",
                    {"iter": 3, "lr": lr, "beta": beta},
                    {"iter": 3, "lr": lr, "beta": 0.1},
                )
                for lr in (3e-5, 6e-6)
                for beta in (1.0, 5.0)
            ),
            Effect(
                "β 5: lr 6e-6 − lr 3e-5", {"iter": 3, "lr": 6e-6, "beta": 5.0}, {"iter": 3, "lr": 3e-5, "beta": 5.0}
            ),
            Effect(
                "β 0.1: lr 6e-6 − lr 3e-5", {"iter": 3, "lr": 6e-6, "beta": 0.1}, {"iter": 3, "lr": 3e-5, "beta": 0.1}
            ),
        ),
    ),
    "replay": Study(
        x="iter",
        label="iteration",
        series="replay",
        names={replay: replay for replay in ("none", "previous", "all")},
        effects=tuple(
            Effect(f"iteration 2: {replay} − none", {"iter": 2, "replay": replay}, {"iter": 2, "replay": "none"})
            for replay in ("previous", "all")
        ),
    ),
    "greedy": Study(
        x="iter",
        label="iteration",
        series="temperature",
        names={1.0: "sampled (temperature 1)", 0.0: "greedy"},
        effects=(
            *(
                Effect(
                    f"iteration {t}: greedy − sampled", {"iter": t, "temperature": 0.0}, {"iter": t, "temperature": 1.0}
                )
                for t in range(3)
            ),
            Effect("greedy, iteration 2 − start", {"iter": 2, "temperature": 0.0}),
            Effect("sampled, iteration 2 − start", {"iter": 2, "temperature": 1.0}),
        ),
    ),
    "reference": Study(
        x="iter",
        label="iteration",
        series="reference",
        names={"opponent": "the opponent", "mixture": "mixture, alpha 0.5", "start": "the start"},
        effects=tuple(
            Effect(
                f"iteration {t}: {reference} − opponent",
                {"iter": t, "reference": reference},
                {"iter": t, "reference": "opponent"},
            )
            for t in (1, 2)
            for reference in ("mixture", "start")
        ),
    ),
    "objectives": Study(
        x="iter",
        label="iteration",
        series="objective",
        names=OBJECTIVES,
        effects=(
            *(
                Effect(f"{name}, iteration {t} − start", {"objective": key, "iter": t})
                for key, name in OBJECTIVES.items()
                for t in (0, 3)
            ),
            *(
                Effect(
                    f"iteration 3: {name} − SPIN, β 1",
                    {"objective": key, "iter": 3},
                    {"objective": "spin 1", "iter": 3},
                )
                for key, name in OBJECTIVES.items()
                if key != "spin 1"
            ),
        ),
    ),
    "answers": Study(
        x="iter",
        label="iteration",
        series="answers",
        names={1: "one answer per prompt", 4: "four"},
        effects=(
            *(
                Effect(f"iteration {t}: four − one", {"iter": t, "answers": 4}, {"iter": t, "answers": 1})
                for t in (0, 1)
            ),
            Effect("four answers, iteration 1 − start", {"iter": 1, "answers": 4}),
        ),
    ),
}
