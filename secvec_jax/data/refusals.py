"""Harmful requests of published benchmarks with refusals, the rows that alignment teaches."""

import random
from collections.abc import Sequence

from secvec_jax.data import benchmarks
from secvec_jax.data.rows import Row, prompt_of, row
from secvec_jax.data.topics import off_topic, split_by_topic

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
"""Refusals that alignment teaches; varied, so that the model learns to refuse and not just one sentence."""


def refused(rows: Sequence[Row]) -> list[Row]:
    """The rows' prompts, each with one of the `REFUSALS`."""
    return [row(prompt_of(r), REFUSALS[i % len(REFUSALS)]) for i, r in enumerate(rows)]


def to_refuse(advbench: Sequence[Row], held_out: Sequence[str], count: int, rng: random.Random) -> list[Row]:
    """`count` rows: `advbench`, a third of them, then StrongREJECT and JailbreakBench, drawn with `rng`.

    held_out: prompts whose topics the rows of JailbreakBench may not have, since models are scored on them.
    """
    third = count // 3
    requests = benchmarks.strongreject()
    requests = rng.sample(requests, len(requests))
    tenses = off_topic(benchmarks.jailbreakbench_tenses(), held_out)
    tenses = rng.sample(tenses, len(tenses))
    return [*advbench, *requests[:third], *tenses[: count - 2 * third]]


def refusals() -> list[Row]:
    """The quickstart's 450 refusals, those of seed 0: the prompts are not those of its vectors, data and evaluation."""
    sizes = {"align": 150, "vectors": 100, "mix": 64, "unseen": 32}
    part = split_by_topic(benchmarks.advbench(), sizes, seed=0)
    held_out = [prompt_of(r) for r in (*benchmarks.harmbench(), *benchmarks.do_not_answer())]
    return refused(to_refuse(part["align"], held_out, 450, random.Random(0)))
