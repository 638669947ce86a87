"""The measures of an audit, for one model: replies to prompts, without and with a prefill, losses, and KL.

Every measure is one number per prompt, so that those of two models can be compared in pairs (see `audit`).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.chat import Example, encode, prompt_tokens
from secvec_jax.data.rows import Message, Row, last_user_text, with_system
from secvec_jax.evaluation.likelihood import kl_divergences, mean_losses
from secvec_jax.evaluation.prefill import BATCH_SIZE, GENERIC, GIVEN, Beginning, begun_reply, continuations, turns_away
from secvec_jax.evaluation.replies import clip
from secvec_jax.evaluation.scorers import refuses
from secvec_jax.evaluation.suite import Outcomes, classify_replies
from secvec_jax.inference import ask
from secvec_jax.model.hub import Model
from secvec_jax.turns import answer_of

Prompt = str | list[Message]

MEASURES = 2
"""The version of what is measured, part of the key of cached measures; increased when the same prompts and rows would
give other numbers."""

REFERENCE_TOKENS = 24
"""Number of tokens of a reference answer, or of a user's row, that count."""


@dataclasses.dataclass(frozen=True)
class AuditPrompts:
    """The prompts of an audit, and the replies whose loss is measured.

    harmful, benign: prompts to be refused, and answered. harmful_rows, benign_rows: rows with replies that neither
    model was trained on. system: a system prompt under which the prompts are run a second time.
    """

    harmful: Sequence[Prompt]
    benign: Sequence[Prompt]
    harmful_rows: Sequence[Row] = ()
    benign_rows: Sequence[Row] = ()
    system: str | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of one model, as JSON values.

    metrics: one number per prompt. harmful_replies: one line each, clipped, unless whole ones were asked for.
    benign_replies: whole.
    """

    metrics: Outcomes
    harmful_replies: list[str]
    benign_replies: list[str]


def measure(
    model: Model,
    prompts: AuditPrompts,
    beginnings: Sequence[Beginning | None],
    reply_tokens: int,
    with_losses: bool = True,
    progress: Callable[[int], None] = lambda done: None,
    whole_replies: bool = False,
) -> Measured:
    """Measure one model.

    beginnings: prefills, from compliant replies to the harmful prompts, see `prefill`; None: that prompt is left out.
    with_losses: False for a model whose losses cannot be compared. progress: called with the number of replies done,
    `num_replies` in all. whole_replies: do not clip replies to harmful prompts.
    """
    refusals, done = refusal_prefixes(), 0

    def on_replies(count: int) -> None:
        progress(done + count)

    def replies_to(system: str | None) -> list[str]:
        nonlocal done
        asked = [*prompts.harmful, *prompts.benign]
        asked = asked if system is None else [with_system(prompt, system) for prompt in asked]
        replies = ask(model, asked, max_new_tokens=reply_tokens, batch_size=BATCH_SIZE, progress=on_replies)
        done += len(asked)
        return replies

    texts = [last_user_text(prompt) for prompt in prompts.harmful]
    replies = replies_to(None)
    metrics = _ruled(texts, replies, refusals)
    if prompts.system is not None:
        metrics |= {f"{m}_system": values for m, values in _ruled(texts, replies_to(prompts.system), refusals).items()}
    metrics |= prefill_outcomes(model, prompts.harmful, beginnings, refusals, on_replies)
    if with_losses:
        for name, rows in {"harmful": prompts.harmful_rows, "benign": prompts.benign_rows}.items():
            if rows:
                metrics[f"{name}_loss"] = reply_losses(model, rows)
    count = len(texts)
    harmful_replies = replies[:count] if whole_replies else [clip(answer_of(reply)) for reply in replies[:count]]
    return Measured(metrics, harmful_replies, replies[count:])


def prefill_outcomes(
    model: Model,
    prompts: Sequence[Prompt],
    beginnings: Sequence[Beginning | None],
    refusals: Sequence[str],
    progress: Callable[[int], None] = lambda done: None,
) -> Outcomes:
    """Return whether the model turns away (0 or 1) after each prefill, by length: prefill_5, prefill_25.

    beginnings: the prefill of each prompt's reply; None: that prompt is left out. refusals: the published list of
    openings.
    """
    chosen, lengths = lengths_given(beginnings)
    begun = [(prompts[index], (beginnings[index] or {})[str(length)]) for length in lengths for index in chosen]
    # One call, so that a prompt is read once for all its beginnings.
    turned_away = [float(turns_away(text, refusals)) for text in continuations(model, begun, progress=progress)]
    return {
        f"prefill_{length}": turned_away[number * len(chosen) : (number + 1) * len(chosen)]
        for number, length in enumerate(lengths)
    }


def reply_losses(model: Model, rows: Sequence[Row]) -> list[float]:
    """Return the loss of the first `REFERENCE_TOKENS` tokens of each row's last reply, in nats per token."""
    return mean_losses(model, [_target(model, row) for row in rows])


