"""The evaluate stage: a policy's answers to the held-out prompts and the measures computed from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from spin.data.examples import Example
from spin.engines.packing import Continuations
from spin.evaluation.answer_checks import correct
from spin.evaluation.measures import HeldOut, held_out_of, measures
from spin.evaluation.two_sample import Features, classifier_scores, clusters, embed, features, with_embeddings
from spin.method.pairs import Pair, make_pairs, read_pairs, write_pairs
from spin.models.policy import Policy, content_id
from spin.pipeline.context import Run
from spin.pipeline.generate import answer_prompts, generation_inputs
from spin.pipeline.score import score_items
from spin.pipeline.stage import Measurement, Work
from spin.runtime.random import seed_of
from spin.runtime.store import Artifact
from spin.runtime.tables import Rows

EVALUATION_STREAM = -2  # random stream, besides those of the iterations


@dataclass(frozen=True)
class Evaluation:
    """The held-out answers and measures of the policy with the given label."""

    label: str
    iteration: int | None
    held_out: HeldOut
    measures: dict


@dataclass(frozen=True, eq=False)
class Evaluate(Measurement[Evaluation]):
    """The measurement of `policy` on the held-out prompts, also against the opponent if its evaluation is given."""

    name, title_format = "evaluate", "{stage.name} {stage.policy.label}"
    shows_samples: ClassVar[bool] = True
    opponent: "Evaluate | None" = None

    def examples(self, run: Run) -> Rows[Example]:
        return run.data.held_out

    def inputs(self, run: Run, policy: Policy, opponent: Evaluation | None = None) -> dict:
        return {
            "policy": policy.id,
            "prompts": self.examples(run).digest,
            "seed": run.config.seed,
            "stop_ids": sorted(run.stop_ids),
            "opponent": opponent.held_out.digest if opponent else None,
            "bootstrap": run.config.evaluation.bootstrap,
            "check": run.config.data.check,
            "embedder": _embedder_id(run.config.evaluation.embedder),
            "numerics": run.numerics,
            **generation_inputs(run, len(self.examples(run))),
        }

    def build(self, run: Run, work: Work, policy: Policy, opponent: Evaluation | None = None) -> dict:
        config = run.config
        # All policies use the same random numbers, which reduces the sampling noise of their differences.
        seed = seed_of(config.seed, EVALUATION_STREAM, bits=32)
        examples = self.examples(run)
        answers = answer_prompts(run, work, policy, examples, 1, seed)
        pairs, _ = make_pairs(examples, answers, keep_all=True)
        responses = {"real": [pair.real_ids for pair in pairs], "generated": [pair.generated_ids for pair in pairs]}
        if opponent:  # for the margin
            responses["opponent_generated"] = [pair.generated_ids for pair in opponent.held_out.pairs]
        columns = zip(pairs, *responses.values(), strict=True)
        items = [Continuations(pair.prompt_ids, tuple(ids)) for pair, *ids in columns]
        scores = score_items(run, work, policy, items).view(len(items), -1)
        if not run.ranks.is_main_process:
            return {}
        logps = {name: scores[:, column] for column, name in enumerate(responses)}
        write_pairs(work.folder / "held_out.parquet", pairs, {"policy": logps})
        observed = _features(run, pairs)
        held_out = HeldOut(
            pairs,
            {name: values.double().numpy() for name, values in logps.items()},
            classifier_scores(observed),
            clusters(observed, config.seed),
            correct(pairs, config.data.check),
        )
        before = opponent.held_out if opponent else None
        result = measures(held_out, before, config.evaluation.bootstrap, config.seed)
        facts = {"measures": result, "per_prompt": held_out.per_prompt}
        (work.folder / "evaluation.json").write_text(json.dumps(facts, indent=2) + "\n")
        work.log({"step": 0, **result})
        return result

    def read(self, run: Run, artifact: Artifact, **needs) -> Evaluation:
        facts = json.loads((artifact.folder / "evaluation.json").read_text())
        pairs, _ = read_pairs(artifact.folder / "held_out.parquet")
        if self.shows_samples:
            shown = pairs[: run.config.evaluation.samples]
            samples = [{"prompt": p.prompt, "real": p.real, "generated": p.generated} for p in shown]
            run.tracker.samples(self.policy.label, samples, artifact.reused)
        held_out = held_out_of(pairs, facts["per_prompt"])
        return Evaluation(self.policy.label, self.iteration, held_out, facts["measures"])


class Validate(Evaluate):
    """The measurement of `policy` on the validation prompts, which are used to select the final policy."""

    name = "validate"
    shows_samples = False

    def examples(self, run: Run) -> Rows[Example]:
        return run.data.validation


def _features(run: Run, pairs: Sequence[Pair]) -> Features:
    """Return the features by which the two-sample tests compare human and model answers."""
    prompts, real, generated = ([getattr(pair, name) for pair in pairs] for name in ("prompt", "real", "generated"))
    observed = features(prompts, real, generated)
    if (embedder := run.config.evaluation.embedder) is None:
        return observed
    return with_embeddings(observed, embed(embedder, [*prompts, *prompts], [*real, *generated], run.device))


def _embedder_id(embedder: str | None) -> str | None:
    folder = Path(embedder).expanduser() if embedder else None
    return content_id(folder) if folder and folder.is_dir() else embedder
