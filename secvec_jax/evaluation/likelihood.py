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
    guests = () if vectors is None else (vectors,)
    said = _rounded_up(max((int(e.supervised.sum()) for e in examples), default=1))
    losses = np.zeros(len(examples))
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for start in range(0, len(examples), _BATCH):
        batch = order[start : start + _BATCH]
        width = _rounded_up(len(examples[batch[-1]].tokens))
        tokens, supervised = np.zeros((_BATCH, width), np.int32), np.zeros((_BATCH, width), bool)
        for row, index in enumerate(batch):
            example = examples[index]
            tokens[row, : len(example.tokens)] = example.tokens
            supervised[row, : len(example.tokens)] = example.supervised
        found = _row_losses(model.backbone, guests, tokens, supervised, said=min(said, width), dtype=compute_dtype())
        losses[batch] = np.asarray(found)[: len(batch)]
    return losses.tolist()


def _rounded_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


@partial(jax.jit, static_argnames=("said", "dtype"))
def _row_losses(decoder, guests, tokens, supervised, *, said, dtype):
    """said: the most supervised tokens that a row has."""
    hidden, _ = decoder(tokens, guests=guests, dtype=dtype)

    def row(hidden, tokens, supervised):
        (targets,) = jnp.nonzero(supervised.at[0].set(False), size=said, fill_value=0)  # 0: nothing precedes it
        log_p = jax.nn.log_softmax(decoder.logits(hidden[targets - 1]))
        losses = -jnp.take_along_axis(log_p, tokens[targets, None], axis=-1)[:, 0]
        weights = (targets > 0).astype(jnp.float32)
        return jnp.sum(losses * weights) / jnp.maximum(weights.sum(), 1)

    # Row by row: the logits of a whole batch would be the largest array of the program.
    return jax.lax.map(lambda row_of: row(*row_of), (hidden, tokens, supervised))