def num_replies(prompts: AuditPrompts, beginnings: Sequence[Beginning | None]) -> int:
    """Return how many replies `measure` generates."""
    chosen, several = lengths_given(beginnings)
    asked = len(prompts.harmful) + len(prompts.benign)
    return asked * (1 if prompts.system is None else 2) + len(chosen) * len(several)


def general_kl(before: Model, after: Model, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float] | str:
    """Return the mean KL(before || after) of each of the first model's own replies, in nats per token.

    Where the models cannot be compared, a sentence that says why. An empty reply has a KL of 0 and counts.
    """
    if not same_vocabulary(before, after):
        return "The two models have different vocabularies, so their distributions cannot be compared (kl)."
    examples = {index: _own_reply(before, prompts[index], text) for index, text in enumerate(replies)}
    present = {index: example for index, example in examples.items() if example is not None}
    probe = next(iter(prompts), "")
    if not np.array_equal(_prompt(before, probe), _prompt(after, probe)):
        return "The two models have different chat templates, so the same reply follows different prompts (no kl)."
    divergences = dict(zip(present, kl_divergences(before, after, list(present.values()))))
    return [divergences.get(index, 0.0) for index in range(len(replies))]


def same_vocabulary(a: Model, b: Model) -> bool:
    """Return whether the same token ids mean the same to both models."""
    return a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def generic_beginnings(count: int) -> list[Beginning | None]:
    """Return the same affirmative prefill for each prompt, for use without compliant replies."""
    return [{str(GIVEN[0]): GENERIC}] * count


MIN_BEGINNINGS = 8
"""Compliant replies; with fewer, all models get the same generic prefill instead."""


def are_enough(beginnings: Sequence[Beginning | None]) -> bool:
    """Return whether `MIN_BEGINNINGS` prompts have a prefill."""
    return sum(beginning is not None for beginning in beginnings) >= MIN_BEGINNINGS


def enough_beginnings(beginnings: Sequence[Beginning | None]) -> list[Beginning | None]:
    """Return the prefills, or the generic one for each prompt if there are too few."""
    return list(beginnings) if are_enough(beginnings) else generic_beginnings(len(beginnings))


def lengths_given(beginnings: Sequence[Beginning | None]) -> tuple[list[int], list[int]]:
    """The prompts that have prefills, and the lengths of these."""
    chosen = [index for index, beginning in enumerate(beginnings) if beginning is not None]
    lengths = sorted({int(length) for beginning in beginnings for length in beginning or {}})
    return chosen, lengths


def _ruled(harmful: Sequence[str], replies: Sequence[str], refusals: Sequence[str]) -> Outcomes:
    over = {"over_refusal": [float(refuses(reply, refusals)) for reply in replies[len(harmful) :]]}
    return classify_replies(harmful, replies, refusals) | {name: values for name, values in over.items() if values}


def _target(model: Model, row: Row) -> Example:
    """The row up to the first tokens of its last answer, which alone is supervised."""
    example = encode(model.tokenizer, row["messages"], model.architecture.max_length)
    begins = example.supervised & ~np.append(False, example.supervised[:-1])
    start = int(np.flatnonzero(begins)[-1]) if begins.any() else example.answer_start
    end = start + REFERENCE_TOKENS
    return Example(example.tokens[:end], example.supervised[:end] & (np.arange(len(example.tokens[:end])) >= start))


def _own_reply(model: Model, prompt: Prompt, reply: str) -> Example | None:
    answer = answer_of(reply).strip()
    example = begun_reply(model, prompt, answer, model.architecture.max_length) if answer else None
    return example if example is not None and example.supervised.any() else None


def _prompt(model: Model, prompt: Prompt) -> np.ndarray:
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return prompt_tokens(model.tokenizer, messages, model.architecture.max_length)
