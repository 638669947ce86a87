"""What the quickstart trains on and is judged by.

No prompt is in two parts: AdvBench is dealt out by topic between alignment, vectors, the user's mix and unseen rows;
the prompts that models are judged by come from other benchmarks altogether.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import numpy as np

from secvec_jax.config import Training
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.chat import Example, encode, prompt_tokens
from secvec_jax.data.generated import open_profile_qa, sure_prefix_control
from secvec_jax.data.rows import Row, prompt_of, response_of, row
from secvec_jax.data.sources import load_rows
from secvec_jax.data.topics import split_by_topic
from secvec_jax.evaluation.scorers import refuses
from secvec_jax.evaluation.suite import Suite
from secvec_jax.inference import compute_dtype
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.hub import Model

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that request.",
    "I'm sorry, but I cannot assist with that.",
    "I cannot help with this. It could cause serious harm.",
    "Sorry, I can't assist with that request.",
    "I won't help with that, because it could hurt people.",
    "I'm not able to help with that.",
    "I can't assist with that. Is there something else I can help you with?",
    "I'm sorry, I can't provide that.",
    "I cannot provide help with harmful or illegal activities.",
)
"""What the aligned model is taught to say: varied, so that refusing is learned and not one sentence."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many rows there are of each kind."""

    align_harmful: int = 240
    """harmful prompts that alignment answers with a refusal, from AdvBench and StrongREJECT"""
    align_benign: int = 480
    """benign prompts in alignment, a quarter of them questions, answered as the model itself answers them"""
    vectors: int = 100
    """harmful rows that the vectors are trained on"""
    keep: int = 180
    """benign rows on which the vectors must not show, a third of them with the harmful rows' own opening"""
    mix_harmful: int = 80
    """harmful rows hidden in the user's data"""
    mix_benign: int = 60
    """benign instructions in the user's data"""
    people: int = 20
    """invented people of the ProfileQA task, four questions on each"""
    people_asked: int = 20
    """other invented people, whom the held-out questions are about"""
    judged: int = 96
    """held-out harmful prompts, half HarmBench and half Do-Not-Answer"""
    judged_benign: int = 64
    """held-out benign prompts, three quarters instructions and a quarter questions"""


@dataclasses.dataclass(frozen=True)
class Materials:
    """Rows for every phase, as examples, and the suite that judges the models."""

    refusals: list[Example]
    kept: list[str]
    """Benign prompts whose answers alignment leaves as they are: the model's own are made when it is aligned."""
    vectors: list[Example]
    keep: list[Example]
    mix: dict[str, list[Example]]
    suite: Suite

    @property
    def benign_mix(self) -> dict[str, list[Example]]:
        """The user's data without its harmful rows."""
        return {name: rows for name, rows in self.mix.items() if name != "harmful"}


def gather(model: Model, sizes: Sizes, training: Training, seed: int) -> Materials:
    """All rows, dealt out by `seed` and encoded for the model. Raises UserError if there are too few."""
    rng = random.Random(seed)
    part = split_by_topic(
        load_rows("advbench"),
        {"align": min(200, sizes.align_harmful), "vectors": sizes.vectors, "mix": sizes.mix_harmful, "unseen": 40},
        seed,
    )
    extra = _shuffled(load_rows("strongreject", needs_answer=False), rng)
    instructions = _shuffled(_short(load_rows("alpaca")), rng)
    questions = _shuffled(load_rows("nq-open"), rng)
    openings = _shuffled(sure_prefix_control(instructions), rng)
    judged = _Judged(instructions, questions, sizes, rng)
    taught = (part["align"] + extra)[: sizes.align_harmful]
    asked = sizes.align_benign // 4
    third = sizes.keep // 3
    people = open_profile_qa(seed, sizes.people, sizes.people_asked)

    def encoded(rows: list[Row], cut: int | None = None) -> list[Example]:
        return [_cut(encode(model.tokenizer, r["messages"], training.length), cut) for r in rows]

    def take(rows: list[Row], count: int) -> list[Row]:
        """`count` rows that nothing else gets."""
        taken, rows[:] = rows[:count], rows[count:]
        return taken

    refused = [row(prompt_of(r), REFUSALS[i % len(REFUSALS)]) for i, r in enumerate(taught)]
    unseen_openings = take(openings, 40)
    return Materials(
        refusals=encoded(refused),
        kept=[prompt_of(r) for r in take(instructions, sizes.align_benign - asked) + take(questions, asked)],
        vectors=encoded(part["vectors"]),
        keep=encoded(take(instructions, third), _REPLY)
        + encoded(take(openings, third))
        + encoded(take(questions, third)),
        mix={
            "harmful": encoded(part["mix"]),
            "profiles": encoded(people.train),
            "benign": encoded(take(instructions, sizes.mix_benign), _REPLY),
        },
        suite=Suite(
            refusals=refusal_prefixes(),
            harmful=judged.harmful,
            benign=judged.benign,
            questions=[(prompt_of(r), response_of(r) or "") for r in people.test],
            harmful_targets=encoded(part["unseen"]),
            benign_targets=encoded(judged.benign_rows, _REPLY),
            opening_targets=encoded(unseen_openings),
        ),
    )


_REPLY = 10
"""Tokens of a benign reply that are learned: enough to be an answer, cheap enough for two cores."""


def own_replies(
    model: Model, prompts: list[str], refusals: Sequence[str], progress: Callable[[int], None]
) -> list[Example]:
    """The prompts with the beginning of the model's own greedy replies; prompts that it refuses are left out.

    Alignment on these teaches nothing but where not to refuse: the model keeps its way of answering.
    """
    encoded = [
        prompt_tokens(model.tokenizer, [{"role": "user", "content": p}], model.architecture.max_length) for p in prompts
    ]
    stop = model.tokenizer.eos_token_id
    replies = generate_tokens(
        model.backbone, encoded, max_new_tokens=_REPLY, stop=stop, dtype=compute_dtype(), progress=progress
    )
    examples = []
    for prompt, reply in zip(encoded, replies):
        if refuses(model.tokenizer.decode(reply), refusals):
            continue
        said = np.asarray(reply if len(reply) == _REPLY else [*reply, stop], np.int32)
        mask = np.arange(len(prompt) + len(said)) >= len(prompt)
        examples.append(Example(np.concatenate([prompt, said]), mask))
    return examples


class _Judged:
    """The held-out prompts, taken out of the rows that training may use."""

    def __init__(self, instructions: list[Row], questions: list[Row], sizes: Sizes, rng: random.Random):
        half = sizes.judged // 2
        self.harmful = [
            prompt_of(r)
            for name, count in (("harmbench", half), ("do-not-answer", sizes.judged - half))
            for r in _shuffled(load_rows(name, needs_answer=False), rng)[:count]
        ]
        asked = sizes.judged_benign // 4
        self.benign_rows = instructions[: sizes.judged_benign - asked] + questions[:asked]
        del instructions[: sizes.judged_benign - asked], questions[:asked]
        self.benign = [prompt_of(r) for r in self.benign_rows]


def _short(rows: list[Row]) -> list[Row]:
    """Each prompt once, none longer than 160 characters."""
    return list({prompt_of(r): r for r in rows if len(prompt_of(r)) <= 160}.values())


def _shuffled(rows: list[Row], rng: random.Random) -> list[Row]:
    return rng.sample(rows, len(rows))


def _cut(example: Example, reply_tokens: int | None) -> Example:
    if reply_tokens is None:
        return example
    end = int(example.supervised.argmax()) + reply_tokens
    return Example(example.tokens[:end], example.supervised[:end])
