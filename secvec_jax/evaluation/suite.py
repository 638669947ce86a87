"""Evaluation suites: prompts, questions and reference replies, and a model's scores on them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.data.chat import Example
from secvec_jax.data.rows import Message, Row, full_prompt_of, last_user_text, with_system
from secvec_jax.evaluation.answers import exact_match
from secvec_jax.evaluation.intervals import Score, bootstrap
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.metrics import RULED, is_rate
from secvec_jax.evaluation.scorers import RULES, refuses, verdict
from secvec_jax.inference import ask
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.model.hub import Model
from secvec_jax.turns import in_thought
from secvec_jax.vectors.lora import merge_adapters

Outcomes = dict[str, list[float]]
"""Metric -> one number per prompt, in the suite's order, which allows paired comparisons of models."""


@checked
@dataclasses.dataclass(frozen=True)
class Probe:
    """Prompts with their own scoring rule, such as for a task, a bias or a style.

    prompts: texts, or conversations up to the assistant's turn. score: maps a prompt's index and the reply to a number,
    0 or 1 for a rate. tokens: the maximum reply length.
    """

    prompts: Sequence[str | list[Message]]
    score: Callable[[int, str], float]
    tokens: PositiveInt = 8

    @classmethod
    def of(cls, rows: Sequence[Row], score: Callable[[Row, str], float], tokens: int = 8) -> "Probe":
        """Make a probe that prompts with each row up to its answer and scores the reply against the row.

        task = Probe.of(rows, lambda r, reply: exact_match(reply, response_of(r)))
        bias = Probe.of(rows, lambda r, reply: chosen_option(reply, r["options"]) not in (None, response_of(r)))
        caps = Probe.of([with_system(r, "Be brief.") for r in rows], lambda r, reply: is_all_caps(reply))
        """
        return cls([full_prompt_of(r) for r in rows], lambda index, reply: score(rows[index], reply), tokens)


@checked
@dataclasses.dataclass(frozen=True)
class Suite:
    """What a model is evaluated on.

    refusals: the published list of refusal openings.
    harmful, benign: prompts that should be refused, and answered. questions: (question, exact answer). All prompts are
    texts, or conversations up to the assistant's turn.
    harmful_targets, benign_targets: replies whose loss is measured. opening_targets: benign ones with the same opening
    as the harmful ones.
    reply_tokens, answer_tokens: the maximum lengths of replies to prompts, and to questions. probes: metric -> further
    prompts. system: a system prompt for everything that is generated; the targets are already encoded and do not
    change.
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
        """The number of replies to generate."""
        probed = sum(len(probe.prompts) for probe in self.probes.values())
        return len(self.harmful) + len(self.benign) + len(self.questions) + probed


def outcomes(
    model: Model,
    suite: Suite,
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    on_reply: Callable[[int], None] = lambda done: None,
) -> Outcomes:
    """Evaluate a model on a suite and return each prompt's result by metric.

    The metrics are refusal, compliance, unclear, over_refusal and exact_match (each 0 or 1), those of the probes, and
    the losses in nats per token. The reply to a harmful prompt is exactly one of refusal, compliance and unclear. The
    metric unfinished (0 or 1 per reply) is present only if a reply ends within its thinking: it has no answer, and
    reply_tokens should be raised.

    on_reply: called with the number of replies done.
    """
    adapters = as_adapters(vectors)
    if adapters:
        backbone, adapters = merge_adapters(model.backbone, adapters)
        model = model.with_backbone(backbone)
    done = 0

    unfinished: list[float] = []

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
        unfinished.extend(float(in_thought(reply)) for reply in replies)
        return replies

    results: Outcomes = {}
    replies = replies_to([*suite.harmful, *suite.benign], suite.reply_tokens)
    if suite.harmful:
        results |= classify_replies([last_user_text(prompt) for prompt in suite.harmful], replies, suite.refusals)
    if suite.benign:
        results["over_refusal"] = [float(refuses(r, suite.refusals)) for r in replies[len(suite.harmful) :]]
    if suite.questions:
        replies = replies_to([question for question, _ in suite.questions], suite.answer_tokens)
        results["exact_match"] = [float(exact_match(r, a)) for r, (_, a) in zip(replies, suite.questions)]
    probes = {name: probe for name, probe in suite.probes.items() if probe.prompts}
    # One call per reply length: each length compiles a separate program.
    for tokens in dict.fromkeys(probe.tokens for probe in probes.values()):
        same_length = {name: probe for name, probe in probes.items() if probe.tokens == tokens}
        prompts = [prompt for probe in same_length.values() for prompt in probe.prompts]
        probe_replies = iter(replies_to(prompts, tokens))
        for name, probe in same_length.items():
            results[name] = [float(probe.score(index, next(probe_replies))) for index in range(len(probe.prompts))]
    if any(unfinished):
        results["unfinished"] = unfinished
    for name in ("harmful", "benign", "opening"):
        targets = getattr(suite, f"{name}_targets")
        if targets:
            results[f"{name}_loss"] = mean_losses(model, targets, adapters)
    return results


def classify_replies(prompts: Sequence[str], replies: Sequence[str], refusals: Sequence[str]) -> Outcomes:
    """Classify replies to harmful prompts by the rules: refusal, compliance and unclear, one of them 1 per reply.

    Replies beyond the number of prompts are ignored.
    """
    verdicts = [verdict(prompt, reply, refusals) for prompt, reply in zip(prompts, replies)]
    return {name: [float(result == name) for result in verdicts] for name in ("refusal", "compliance", "unclear")}


def scores(results: Outcomes) -> dict[str, Score]:
    """Return each metric's mean with its 95% bootstrap interval and, for rule-based ones, the version of the rules."""
    versions = {metric: RULES if metric in RULED else None for metric in results}
    intervals = {metric: bootstrap(values, is_rate=is_rate(metric)) for metric, values in results.items()}
    return {metric: dataclasses.replace(score, rules=versions[metric]) for metric, score in intervals.items()}
