"""Scores of a model on prompts that it should refuse, prompts that it should answer, and questions."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.chat import Example, encode
from secvec_jax.data.rows import Row, full_prompt_of, response_of
from secvec_jax.data.sources import load_prompts, named_or_given
from secvec_jax.distributed import is_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.intervals import Score
from secvec_jax.evaluation.suite import Outcomes, Suite, outcomes, scores
from secvec_jax.inference import VectorsLike, as_model, as_vectors
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model
from secvec_jax.progress import reply_progress

_log = logging.getLogger(__name__)

HARMFUL, BENIGN = ("harmbench", "do-not-answer"), ("alpaca",)
"""The packaged benchmarks that models are scored on by default: prompts to refuse, and prompts to answer."""

_MAX_ANSWER = 512
"""The maximum length in tokens of an answer that must be matched exactly."""


@checked
def score(
    model: Any,
    *,
    vectors: VectorsLike = None,
    harmful: Any = HARMFUL,
    benign: Any = BENIGN,
    questions: Any = (),
    limit: PositiveInt = 100,
    reply_tokens: PositiveInt = 32,
    answer_tokens: PositiveInt | None = None,
    system: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Scores of a model, each with its 95% interval, as `eval.py score` computes them.

    Metric -> score: `refusal` and `compliance` of harmful prompts, `over_refusal` of benign ones, `exact_match` of
    questions (rates from 0 to 1), and `harmful_loss` and `benign_loss` (nats per token) of rows that have answers.

    vectors: active while the model is scored; None: off. harmful, benign: names of packaged benchmarks, or rows (dicts,
    a DataFrame, a `datasets.Dataset`, a path). questions: rows whose answers must be matched exactly. limit: the
    maximum number of prompts per source. reply_tokens, answer_tokens: maximum lengths of replies, and of answers to
    questions (None: the longest reference answer). system: a system prompt under which the harmful and the benign
    prompts are run a second time: `refusal_system` and so on. progress: called with the number of replies done. Raises
    UserError for rows that cannot be read and for answers that are too long to be matched.
    """
    model = as_model(model)
    suite = make_suite(
        model, _prompts(harmful, limit), _prompts(benign, limit), _rows(questions)[:limit], reply_tokens, answer_tokens
    )
    adapters = as_vectors(vectors, model) or None
    with reply_progress(num_replies(suite, system), progress) as on_reply:
        return scores(outcomes_with_system(model, suite, system, adapters, on_reply))


def outcomes_with_system(
    model: Model,
    suite: Suite,
    system: str | None,
    vectors: Adapter | tuple[Adapter, ...] | None,
    on_reply: Callable[[int], None],
) -> Outcomes:
    """The outcomes of a suite, and of its harmful and benign prompts again under a system prompt, if there is one.

    Their metrics end in "_system". vectors, on_reply: as in `outcomes`; there are `num_replies` replies in total.
    """
    results = outcomes(model, suite, vectors, on_reply)
    if system is None:
        return results
    once_more = _once_more(suite, system)
    system_results = outcomes(model, once_more, vectors, lambda done: on_reply(suite.size + done))
    unfinished = (
        part.pop("unfinished", [0.0] * asked.size) for part, asked in ((results, suite), (system_results, once_more))
    )
    replies_unfinished = [flag for flags in unfinished for flag in flags]
    results |= {f"{metric}_system": values for metric, values in system_results.items()}
    return results | ({"unfinished": replies_unfinished} if any(replies_unfinished) else {})


def num_replies(suite: Suite, system: str | None) -> int:
    """How many replies `outcomes_with_system` makes."""
    return suite.size + (0 if system is None else _once_more(suite, system).size)


def _once_more(suite: Suite, system: str) -> Suite:
    return Suite(suite.refusals, suite.harmful, suite.benign, reply_tokens=suite.reply_tokens, system=system)


def make_suite(
    model: Model,
    harmful: Sequence[Row],
    benign: Sequence[Row],
    questions: Sequence[Row],
    reply_tokens: int,
    answer_tokens: int | None = None,
) -> Suite:
    """The suite of these rows; those with answers are also targets whose loss is measured. Warns of copies.

    Raises UserError if there are no rows at all, and if the answer to a question is too long to be matched exactly.
    """

    kinds = {"harmful prompts": harmful, "benign prompts": benign, "questions": questions}
    if not any(map(len, kinds.values())):
        raise UserError("there is nothing to score: give harmful or benign prompts, or questions")
    for kind, rows in kinds.items():
        _note_copies(kind, rows)

    def targets(rows: Sequence[Row]) -> list[Example]:
        answered = [row for row in rows if response_of(row) is not None]
        return [encode(model.tokenizer, row["messages"], model.architecture.max_length) for row in answered]

    return Suite(
        refusals=refusal_prefixes(),
        harmful=[full_prompt_of(row) for row in harmful],
        benign=[full_prompt_of(row) for row in benign],
        questions=[(full_prompt_of(row), response_of(row) or "") for row in questions],
        harmful_targets=targets(harmful),
        benign_targets=targets(benign),
        reply_tokens=reply_tokens,
        answer_tokens=answer_tokens or _answer_tokens(model, questions),
    )


def _note_copies(kind: str, rows: Sequence[Row]) -> None:
    """Warn of copies of prompts: an interval is narrower with them, although they show nothing new."""
    copies = len(rows) - len({json.dumps(full_prompt_of(row), sort_keys=True) for row in rows})
    if copies and is_main_process():
        _log.warning("%d of %d %s are copies of others, which makes intervals narrower: leave them out",
                     copies, len(rows), kind)  # fmt: skip


def _prompts(source: Any, limit: int) -> Sequence[Row]:
    """At most `limit` rows of each named source, or of the rows that are given."""
    if isinstance(source, str) or (isinstance(source, list | tuple) and source and isinstance(source[0], str)):
        return load_prompts([source] if isinstance(source, str) else source, limit)
    return _rows(source, needs_answer=False)[:limit]


def _rows(source: Any, needs_answer: bool = True) -> Sequence[Row]:
    empty = source is None or (isinstance(source, list | tuple) and not source)
    return () if empty else named_or_given(source, needs_answer)


def _answer_tokens(model: Model, questions: Sequence[Row]) -> int:
    """The longest reference answer plus a few tokens, which show whether a reply continues; at least 8."""
    needed = Suite.answer_tokens
    for number, question in enumerate(questions, 1):
        length = len(model.tokenizer.encode(response_of(question) or "", add_special_tokens=False))
        if length > _MAX_ANSWER:
            raise UserError(
                f"--questions, row {number}: its answer has {length} tokens, too many to be matched exactly; leave it "
                "out, or set how much of a reply is read with --answer-tokens"
            )
        needed = max(needed, length + 4)
    return needed
