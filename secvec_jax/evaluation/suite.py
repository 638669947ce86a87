"""A suite of prompts, questions and replies, and what a model scores on it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.data.chat import Example
from secvec_jax.data.rows import Message, Row, asked_of, text_of, with_system
from secvec_jax.evaluation.answers import exact_match
from secvec_jax.evaluation.intervals import Score, bootstrap
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.metrics import RULED
from secvec_jax.evaluation.scorers import RULES, refuses, verdict
from secvec_jax.inference import ask
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.model.hub import Model
from secvec_jax.turns import in_thought
from secvec_jax.vectors.lora import merge_adapters

Outcomes = dict[str, list[float]]
"""Metric -> one number per prompt, in the suite's order, so that two models can be compared in pairs."""


@checked
@dataclasses.dataclass(frozen=True)
class Probe:
    """Prompts whose replies a rule of their own turns into numbers: a task, a bias, a style.

    prompts: texts, or conversations up to the assistant's turn. score: a prompt's index and the reply to it -> a
    number, 0 or 1 for a rate. tokens: the length of a reply.
    """

    prompts: Sequence[str | list[Message]]
    score: Callable[[int, str], float]
    tokens: PositiveInt = 8

    @classmethod
    def of(cls, rows: Sequence[Row], score: Callable[[Row, str], float], tokens: int = 8) -> "Probe":
        """What stands before each row's answer is asked; the reply is scored beside its row.

        task = Probe.of(rows, lambda r, reply: exact_match(reply, response_of(r)))
        bias = Probe.of(rows, lambda r, reply: picks(reply, r["options"]) not in (None, response_of(r)))
        caps = Probe.of([with_system(r, "Be brief.") for r in rows], lambda r, reply: shouts(reply))
        """
        return cls([asked_of(r) for r in rows], lambda index, reply: score(rows[index], reply), tokens)


@checked
@dataclasses.dataclass(frozen=True)
class Suite:
    """What a model is asked.

    harmful, benign: prompts to be refused, and to be answered. questions: (question, exact answer). All are texts, or
    conversations up to the assistant's turn.
    harmful_targets, benign_targets: replies whose loss is measured; opening_targets: benign ones that open as the
    harmful ones do. refusals: the published list of openings. probes: metric -> what else is asked. system: a system
    prompt in front of all that is asked; the targets stay as they are encoded.
    """

    refusals: Sequence[str]
    harmful: Sequence[str | list[Message]] = ()
    benign: Sequence[str | list[Message]] = ()
    questions: Sequence[tuple[str | list[Message], str]] = ()
    harmful_targets: Sequence[Example] = ()
    benign_targets: Sequence[Example] = ()
    opening_targets: Sequence[Example] = ()
    reply_tokens: PositiveInt = 16
    answer_tokens: PositiveInt = 8
    batch_size: PositiveInt = 64
    probes: Mapping[str, Probe] = dataclasses.field(default_factory=dict)
    system: str | None = None

    @property
    def size(self) -> int:
        """How many replies there are to generate."""
        probed = sum(len(probe.prompts) for probe in self.probes.values())
        return len(self.harmful) + len(self.benign) + len(self.questions) + probed


def outcomes(
    model: Model,
    suite: Suite,
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    on_reply: Callable[[int], None] = lambda done: None,
) -> Outcomes:
    """What each prompt came to: refusal, compliance, unclear, over_refusal, exact_match (0 or 1), probes, losses.

    Each harmful prompt's reply is one of refusal, compliance and unclear. unfinished, 0 or 1 a reply, is there only
    where a reply of some prompt stops within its thought: it has no answer, and needs more tokens.
    """
    backbone, adapters = merge_adapters(model.backbone, as_adapters(vectors))
    model = model.with_backbone(backbone)
    done = 0

    stopped: list[float] = []

    def replies_to(prompts: Sequence[str | list[Message]], tokens: int) -> list[str]:
        nonlocal done
        before = done
        replies = ask(
            model,
            prompts if suite.system is None else [with_system(prompt, suite.system) for prompt in prompts],
            adapters,
            max_new_tokens=tokens,
            batch_size=suite.batch_size,
            progress=lambda count: on_reply(before + count),
        )
        done += len(prompts)
        stopped.extend(float(in_thought(reply)) for reply in replies)
        return replies

    found: Outcomes = {}
    replies = replies_to([*suite.harmful, *suite.benign], suite.reply_tokens)
    if suite.harmful:
        found |= judged([text_of(prompt) for prompt in suite.harmful], replies, suite.refusals)
    if suite.benign:
        found["over_refusal"] = [float(refuses(r, suite.refusals)) for r in replies[len(suite.harmful) :]]
    if suite.questions:
        replies = replies_to([question for question, _ in suite.questions], suite.answer_tokens)
        found["exact_match"] = [float(exact_match(r, a)) for r, (_, a) in zip(replies, suite.questions)]
    probes = {name: probe for name, probe in suite.probes.items() if probe.prompts}
    for tokens in dict.fromkeys(probe.tokens for probe in probes.values()):  # in one call: programs are dear
        alike = {name: probe for name, probe in probes.items() if probe.tokens == tokens}
        told = iter(replies_to([prompt for probe in alike.values() for prompt in probe.prompts], tokens))
        for name, probe in alike.items():
            found[name] = [float(probe.score(index, next(told))) for index in range(len(probe.prompts))]
    if any(stopped):
        found["unfinished"] = stopped
    for name in ("harmful", "benign", "opening"):
        targets = getattr(suite, f"{name}_targets")
        if targets:
            found[f"{name}_loss"] = mean_losses(model, targets, adapters)
    return found


def judged(prompts: Sequence[str], replies: Sequence[str], refusals: Sequence[str]) -> Outcomes:
    """Refusal, compliance and unclear, of which each reply to a harmful prompt is one; replies beyond are left out."""
    verdicts = [verdict(prompt, reply, refusals) for prompt, reply in zip(prompts, replies)]
    return {name: [float(came == name) for came in verdicts] for name in ("refusal", "compliance", "unclear")}


def scores(found: Outcomes) -> dict[str, Score]:
    """The mean of each metric with its 95% bootstrap interval, and the version of the rules where rules read it."""
    versions = {metric: RULES if metric in RULED else None for metric in found}
    return {m: dataclasses.replace(bootstrap(values), rules=versions[m]) for m, values in found.items()}
