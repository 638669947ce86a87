"""How likely a model holds given replies: the mean loss on their tokens."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.data.chat import Example
from secvec_jax.inference import compute_dtype
from secvec_jax.model.decoder import Guest
from secvec_jax.model.hub import Model

_BATCH, _BUCKET = 8, 32


def mean_losses(model: Model, examples: Sequence[Example], vectors: Guest | None = None) -> list[float]:
    """Each example's cross-entropy per token that the assistant says, in nats."""
    width = -(-max((len(e.tokens) for e in examples), default=1) // _BUCKET) * _BUCKET
    guests = () if vectors is None else (vectors,)
    losses: list[float] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        tokens, supervised = np.zeros((_BATCH, width), np.int32), np.zeros((_BATCH, width), bool)
        for row, example in enumerate(batch):
            tokens[row, : len(example.tokens)] = example.tokens
            supervised[row, : len(example.tokens)] = example.supervised
        found = _row_losses(model.backbone, guests, tokens, supervised, dtype=compute_dtype())
        losses += np.asarray(found)[: len(batch)].tolist()
    return losses


@partial(jax.jit, static_argnames="dtype")
def _row_losses(decoder, guests, tokens, supervised, *, dtype):
    hidden, _ = decoder(tokens, guests=guests, dtype=dtype)

    def row(hidden, tokens, supervised):
        log_p = jax.nn.log_softmax(decoder.logits(hidden[:-1]))
        losses = -jnp.take_along_axis(log_p, tokens[1:, None], axis=-1)[:, 0]
        weights = supervised[1:].astype(jnp.float32)
        return jnp.sum(losses * weights) / jnp.maximum(weights.sum(), 1)

    # Row by row: the logits of a whole batch would be the largest array of the program.
    return jax.lax.map(lambda row_of: row(*row_of), (hidden, tokens, supervised))
