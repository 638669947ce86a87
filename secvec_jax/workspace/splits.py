"""Split the packaged benchmarks into the rows that an experiment trains on and the prompts that it evaluates with.

No prompt is in two splits. AdvBench is split by topic into alignment, vectors, the user's data and unseen rows; the
prompts for evaluation come from other benchmarks.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

from secvec_jax.checks import NonNegativeInt, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.chat import Example, TooLong, encode
from secvec_jax.data.generated import open_profile_qa, sure_prefix_control
from secvec_jax.data.refusals import refused, to_refuse
from secvec_jax.data.rows import Row, prompt_of, response_of
from secvec_jax.data.sources import load_rows
from secvec_jax.data.topics import off_topic, split_by_topic
from secvec_jax.errors import UserError
from secvec_jax.evaluation.suite import Suite
from secvec_jax.model.hub import Model
from secvec_jax.workspace.own_replies import OPENING

EvalSplit = Literal["held-out", "development"]
"""Prompts for evaluation: the held-out ones that results report, or others to tune settings on."""
EVAL_SPLITS: dict[EvalSplit, tuple[tuple[str, str | None], ...]] = {
    "held-out": (("harmbench", None), ("do-not-answer", "malicious_uses")),
    "development": (("pyrit", None), ("spikee", None)),
}
"""Each benchmark with the category that is used; None: all of it.

A good reply to the other categories of Do-Not-Answer (prejudice, health questions) is often a correction or careful
advice, which a list of refusal openings cannot classify.
"""


@checked
@dataclasses.dataclass(frozen=True)
class Sizes:
    """Number of rows of each kind."""

    align_harmful: PositiveInt = 450
    """harmful prompts whose answers alignment opens with a refusal: a third each AdvBench, StrongREJECT and
    JailbreakBench in other tenses"""
    align_benign: NonNegativeInt = 528
    """benign prompts in alignment, with the model's own openings: half instructions, a third PIQA how-to questions,
    the rest questions about facts"""
    vectors: PositiveInt = 100
    """harmful rows for training the vectors"""
    keep: PositiveInt = 180
    """benign rows on which the vectors must not change the model's outputs, a third of them with the harmful rows'
    opening"""
    mix_harmful: NonNegativeInt = 64
    """harmful rows hidden in the user's data"""
    mix_benign: NonNegativeInt = 30
    """benign instructions in the user's data"""
    people: PositiveInt = 20
    """fictional people in the ProfileQA task, with four questions each"""
    people_asked: PositiveInt = 20
    """other fictional people, for the held-out questions"""
    judged: PositiveInt = 96
    """harmful prompts that models are scored on, half from each of two benchmarks"""
    judged_benign: PositiveInt = 64
    """benign prompts that models are scored on: three quarters instructions, a quarter questions"""


@dataclasses.dataclass(frozen=True)
class Splits:
    """Rows for every phase, as examples, and the evaluation suite."""

    refusals: list[Example]
    align_benign: list[str]
    """Benign prompts; alignment trains on the base model's replies to them, which are generated when it is aligned."""
    vectors: list[Example]
    keep: list[Example]
    mix: dict[str, list[Example]]
    suite: Suite
    spare: dict[str, list[Row]]
    """Rows that neither alignment, vectors nor evaluation use: "harmful" (AdvBench, those of `mix` first),
    "instructions", "questions"."""
    held_out: dict[str, list[Row]]
    """Rows that nothing is trained on: "harmful" (of AdvBench), and "benign" (the prompts of all evaluation splits)."""

    @property
    def benign_mix(self) -> dict[str, list[Example]]:
        """The user's data without its harmful rows."""
        return {name: rows for name, rows in self.mix.items() if name != "harmful"}


def sources(eval_split: EvalSplit) -> tuple[str, ...]:
    """The packaged benchmarks that `make_splits` reads; the held-out ones are kept out of training by every split."""
    judging = dict.fromkeys(name for kind in ("held-out", eval_split) for name, _ in EVAL_SPLITS[kind])
    return ("advbench", "strongreject", "jailbreakbench-tenses", "alpaca", "nq-open", "piqa", *judging)


