"""One layer of the decoder as NNX modules: Attention and MLP make a Block, and all blocks are stacked into one.

The modules describe a single layer; `stacked_blocks` adds the layer axis. NNX's layers are not used: nnx.Linear has no
place for an adapter's kernel or for gathers on a mesh, and nnx.RMSNorm multiplies in another order than Hugging Face
does, so its last bits differ. `axes` in a variable's metadata are the logical axes of `sharding.AXIS_RULES`; NNX's
sharding metadata would place each array on the mesh when it is created.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture, rope_frequencies
from secvec_jax.model.attention import Attend, rotate
from secvec_jax.model.attention_masks import KERNEL
from secvec_jax.model.kv_cache import KVSegment
from secvec_jax.model.quantized import QuantizedKernel, weight_of
from secvec_jax.sharding import LogicalAxes, all_gather, constrain

State = Literal["attention", "residual"]
"""States of a layer that can be captured: the output of its attention before that is added to the residual stream, or
the residual stream after the layer."""

PRODUCT = "product"
"""The name by which remat policies recognize the output of a projection, to keep it for the backward pass."""

Remat = Literal["none", "dots", "attention", "full"]
"""What the backward pass recomputes: nothing; all but the outputs of projections and attention; all but the outputs of
attention; the whole layer."""

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

KERNEL_AXES = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("embed", "heads")) | {
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
"""The logical axes of each projection's kernel `[inputs, outputs]`."""


class LayerInputs(NamedTuple):
    """The inputs of a block besides hidden states and adapters."""

    positions: jax.Array
    """`[B, T]`"""
    frequencies: jax.Array
    """`[H / 2]`, of rotary embeddings"""
    attend: Attend
    cached: tuple[KVSegment, ...] = ()
    """the layer's keys and values of earlier tokens"""
    slot: jax.Array | None = None
    """where in the one cached segment the new keys and values are written; None: they are a segment after it"""


InputsFor = Callable[[Any], LayerInputs]
"""A layer's inputs, by whether it has the sliding window: a traced or static bool, None where all layers are alike."""


class LayerOutput(NamedTuple):
    """The outputs of a block. `attention` and `residual` are the `State`s `[B, T, D]`."""

    attention: jax.Array
    residual: jax.Array
    kv: KVSegment
    """the keys and values of the tokens; with a slot, the cached segment with these written into it"""


class Linear(nnx.Module):
    """One projection of a layer: `kernel` `[inputs, outputs]`, and `bias` `[outputs]` or None.

    The kernel is an array or, of a frozen model, a `QuantizedKernel`.
    """

    def __init__(self, architecture: Architecture, projection: str, rngs: nnx.Rngs):
        shape, axes = architecture.kernel_shape(projection), KERNEL_AXES[projection]
        self.projection = projection
        self.kernel: Any = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape), axes=axes)
        biased = architecture.has_bias(projection)
        self.bias = nnx.Param(jnp.zeros(shape[1]), axes=axes[1:]) if biased else None

    def __call__(self, x: jax.Array, adapters: tuple[Adapter, ...]) -> jax.Array:
        """`[B, T, inputs]` -> `[B, T, outputs]`."""
        # Flat rows: XLA's CPU backend transposes three-dimensional operands for the gradient of a weight.
        rows = x.reshape(-1, x.shape[-1])
        compute: Callable[..., jax.Array] = partial(_product, self.projection)
        kernel = self.kernel if isinstance(self.kernel, QuantizedKernel) else self.kernel[...]
        if adapters or isinstance(kernel, QuantizedKernel):
            # The backward pass recomputes the adapted or dequantized weight: stored, it would be a second backbone.
            compute = jax.checkpoint(compute, prevent_cse=False)
        y = checkpoint_name(compute(rows, kernel, adapters), PRODUCT)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        for adapter in adapters:
            y = adapter.linear(self.projection, rows, y)
        return y.reshape(*x.shape[:-1], -1)


