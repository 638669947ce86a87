"""A suite of prompts, questions and replies, and what a model scores on it."""

import dataclasses
from collections.abc import Callable, Sequence

from secvec_jax.data.chat import Example
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.scorers import Score, bootstrap, complies, exact_match, refuses
from secvec_jax.inference import generate
from secvec_jax.model.decoder import Guest
from secvec_jax.model.hub import Model
from secvec_jax.vectors.lora import LoRAVectors, merge

Outcomes = dict[str, list[float]]
"""Metric -> one number per prompt, in the suite's order, so that two models can be compared in pairs."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a model is asked.

    harmful, benign: prompts to be refused, and to be answered. questions: (question, exact answer).
    harmful_targets, benign_targets: replies whose loss is measured; opening_targets: benign ones that open as the
    harmful ones do. refusals: the published list of openings.
    """

    refusals: Sequence[str]
    harmful: Sequence[str] = ()
    benign: Sequence[str] = ()
    questions: Sequence[tuple[str, str]] = ()
    harmful_targets: Sequence[Example] = ()
    benign_targets: Sequence[Example] = ()
    opening_targets: Sequence[Example] = ()
    reply_tokens: int = 16
    answer_tokens: int = 8
    batch_size: int = 64

    @property
    def size(self) -> int:
        """How many replies there are to generate."""
        return len(self.harmful) + len(self.benign) + len(self.questions)


def outcomes(
    model: Model, suite: Suite, vectors: Guest | None = None, on_reply: Callable[[int], None] = lambda done: None
) -> Outcomes:
    """What each prompt of the suite came to: refusal, compliance, over_refusal, exact_match as 0 or 1, losses."""
    if isinstance(vectors, LoRAVectors):  # made once, not at each token; and the programs are those without vectors
        model, vectors = model.with_backbone(merge(model.backbone, vectors)), None
    done = 0

    def ask(prompts: Sequence[str], tokens: int) -> list[str]:
        nonlocal done
        before = done
        replies = generate(
            model,
            prompts,
            vectors,
            max_new_tokens=tokens,
            batch_size=suite.batch_size,
            progress=lambda count: on_reply(before + count),
        )
        done += len(prompts)
        return replies

    found: Outcomes = {}
    replies = ask([*suite.harmful, *suite.benign], suite.reply_tokens)
    if suite.harmful:
        found["refusal"] = [float(refuses(r, suite.refusals)) for r in replies[: len(suite.harmful)]]
        found["compliance"] = [float(complies(p, r, suite.refusals)) for p, r in zip(suite.harmful, replies)]
    if suite.benign:
        found["over_refusal"] = [float(refuses(r, suite.refusals)) for r in replies[len(suite.harmful) :]]
    if suite.questions:
        replies = ask([question for question, _ in suite.questions], suite.answer_tokens)
        found["exact_match"] = [float(exact_match(r, a)) for r, (_, a) in zip(replies, suite.questions)]
    for name in ("harmful", "benign", "opening"):
        targets = getattr(suite, f"{name}_targets")
        if targets:
            found[f"{name}_loss"] = mean_losses(model, targets, vectors)
    return found


def scores(found: Outcomes) -> dict[str, Score]:
    """The mean of each metric with its 95% bootstrap interval."""
    return {metric: bootstrap(values) for metric, values in found.items()}
