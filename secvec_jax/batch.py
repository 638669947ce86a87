"""The contract of a packed batch, between the room that makes it and those that use it."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from secvec_jax.errors import UserError

Batch = dict[str, Any]
"""`tokens`, `targets`, `segments`, `positions`, `groups` int32 and `weights` float32, all `[B, T]`.

`targets[b, t]` is the token to be predicted at `t`; `weights` is how much its loss counts, where the assistant says it
1 as a rule, else 0; `groups` tells the losses of different kinds of rows apart; `segments` tells the rows of one line
apart, 0 is padding.
"""

KEYS = ("tokens", "targets", "weights", "groups", "segments", "positions")

SHARED = -1
"""The segment of tokens that all rows of a line see: the beginning that they have in common."""


def check_token_ids(tokens: Any, vocab_size: int, where: str) -> None:
    """Raises UserError if token ids, `where` they are from, are outside an embedding table of `vocab_size` rows.

    JAX would clamp them to the last row in silence.
    """
    tokens = np.asarray(tokens)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise UserError(
            f"{where} has token id {int(outside.flat[0])}, which is outside the model's embedding table of "
            f"{vocab_size} rows: use the tokenizer that belongs to the model, or resize its embeddings"
        )


def common_head(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens with which all prompts begin; at least the last token of each is left over."""
    shortest = max(min(map(len, prompts)) - 1, 0)
    return np.asarray(os.path.commonprefix([prompt[:shortest].tolist() for prompt in prompts]), np.int32)