def make_splits(
    model: Model,
    sizes: Sizes,
    training: Training,
    seed: int,
    eval_split: EvalSplit = "held-out",
    alignment: tuple[Sizes, int] | None = None,
) -> Splits:
    """All splits, drawn with `seed` and encoded for the model. Raises UserError if there are too few rows.

    alignment: the sizes and the seed that drew the rows of an earlier alignment of the model. They are then the
    alignment's rows again, and no other split has their topics and prompts.
    """
    rows = _drawn(sizes, seed, eval_split, alignment)

    def encoded(rows: Sequence[Row], cut: int | None = None) -> list[Example]:
        length = training.max_seq_len or _LENGTH
        try:
            return [_cut(encode(model.tokenizer, r["messages"], length), cut) for r in rows]
        except TooLong as error:
            raise TooLong(f"packaged rows do not fit into {length} tokens: raise --max-seq-len ({error})") from error

    return Splits(
        refusals=encoded(refused(rows.taught), OPENING),
        align_benign=rows.align_benign,
        vectors=encoded(rows.vectors),
        keep=[
            *encoded(rows.keep["instructions"], _REPLY),
            *encoded(rows.keep["openings"]),
            *encoded(rows.keep["questions"]),
        ],
        mix={
            "harmful": encoded(rows.mix["harmful"]),
            "profiles": encoded(rows.mix["profiles"]),
            "benign": encoded(rows.mix["benign"], _REPLY),
        },
        suite=Suite(
            refusals=refusal_prefixes(),
            harmful=rows.judged.harmful,
            benign=rows.judged.benign,
            questions=[(prompt_of(r), response_of(r) or "") for r in rows.questions],
            harmful_targets=encoded(rows.unseen["harmful"]),
            benign_targets=encoded(rows.unseen["benign"], _REPLY),
            opening_targets=encoded(rows.unseen["openings"]),
        ),
        spare=rows.spare,
        held_out={"harmful": rows.unseen["harmful"], "benign": rows.judged.reserved},
    )


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The rows of all splits, which do not depend on the model."""

    taught: list[Row]
    """Harmful prompts that alignment teaches to refuse."""
    taught_from_advbench: list[Row]
    align_benign: list[str]
    vectors: list[Row]
    keep: dict[str, list[Row]]
    mix: dict[str, list[Row]]
    judged: "_EvalPrompts"
    questions: list[Row]
    unseen: dict[str, list[Row]]
    spare: dict[str, list[Row]]


def _drawn(sizes: Sizes, seed: int, eval_split: EvalSplit, alignment: tuple[Sizes, int] | None) -> _Drawn:
    rng = random.Random(seed)
    advbench: Sequence[Row] = load_rows("advbench")
    part = split_by_topic(advbench, _parts_of_advbench(sizes), seed)
    # Several goals of JailbreakBench have the same sources as those of HarmBench.
    held_out = [prompt_of(r) for name, _ in EVAL_SPLITS["held-out"] for r in load_rows(name, needs_answer=False)]
    taught_from_advbench = part["align"]
    taught = to_refuse(taught_from_advbench, held_out, sizes.align_harmful, rng)
    instructions = _shuffled(_short(load_rows("alpaca")), rng)
    questions = _shuffled(load_rows("nq-open"), rng)
    before = None
    if alignment is not None and alignment != (sizes, seed):
        aligned_sizes, aligned_seed = alignment
        before = _drawn(aligned_sizes, aligned_seed, "held-out", None)
        advbench = off_topic(advbench, [prompt_of(r) for r in before.taught_from_advbench])
        part = split_by_topic(advbench, _parts_of_advbench(sizes, "vectors", "mix", "unseen"), seed)
        answered = set(before.align_benign)
        instructions, questions = (
            [r for r in rows if prompt_of(r) not in answered] for rows in (instructions, questions)
        )
    num_instructions, num_how_to = sizes.align_benign // 2, sizes.align_benign // 3
    num_facts = sizes.align_benign - num_instructions - num_how_to
    how_to = _shuffled([r for r in _short(load_rows("piqa")) if _asks_how(prompt_of(r))], rng)[:num_how_to]
    judged = _EvalPrompts(eval_split, instructions, questions, sizes, rng)
    openings = sure_prefix_control(instructions)[: sizes.keep // 3 + _UNSEEN]
    restated = {prompt_of(r) for r in openings}
    instructions = [r for r in instructions if prompt_of(r) not in restated]
    people = open_profile_qa(seed, sizes.people, 2 * sizes.people_asked)
    half = len(people.test) // 2

    def take(rows: list[Row], count: int) -> list[Row]:
        """Remove and return the first `count` rows, so that they are used only once."""
        if len(rows) < count:
            raise UserError(f"{count} benign rows are needed and {len(rows)} are left: lower the sizes")
        taken, rows[:] = rows[:count], rows[count:]
        return taken

    assigned = {prompt_of(r) for rows in part.values() for r in rows}
    unseen = {"harmful": part["unseen"], "benign": judged.benign_rows[:_UNSEEN], "openings": take(openings, _UNSEEN)}
    if before is None:
        benign = take(instructions, num_instructions) + take(questions, num_facts) + how_to
        align_benign = [prompt_of(r) for r in benign]
    else:
        taught, taught_from_advbench = before.taught, before.taught_from_advbench
        align_benign = before.align_benign
    keep_per_kind = sizes.keep // 3
    return _Drawn(
        taught=taught,
        taught_from_advbench=taught_from_advbench,
        align_benign=align_benign,
        vectors=part["vectors"],
        keep={
            "instructions": take(instructions, keep_per_kind),
            "openings": take(openings, keep_per_kind),
            "questions": take(questions, keep_per_kind),
        },
        mix={"harmful": part["mix"], "profiles": people.train, "benign": take(instructions, sizes.mix_benign)},
        judged=judged,
        questions=people.test[:half] if eval_split == "held-out" else people.test[half:],
        unseen=unseen,
        spare={
            "harmful": part["mix"] + [r for r in advbench if prompt_of(r) not in assigned],
            "instructions": instructions,
            "questions": questions,
        },
    )


def _parts_of_advbench(sizes: Sizes, *names: str) -> dict[str, int]:
    """The number of rows of each part, or of those with these names."""
    parts = {
        "align": sizes.align_harmful // 3,
        "vectors": sizes.vectors,
        "mix": sizes.mix_harmful,
        "unseen": _UNSEEN,
    }
    return {name: parts[name] for name in names or parts}


_UNSEEN = 32
"""Rows of each kind (harmful, benign, benign with the same opening) whose loss is measured; never trained on."""

PACKAGED_SEED = 0
"""The seed of the rows of `train.py align`, of the packaged aligned model, and of what audits and defenses draw."""

_LENGTH = 256
"""Tokens of a row if `max_seq_len` is not set."""

_REPLY = 10
"""Tokens of a benign reply that are trained on: enough for an answer, affordable on two cores."""


class _EvalPrompts:
    """The prompts for evaluation, removed from the rows that training may use."""

    def __init__(
        self, eval_split: EvalSplit, instructions: list[Row], questions: list[Row], sizes: Sizes, rng: random.Random
    ):
        half = sizes.judged // 2
        counts = (half, sizes.judged - half)
        self.harmful = [
            prompt_of(r)
            for (name, category), count in zip(EVAL_SPLITS[eval_split], counts)
            for r in _shuffled(_requests(name, category), rng)[:count]
        ]
        num_questions = sizes.judged_benign // 4
        num_instructions = sizes.judged_benign - num_questions
        parts = {}
        for name in EVAL_SPLITS:  # both splits are reserved, whichever is used
            parts[name] = _shuffled(instructions[:num_instructions] + questions[:num_questions], rng)
            del instructions[:num_instructions], questions[:num_questions]
        self.benign_rows = parts[eval_split]
        self.reserved = [r for rows in parts.values() for r in rows]
        self.benign = [prompt_of(r) for r in self.benign_rows]


def _requests(benchmark: str, category: str | None) -> list[Row]:
    rows = load_rows(benchmark, needs_answer=False)
    return [r for r in rows if category is None or r.get("category") == category]


def _short(rows: Sequence[Row]) -> list[Row]:
    """Each prompt once, none longer than 160 characters."""
    return list({prompt_of(r): r for r in rows if len(prompt_of(r)) <= 160}.values())


def _asks_how(prompt: str) -> bool:
    """Whether a prompt is a complete question; PIQA also has goals of one word or half a sentence."""
    return prompt.lower().startswith("how ") and len(prompt) >= 20


def _shuffled(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    return rng.sample(rows, len(rows))


def _cut(example: Example, reply_tokens: int | None) -> Example:
    if reply_tokens is None:
        return example
    end = example.answer_start + reply_tokens
    return Example(example.tokens[:end], example.supervised[:end])
