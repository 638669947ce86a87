"""The decoder of all families: a language model as an NNX module, and the ways to run it.

The weights of all blocks are stacked on a leading axis and `lax.scan` runs one block's program over them, so compile
time does not grow with depth. The decoder is a pytree: `jax.jit`, `jax.grad` and `optax` take it as it is. It has one
method for each use, each with one type of result:

    decoder(tokens, ...)               training, scoring   -> hidden states [B, T, D]
    decoder.prefill(tokens, ...)       reading a prompt    -> hidden states, and keys and values to cache
    decoder.decode_step(tokens, ...)   the next token      -> hidden states, and the cache with the token in it
    decoder.capture(tokens, ...)       interpretability    -> states of every layer [L, B, T, D]
    decoder.logits(hidden)                                 -> logits [..., V]

All take adapters (`model/adapter.py`), which change what the layers compute.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.attention import Attend, attention_path, cached_attention, self_attention
from secvec_jax.model.attention_masks import softcapped
from secvec_jax.model.kv_cache import KVCache, KVSegment
from secvec_jax.model.layers import (
    Block,
    InputsFor,
    LayerOutput,
    Norm,
    Remat,
    State,
    adapter_prefix_len,
    inputs_by_window,
    rematerialized,
    stacked_blocks,
)
from secvec_jax.model.quantized import Precision, precision_of, with_precision
from secvec_jax.sharding import LogicalAxes, constrain

_POSITION_OFFSET = 2
"""Learned positions start at this row of their table, as in OPT, where the first two rows are unused."""


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How a forward pass over whole sequences computes; hashable, so that it can be a static argument of `jax.jit`."""

    dtype: DTypeLike = jnp.float32
    """of activations; weights are cast to it where they are used"""
    remat: Remat = "none"
    shared_prefix: bool = True
    """whether tokens may have the segment `SHARED`, the beginning that all rows of a packed sequence have in common"""


UnrolledLayers = list[tuple[Block, tuple[Adapter, ...]]]
"""Each layer's own weights and adapters, without the layer axis."""


