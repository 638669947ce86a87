"""The contents of a packed batch: the contract between `data`, which makes it, and the packages that use it."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from secvec_jax.errors import UserError

Batch = dict[str, Any]
"""`tokens`, `targets`, `segments`, `positions`, `groups` int32 and `weights` float32, all `[B, T]`.

`targets[b, t]` is the token to predict at `t`; `weights` is how much its loss counts: usually 1 where the assistant
says it, else 0. `groups` is the kind of the row, by which losses are reported. `segments` numbers the rows of a
sequence; 0 is padding, `SHARED` the prefix that all of them attend to.
"""

KEYS = ("tokens", "targets", "weights", "groups", "segments", "positions")

SHARED = -1
"""The segment of tokens that all rows of a sequence attend to: the prefix that they have in common."""


def check_token_ids(tokens: Any, vocab_size: int, where: str) -> None:
    """Raises UserError for token ids outside an embedding table of `vocab_size` rows. where: their source, for the
    error.

    JAX would silently clamp them to the last row.
    """
    tokens = np.asarray(tokens)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise UserError(
            f"{where} has token id {int(outside.flat[0])}, which is outside the model's embedding table of "
            f"{vocab_size} rows: use the tokenizer that belongs to the model, or resize its embeddings"
        )


def common_prefix(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens with which all prompts begin; at least the last token of each is left over."""
    shortest = max(min(map(len, prompts)) - 1, 0)
    return np.asarray(os.path.commonprefix([prompt[:shortest].tolist() for prompt in prompts]), np.int32)