def _product(projection: str, x: jax.Array, kernel: Any, adapters: tuple[Adapter, ...]) -> jax.Array:
    weight = weight_of(kernel)
    if adapters:
        weight = weight.astype(jnp.float32)  # what is added may be far smaller than the weight
    for adapter in adapters:
        weight = adapter.kernel(projection, weight)
    return x @ all_gather(weight.astype(x.dtype), *KERNEL_AXES[projection])


class Norm(nnx.Module):
    """The architecture's normalization over the last axis, computed in float32: `weight`, and `bias` of a LayerNorm.

    axis: the logical axis that is normalized, "embed" or "head_dim".
    """

    def __init__(self, architecture: Architecture, axis: Literal["embed", "head_dim"]):
        self.kind, self.epsilon = architecture.norm, architecture.norm_eps
        size = architecture.head_dim if axis == "head_dim" else architecture.hidden_size
        neutral = 0.0 if self.kind == "rms_plus_one" else 1.0
        self.weight = nnx.Param(jnp.full(size, neutral, jnp.float32), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(size), axes=(axis,)) if self.kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        wide = wide * (1 + self.weight[...] if self.kind == "rms_plus_one" else self.weight[...])
        if self.bias is not None:
            wide = wide + self.bias[...]
        return wide.astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention of one layer, with grouped key-value heads and, in some families, norms of queries and keys."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        self.architecture = architecture
        self.q_proj = Linear(architecture, "q_proj", rngs)
        self.k_proj = Linear(architecture, "k_proj", rngs)
        self.v_proj = Linear(architecture, "v_proj", rngs)
        self.o_proj = Linear(architecture, "o_proj", rngs)
        self.q_norm = Norm(architecture, "head_dim") if architecture.qk_norm else None
        self.k_norm = Norm(architecture, "head_dim") if architecture.qk_norm else None

    def __call__(self, x: jax.Array, adapters: tuple[Adapter, ...], inputs: LayerInputs) -> tuple[jax.Array, KVSegment]:
        """The output `[B, T, D]` for hidden states `[B, T, D]`, and `LayerOutput.kv`."""
        query = self._split_heads(self.q_proj(x, adapters))  # [B, T, query heads, H]
        key = self._split_heads(self.k_proj(x, adapters))  # [B, T, key-value heads, H]
        value = self._split_heads(self.v_proj(x, adapters))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        a = self.architecture
        if not a.learned_positions:
            query = rotate(query, inputs.positions, inputs.frequencies)
            key = rotate(key, inputs.positions, inputs.frequencies)
        if a.query_scalar not in (None, a.head_dim):
            query = query * math.sqrt(a.head_dim / a.query_scalar)  # attention divides by the root of the head's size
        # As the products of attention read them: keys [B, heads, H, T], values [B, heads, T, H].
        kv = KVSegment(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2))
        if inputs.slot is None:
            segments = (*inputs.cached, kv)
        else:
            (segment,) = inputs.cached
            kv = segment.written(kv, inputs.slot)
            segments = (kv,)
        keys, values = zip(*adapter_prefixes(adapters, x.dtype), *segments)
        heads = inputs.attend(query, keys, values)  # [B, T, query heads, H]
        return self.o_proj(heads.reshape(*x.shape[:2], -1), adapters), kv

    def _split_heads(self, x: jax.Array) -> jax.Array:
        heads = x.reshape(*x.shape[:2], -1, self.architecture.head_dim)
        return constrain(heads, "batch", "length", "heads", "head_dim")