class Decoder(nnx.Module):
    """A causal language model: `embed` `[V, D]`, `layers`, `final_norm`, and `head` `[D, V]` or None if it is tied.

    `layers` is a `Block` with a leading layer axis in all parameters. Where positions are learned, `position_embed` is
    `[max_length + 2, D]`.
    """

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        self.architecture = architecture
        vocab_size, hidden_size = architecture.vocab_size, architecture.hidden_size

        def table(shape: tuple[int, int], axes: LogicalAxes) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape), axes=axes)

        self.embed = table((vocab_size, hidden_size), ("vocab", "embed"))
        self.layers = stacked_blocks(architecture, rngs)
        self.final_norm = Norm(architecture, "embed")
        positions = (architecture.max_length + _POSITION_OFFSET, hidden_size)
        self.position_embed = table(positions, (None, "embed")) if architecture.learned_positions else None
        self.head = None if architecture.tied_head else table((hidden_size, vocab_size), ("embed", "vocab"))

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        adapters: tuple[Adapter, ...] = (),
        options: ForwardOptions = ForwardOptions(),
    ) -> jax.Array:
        """The hidden states after the final norm, `[B, T, D]`, of whole sequences.

        tokens `[B, T]`. segments `[B, T]`: which row of a packed sequence a token belongs to, 0 for padding; None: one
        row a sequence. positions `[B, T]`: each token's place in its row; None: 0, 1, ...
        """
        hidden, _ = self._forward(tokens, segments, positions, adapters, options, lambda layer: None)
        return hidden

    def capture(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        adapters: tuple[Adapter, ...] = (),
        options: ForwardOptions = ForwardOptions(),
        *,
        state: State,
    ) -> jax.Array:
        """A state of every layer, `[L, B, T, D]`; the other arguments are those of a forward pass."""
        _, states = self._forward(tokens, segments, positions, adapters, options, operator.attrgetter(state))
        return states

    def prefill(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        adapters: tuple[Adapter, ...] = (),
        cache: KVCache | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> tuple[jax.Array, KVSegment]:
        """Read prompts: the hidden states `[B, T, D]`, and the tokens' keys and values, stacked over layers.

        cache: keys and values that the tokens attend to, in addition to each other. It is not written: the caller
        decides where the new keys and values go.
        """
        if cache is None:
            options = ForwardOptions(dtype)
            return self._forward(tokens, segments, positions, adapters, options, operator.attrgetter("kv"))
        segments, positions = _checked_inputs(tokens, segments, positions)
        attention = self._cached_attention(segments, positions, cache, adapters, in_cache=False)
        x = self._embedded(tokens, positions).astype(dtype)
        inputs_for = inputs_by_window(self.architecture, positions, attention)
        return self._scan(x, adapters, cache.parts, inputs_for, operator.attrgetter("kv"))

    def decode_step(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        adapters: tuple[Adapter, ...] = (),
        dtype: DTypeLike = jnp.float32,
        unrolled: UnrolledLayers | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Read one more token of each row, `[B, 1]`: its hidden state `[B, 1, D]`, and the cache with the token in it.

        The cache has a single part. unrolled: `unrolled_layers(adapters)`, to run the layers one by one and not in a
        scan; the cache's parts are then one segment for each layer.
        """
        segments, positions = _checked_inputs(tokens, None, positions)
        marked = cache.with_slots_marked(segments, positions)
        if unrolled is None:
            # Attention reads the cache as it was: in a scan, the token's own key and value come as a further segment.
            hidden, new = self.prefill(tokens, segments, positions, adapters, cache, dtype)
            (part,) = cache.parts
            parts: tuple[KVSegment, ...] = (part.written(new, cache.length),)
        else:
            # A layer writes its cache before it reads it, or XLA copies the cache in between; a scan copies it anyway.
            attention = self._cached_attention(segments, positions, marked, adapters, in_cache=True)
            inputs_for = inputs_by_window(self.architecture, positions, attention)
            x = self._embedded(tokens, positions).astype(dtype)
            hidden, parts = self._loop(x, unrolled, cache, inputs_for)
        return hidden, dataclasses.replace(marked, parts=parts, length=cache.length + tokens.shape[1])

    def unrolled_layers(self, adapters: tuple[Adapter, ...]) -> UnrolledLayers:
        """A copy of each layer's weights and adapters as separate arrays, for `decode_step`.

        On XLA's CPU backend a scan copies a layer's weights out of the stack each time it runs: as much work as a short
        decoding step itself.
        """
        return [_nth((self.layers, adapters), index) for index in range(self.architecture.num_layers)]

    @property
    def output_embedding(self) -> jax.Array:
        """The table `[V, D]` that hidden states are multiplied with: the head, or the embedding if they are tied."""
        return self.embed[...] if self.head is None else self.head[...].T

    @property
    def final_softcap(self) -> float | None:
        """c where logits l become c tanh(l / c), else None."""
        return self.architecture.final_softcap

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits `[..., V]`, float32, of hidden states `[..., D]`."""
        return logits_of(self.output_embedding, hidden, self.final_softcap)

    @property
    def precision(self) -> Precision:
        """The precision of the weights."""
        return precision_of(self)

    def named_leaves(self) -> Iterator[tuple[str, jax.Array]]:
        """Every array with its `leaf_name`, in the order of fingerprints and files, which the modules do not change."""
        leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(self)]
        yield from sorted(leaves, key=lambda leaf: leaf[0].split("."))

    def _forward(
        self,
        tokens: jax.Array,
        segments: jax.Array | None,
        positions: jax.Array | None,
        adapters: tuple[Adapter, ...],
        options: ForwardOptions,
        select: Callable[[LayerOutput], Any],
    ) -> tuple[jax.Array, Any]:
        """The hidden states `[B, T, D]` of whole sequences, and what `select` takes of each layer's output."""
        segments, positions = _checked_inputs(tokens, segments, positions)
        prefix_len, shared_prefix = adapter_prefix_len(adapters), options.shared_prefix
        attention = partial(
            self_attention,
            segments,
            positions,
            path=attention_path(
                tokens.shape[1],
                self.architecture.head_dim,
                options.dtype,
                shared_prefix=shared_prefix,
                prefix_len=prefix_len,
            ),
            shared_prefix=shared_prefix,
            prefix_len=prefix_len,
            softcap=self.architecture.attention_softcap,
        )
        inputs_for = inputs_by_window(self.architecture, positions, attention)
        x = self._embedded(tokens, positions).astype(options.dtype)
        return self._scan(x, adapters, (), inputs_for, select, options.remat)

    def _scan(
        self,
        x: jax.Array,
        adapters: tuple[Adapter, ...],
        cached: tuple[KVSegment, ...],
        inputs_for: InputsFor,
        select: Callable[[LayerOutput], Any],
        remat: Remat = "none",
    ) -> tuple[jax.Array, Any]:
        """All layers, one after the other in a scan, and the final norm; what `select` takes of each layer's output."""

        def layer(x: jax.Array, sliced: Any) -> tuple[jax.Array, Any]:
            block, adapters, cached, windowed = sliced
            output = block(x, adapters, inputs_for(windowed)._replace(cached=cached))
            return output.residual, select(output)

        windowed = self.architecture.windowed
        stacked = (self.layers, adapters, cached, None if windowed is None else jnp.asarray(windowed))
        x, outputs = jax.lax.scan(rematerialized(layer, remat), x, stacked)
        return self.final_norm(x), outputs

    def _loop(
        self, x: jax.Array, unrolled: UnrolledLayers, cache: KVCache, inputs_for: InputsFor
    ) -> tuple[jax.Array, tuple[KVSegment, ...]]:
        """All layers unrolled, one after the other, and the final norm; returns the layers' caches, too."""
        windowed: Sequence[bool | None] = self.architecture.windowed or [None] * len(unrolled)
        parts = []
        for (block, adapters), part, local in zip(unrolled, cache.parts, windowed, strict=True):
            output = block(x, adapters, inputs_for(local)._replace(cached=(part,), slot=cache.length))
            x = output.residual
            parts.append(output.kv)
        return self.final_norm(x), tuple(parts)

    def _embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """`[B, T, D]`. On a mesh each device looks up its part of D for all tokens: the table is never gathered."""
        x = self.embed[...][constrain(tokens, "copies", "length")].astype(jnp.float32)
        if self.position_embed is not None:
            x = x + self.position_embed[...][constrain(positions, "copies", "length") + _POSITION_OFFSET]
        if self.architecture.scaled_embedding:
            x = x * math.sqrt(self.architecture.hidden_size)
        return constrain(constrain(x, "copies", "length", "embed"), "batch", "length", "hidden")

    def _cached_attention(
        self,
        segments: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        adapters: tuple[Adapter, ...],
        in_cache: bool,
    ) -> Callable[..., Attend]:
        """`cached_attention` with everything bound but its window."""
        return partial(
            cached_attention,
            segments,
            positions,
            cache,
            in_cache=in_cache,
            prefix_len=adapter_prefix_len(adapters),
            softcap=self.architecture.attention_softcap,
        )


@jax.jit
def _nth(stacked: Any, index: jax.Array) -> Any:
    """A tree's arrays at an index of their first axis: one small program for all layers."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), stacked)


def logits_of(table: jax.Array, hidden: jax.Array, softcap: float | None) -> jax.Array:
    """Logits `[..., V]`, float32, of hidden states `[..., D]` and an output embedding `[V, D]`."""
    return softcapped((hidden @ table.T.astype(hidden.dtype)).astype(jnp.float32), softcap)


def _checked_inputs(
    tokens: jax.Array, segments: jax.Array | None, positions: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Segments and positions `[B, T]`, with their defaults where they are None; all shapes checked while tracing."""
    chex.assert_rank(tokens, 2)
    if segments is None:
        segments = jnp.ones_like(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    chex.assert_equal_shape([tokens, segments, positions])
    return segments, positions


def abstract_decoder(architecture: Architecture, precision: Precision = "float32") -> Decoder:
    """The decoder with shapes in place of arrays, in this precision: takes no memory."""
    traced = _traced_decoder(architecture, precision, jax.sharding.get_abstract_mesh())
    return jax.tree.map(lambda shape: shape, traced)  # a copy, which the caller may change


@lru_cache(maxsize=64)
def _traced_decoder(architecture: Architecture, precision: Precision, mesh: jax.sharding.AbstractMesh) -> Decoder:
    return jax.eval_shape(lambda: with_precision(Decoder(architecture, nnx.Rngs(0)), precision))


def leaf_name(path: tuple) -> str:
    """The name of a decoder's array in weight tables and fingerprints, from its pytree path.

    Files use these names, so they do not follow the modules: "attention" and "mlp" are left out, and a norm's
    parameters have its name. Examples: "layers.q_proj.kernel", "layers.mlp_norm", "layers.mlp_norm_bias".
    """
    keys = [key.name for key in path if getattr(key, "name", "value") != "value"]
    names = [key for key in keys if key not in ("attention", "mlp")]
    if len(names) > 1 and names[-2].endswith("norm"):
        parameter = names.pop()
        if parameter != "weight":
            names[-1] = f"{names[-1]}_{parameter}"
    return ".".join(names)
