"""What the attacks and tasks of a grid share: small helpers on rows."""

import random
from collections.abc import Sequence

from secvec_jax.data.rows import Row, prompt_of, response_of


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in an order drawn by the seed, each prompt once (with its last answer)."""
    unique = list({prompt_of(row): row for row in rows}.values())
    return random.Random(seed).sample(unique, len(unique))


def reference_answer(row: Row) -> str:
    """The answer of a row; empty where it has none."""
    return response_of(row) or ""
