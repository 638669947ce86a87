"""Hidden states of a model, for interpretability: means of the residual stream, and drift of attention's outputs.

Layers are counted from 0. The residual state of layer l is the stream after it, which transformers returns as
`hidden_states[l + 1]`. Everything is computed and returned in float32, in one forward pass per example and model.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.batch import check_token_ids
from secvec_jax.data.chat import Example
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.model.decoder import Decoder, ForwardOptions
from secvec_jax.model.generate import rounded_up
from secvec_jax.model.hub import Model
from secvec_jax.sharding import constrain

_BATCH, _BUCKET = 8, 16


def reply_means(
    model: Model, examples: Sequence[Example], vectors: Adapter | tuple[Adapter, ...] | None = None
) -> np.ndarray:
    """The mean residual state of each example's supervised tokens after every layer, `[N, L, D]`.

    The supervised tokens are those of the reply, with the token that ends the turn. An example without any has zeros.
    """
    shape = (len(examples), model.architecture.num_layers, model.architecture.hidden_size)
    means = np.zeros(shape, np.float32)
    for rows, tokens, segments, supervised in _batches(examples, model):
        batch_means = _means(model.backbone, as_adapters(vectors), tokens, segments, supervised)
        means[rows] = np.asarray(batch_means)[: len(rows)]
    return means


def attention_difference(model: Model, reference: Model, examples: Sequence[Example]) -> list[float]:
    """Vaccine's harmful embedding drift (Huang et al. 2024, arXiv 2402.01109) of `model` from `reference`.

    For each example, the L2 norm over all layers and tokens of the difference between the outputs of the two models'
    attention, before these are added to the residual stream. Raises UserError if the architectures differ.
    """
    if model.architecture != reference.architecture:
        raise UserError(f"{model.name} and {reference.name} are of different architectures: compare two of the same")
    norms = np.zeros(len(examples))
    for rows, tokens, segments, _ in _batches(examples, model):
        norms[rows] = np.asarray(_drift(model.backbone, reference.backbone, tokens, segments))[: len(rows)]
    return norms.tolist()


def layer_mask(model: Model, layers: Sequence[int] | None) -> np.ndarray:
    """A mask over layers, `[L]` of 0 and 1, float32. layers: the chosen ones; None: all. Raises UserError for
    others."""
    count = model.architecture.num_layers
    mask = np.zeros(count, np.float32)
    for layer in range(count) if layers is None else layers:
        if not 0 <= layer < count:
            raise UserError(f"there is no layer {layer}: the model has {count}, counted from 0")
        mask[layer] = 1
    return mask


def _batches(
    examples: Sequence[Example], model: Model
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of examples of similar length: their indices, and tokens, segments and supervised marks `[B, T]`.

    Rows are padded on the right.
    """
    for number, example in enumerate(examples, 1):
        check_token_ids(example.tokens, model.architecture.vocab_size, f"row {number}")
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        width = rounded_up(len(examples[rows[-1]].tokens), _BUCKET)
        tokens, segments, supervised = np.zeros((3, _BATCH, width), np.int32)
        for row, index in enumerate(rows):
            length = len(examples[index].tokens)
            tokens[row, :length] = examples[index].tokens
            segments[row, :length] = 1
            supervised[row, :length] = examples[index].supervised
        yield rows, tokens, segments, supervised


_FORWARD = ForwardOptions(shared_prefix=False)


@jax.jit
def _means(decoder: Decoder, adapters: tuple[Adapter, ...], tokens, segments, supervised) -> jax.Array:
    """`[B, L, D]`"""
    states = decoder.capture(tokens, segments, adapters=adapters, options=_FORWARD, state="residual")
    sums = jnp.einsum("lbtd,bt->bld", states, supervised.astype(states.dtype), precision=jax.lax.Precision.HIGHEST)
    return constrain(sums / jnp.maximum(supervised.sum(axis=1), 1)[:, None, None], None)


@jax.jit
def _drift(decoder: Decoder, reference: Decoder, tokens, segments) -> jax.Array:
    """`[B]`"""
    outputs = decoder.capture(tokens, segments, options=_FORWARD, state="attention")
    reference_outputs = reference.capture(tokens, segments, options=_FORWARD, state="attention")
    squares = jnp.sum(jnp.square(outputs - reference_outputs), axis=(0, 3))
    return constrain(jnp.sqrt(jnp.sum(squares * (segments > 0), axis=1)), None)