class MLP(nnx.Module):
    """The MLP of one layer: down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        self.activation = architecture.activation
        self.gate_proj = Linear(architecture, "gate_proj", rngs) if architecture.gated else None
        self.up_proj = Linear(architecture, "up_proj", rngs)
        self.down_proj = Linear(architecture, "down_proj", rngs)

    def __call__(self, x: jax.Array, adapters: tuple[Adapter, ...]) -> jax.Array:
        activation = _ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            inner = activation(self.up_proj(x, adapters))
        else:
            inner = activation(self.gate_proj(x, adapters)) * self.up_proj(x, adapters)
        return self.down_proj(inner, adapters)


class Block(nnx.Module):
    """One layer: attention and MLP, each on a normalized input and added to the residual stream.

    With `post_norms` (Gemma 2), their outputs are normalized, too.
    """

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        self.attention_norm = Norm(architecture, "embed")
        self.attention = Attention(architecture, rngs)
        self.attention_post_norm = Norm(architecture, "embed") if architecture.post_norms else None
        self.mlp_norm = Norm(architecture, "embed")
        self.mlp = MLP(architecture, rngs)
        self.mlp_post_norm = Norm(architecture, "embed") if architecture.post_norms else None

    def __call__(self, x: jax.Array, adapters: tuple[Adapter, ...], inputs: LayerInputs) -> LayerOutput:
        """The layer's output for hidden states `[B, T, D]`."""
        attention, kv = self.attention(self.attention_norm(x), adapters, inputs)
        change = attention if self.attention_post_norm is None else self.attention_post_norm(attention)
        x = constrain(x + change, "batch", "length", "hidden")
        change = self.mlp(self.mlp_norm(x), adapters)
        x = x + (change if self.mlp_post_norm is None else self.mlp_post_norm(change))
        for adapter in adapters:
            x = adapter.residual(x)
        return LayerOutput(attention, constrain(x, "batch", "length", "hidden"), kv)


def stacked_blocks(architecture: Architecture, rngs: nnx.Rngs) -> Block:
    """All blocks as one, whose parameters have a leading layer axis: `lax.scan` slices it layer by layer."""

    @nnx.split_rngs(splits=architecture.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(architecture, rngs)

    blocks = create(rngs)
    for variable in jax.tree.leaves(blocks, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        axes: LogicalAxes = variable.get_metadata("axes")
        variable.set_metadata(axes=("layers", *axes))
    return blocks


def rematerialized(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The function of a layer, with a backward pass that recomputes what `remat` says."""
    if remat == "none":
        return layer
    kept = {"dots": (PRODUCT, KERNEL), "attention": (KERNEL,), "full": ()}[remat]
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def adapter_prefixes(adapters: tuple[Adapter, ...], dtype: DTypeLike) -> list[KVSegment]:
    """The keys and values that adapters put before all others."""
    prefixes = [adapter.prefix() for adapter in adapters]
    return [KVSegment(kv.keys.astype(dtype), kv.values.astype(dtype)) for kv in prefixes if kv is not None]


def adapter_prefix_len(adapters: tuple[Adapter, ...]) -> int:
    """How many keys the adapters put before all others."""
    return sum(kv.keys.shape[-1] for kv in adapter_prefixes(adapters, jnp.float32))


def inputs_by_window(architecture: Architecture, positions: jax.Array, attention: Callable[..., Attend]) -> InputsFor:
    """Each layer's inputs: rotary frequencies and attention depend on whether it has the sliding window.

    positions `[B, T]`. attention: called with `window`, in positions; None for none.
    """
    a = architecture
    full_frequencies = jnp.asarray(rope_frequencies(a, windowed=False), jnp.float32)
    local_frequencies = jnp.asarray(rope_frequencies(a, windowed=True), jnp.float32)
    if a.windowed is None:
        frequencies = full_frequencies if a.sliding_window is None else local_frequencies
        everywhere = LayerInputs(positions, frequencies, attention(window=a.sliding_window))
        return lambda windowed: everywhere
    full = LayerInputs(positions, full_frequencies, attention(window=None))
    local = LayerInputs(positions, local_frequencies, attention(window=a.sliding_window))

    def inputs_for(windowed: jax.Array | bool) -> LayerInputs:
        if isinstance(windowed, bool):
            return local if windowed else full
        frequencies = jnp.where(windowed, local_frequencies, full_frequencies)
        return LayerInputs(positions, frequencies, partial(jax.lax.cond, windowed, local.attend, full.attend))

    return inputs_for
