"""One decoder for all families, and the protocol by which adapters visit its layers.

The weights of all layers are stacked on a leading axis and `lax.scan` runs one layer's program over them, so
compile time does not grow with depth. The decoder is an NNX module and therefore a pytree: `jax.jit`,
`jax.grad` and `optax` take it as it is.

Whatever visits a layer (LoRA factors, a steering direction, a soft prompt, a perturbation) is a *adapter*: a pytree
whose arrays have the same leading layer axis, scanned beside the weights and passed as an argument. So whether a
adapter is active is an argument and not a state of the model, and without adapters the program is the bare backbone's.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from secvec_jax.model.architecture import Architecture, rope_frequencies
from secvec_jax.model.attention import KERNEL, Attend, among_themselves, attend, rotate, softcapped, visible
from secvec_jax.sharding import all_gather, constrain
from secvec_jax.trees import unstacked

Remat = Literal["none", "dots", "attention", "full"]
"""What the backward pass recomputes: nothing; all but the projections' outputs and a fused attention kernel; all but
that kernel; the whole layer."""

Watched = Literal["attention", "residual"]
"""States of a layer that can be had: the attention's output before it is added, the stream stream behind it."""

_PRODUCT = "product"
"""The name under which the projections' products can be kept for the backward pass."""

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

_NOBODYS = 2
"""Rows of a table of positions that come before the first position's."""

KERNEL_AXES = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("embed", "heads")) | {
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
"""The logical axes of each projection's kernel `[inputs, outputs]`."""


Run = tuple[jax.Array, jax.Array]
"""Keys `[B, K, H, S]` and values `[B, K, S, H]` of successive slots; `[1, ...]` where all rows share them."""


class Adapter:
    """A visitor of every layer: a pytree of arrays with a leading layer axis, which they lose inside the scan.

    Each visit leaves things as they are; a kind of adapter overrides those that it makes.
    """

    def linear(self, projection: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """What takes the place of `y` `[N, outputs]`, the projection's own output for the input `x` `[N, inputs]`."""
        return y

    def kernel(self, projection: str, kernel: jax.Array) -> jax.Array:
        """The weight `[inputs, outputs]` that takes the place of the projection's own."""
        return kernel

    def residual(self, x: jax.Array) -> jax.Array:
        """What takes the place of `x` `[B, T, D]`, the residual stream behind the layer."""
        return x

    def prefix(self) -> Run | None:
        """Keys and values `[1, ...]` that every token sees before all others; called outside the scan as well."""
        return None


def as_adapters(*given: Any) -> tuple[Adapter, ...]:
    """Adapters, tuples of adapters and None as one tuple of adapters."""
    flat: list[Adapter] = []
    for some in given:
        flat += as_adapters(*some) if isinstance(some, tuple) else [] if some is None else [some]
    return tuple(flat)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What was seen so far, in runs of slots: their keys and values, `segments` and `positions` `[B, S]` of all slots.

    runs: with a leading layer axis, or one tuple of runs for each layer. Slots from `length` on are free; a free slot
    and a padded one have segment 0.
    """

    runs: tuple[Run, ...] | list[tuple[Run, ...]]
    segments: jax.Array
    positions: jax.Array
    length: jax.Array


def written(run: Run, new: Run, slot: jax.Array) -> Run:
    """The run, with or without a leading layer axis, with `new` in the slots from `slot` on."""
    put = jax.lax.dynamic_update_slice_in_dim
    axes = (run[0].ndim - 1, run[1].ndim - 2)
    keys, values = (put(into, what.astype(into.dtype), slot, axis) for into, what, axis in zip(run, new, axes))
    return keys, values


class Linear(nnx.Module):
    """All layers' maps at one projection: `kernel` `[L, inputs, outputs]`, `bias` `[L, outputs]` or None."""

    def __init__(self, architecture: Architecture, projection: str, rngs: nnx.Rngs):
        shape = (architecture.num_layers, *architecture.kernel_shape(projection))
        self.projection = projection
        self.kernel = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), shape), axes=("layers", *KERNEL_AXES[projection])
        )
        bias = partial(nnx.Param, axes=("layers", KERNEL_AXES[projection][1]))
        self.bias = bias(jnp.zeros((shape[0], shape[2]))) if architecture.has_bias(projection) else None

    def __call__(self, x: jax.Array, adapters: tuple[Adapter, ...]) -> jax.Array:
        def product(x: jax.Array, kernel: jax.Array, adapters: tuple[Adapter, ...]) -> jax.Array:
            for adapter in adapters:
                kernel = adapter.kernel(self.projection, kernel)
            return x @ all_gather(kernel.astype(x.dtype), *KERNEL_AXES[self.projection])

        if adapters:  # the backward pass makes the adapters' weight again: kept, it would be a second backbone
            product = jax.checkpoint(product, prevent_cse=False)
        y = checkpoint_name(product(x, self.kernel[...], adapters), _PRODUCT)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Layers(nnx.Module):
    """All transformer layers; called inside the scan, on one layer's slice."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        def weight(axis: str, start: float) -> nnx.Param:
            size = a.head_dim if axis == "head_dim" else a.hidden_size
            return nnx.Param(jnp.full((a.num_layers, size), start, jnp.float32), axes=("layers", axis))

        a = self.architecture = architecture
        one, biased = _unit(a), a.norm == "layer"
        self.attention_norm, self.mlp_norm = weight("embed", one), weight("embed", one)
        self.attention_norm_bias, self.mlp_norm_bias = (weight("embed", 0) if biased else None for _ in range(2))
        self.attention_post_norm, self.mlp_post_norm = (
            weight("embed", one) if a.post_norms else None for _ in range(2)
        )
        self.q_norm, self.k_norm = (weight("head_dim", one) if a.qk_norm else None for _ in range(2))
        for name in a.projections:
            setattr(self, name, Linear(a, name, rngs))

    def __call__(self, x, adapters, cached: tuple[Run, ...], positions, frequencies, attention: Attend, slot=None):
        """One layer: hidden states `[B, T, D]` -> the same, this layer's new keys and values, and what `Watched` names.

        With a slot, the keys and values are written into the one cached run from there on, and that run is returned.
        """
        a, projection, norm = (
            self.architecture,
            partial(self._projection, adapters=adapters),
            partial(_norm, self.architecture),
        )
        h = norm(x, self.attention_norm, self.attention_norm_bias)
        query, key, value = (self._heads(projection(name, h)) for name in ("q_proj", "k_proj", "v_proj"))
        query, key = norm(query, self.q_norm), norm(key, self.k_norm)
        if not a.learned_positions:
            query, key = rotate(query, positions, frequencies), rotate(key, positions, frequencies)
        if a.query_scalar not in (None, a.head_dim):
            query = query * math.sqrt(a.head_dim / a.query_scalar)  # attention divides by the root of the head's size
        new = (key.transpose(0, 2, 3, 1), value.swapaxes(1, 2))
        if slot is not None:
            (run,) = cached
            cached, new = (), written(run, new, slot)
        keys, values = zip(*_prefixes(adapters, x.dtype), *cached, new)
        attended = projection("o_proj", attention(query, keys, values).reshape(*x.shape[:2], -1))
        x = constrain(x + norm(attended, self.attention_post_norm), "batch", "length", "hidden")
        h, act = norm(x, self.mlp_norm, self.mlp_norm_bias), _ACTIVATIONS[a.activation]
        h = act(projection("gate_proj", h)) * projection("up_proj", h) if a.gated else act(projection("up_proj", h))
        x = x + norm(projection("down_proj", h), self.mlp_post_norm)
        for adapter in adapters:
            x = adapter.residual(x)
        x = constrain(x, "batch", "length", "hidden")
        return x, new, {"attention": attended, "residual": x}

    def _projection(self, name: str, x: jax.Array, adapters: tuple[Adapter, ...]) -> jax.Array:
        # Flat rows: XLA's CPU backend transposes three-dimensional operands for the gradient of a weight.
        rows = x.reshape(-1, x.shape[-1])
        y = getattr(self, name)(rows, adapters)
        for adapter in adapters:
            y = adapter.linear(name, rows, y)
        return y.reshape(*x.shape[:-1], -1)

    def _heads(self, x: jax.Array) -> jax.Array:
        heads = x.reshape(*x.shape[:2], -1, self.architecture.head_dim)
        return constrain(heads, "batch", "length", "heads", "head_dim")


class Decoder(nnx.Module):
    """A causal language model: `embed` `[V, D]`, `layers`, `final_norm` `[D]`, `head` `[D, V]` or None if tied.

    Where positions are learned, `position_embed` `[max_length + 2, D]`: as in OPT, the first two are nobody's.
    """

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        self.architecture = architecture
        size = (architecture.vocab_size, architecture.hidden_size)
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), size), axes=("vocab", "embed"))
        self.layers = Layers(architecture, rngs)
        self.final_norm = nnx.Param(jnp.full(size[1], _unit(architecture), jnp.float32), axes=("embed",))
        bias = partial(nnx.Param, axes=("embed",))
        self.final_norm_bias = bias(jnp.zeros(size[1])) if architecture.norm == "layer" else None
        places, table = (architecture.max_length + _NOBODYS, size[1]), partial(nnx.Param, axes=(None, "embed"))
        learned = architecture.learned_positions
        self.position_embed = table(0.02 * jax.random.normal(rngs.params(), places)) if learned else None
        head = partial(nnx.Param, axes=("embed", "vocab"))
        self.head = None if architecture.tied_head else head(0.02 * jax.random.normal(rngs.params(), size[::-1]))

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        adapters: tuple[Adapter, ...] = (),
        cache: Cache | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        keep_cache: bool = False,
        shared: bool = True,
        apart: Sequence[tuple[Layers, tuple[Adapter, ...]]] | None = None,
        watch: Watched | None = None,
    ) -> tuple[jax.Array, Run | list[Run] | jax.Array | None]:
        """Hidden states after the final norm, `[B, T, D]`, and all layers' new keys and values.

        tokens `[B, T]`; segments `[B, T]`: which row of a packed batch a token belongs to, 0 for padding (all
        one row if None); positions `[B, T]`: the rotary position (0, 1, ... if None); cache: what the tokens
        see besides themselves; shared: whether a token may be of the segment `SHARED`; apart: `layers_apart`, to be
        run one by one in place of a scan, over a cache that is apart as well and has the tokens' segments and positions
        from slot `length` on: their keys and values are written there, and each layer's run is returned. Else
        keys and values are returned for a cache or `keep_cache`, else None; with `watch`, every layer's states of that
        name, `[L, B, T, D]`, in their place.
        """
        if segments is None:
            segments = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        keep_cache |= cache is not None
        before = sum(keys.shape[-1] for keys, _ in _prefixes(adapters, dtype))
        seen = self._seen(partial(self._attention, segments, positions, cache, shared, apart is not None, before))

        def layer(x, visit, slot=None):
            weights, adapters, cached, windowed = visit
            x, new, states = weights(x, adapters, cached, positions, *seen(windowed), slot)
            return x, states[watch] if watch else new if keep_cache else None

        x = self._embedded(tokens, positions).astype(dtype)
        windowed = self.architecture.windowed
        if apart is None or cache is None:
            visits = (self.layers, adapters, () if cache is None else cache.runs, windowed and jnp.asarray(windowed))
            x, new = jax.lax.scan(_rematerialize(layer, remat), x, visits)
        else:
            new = []
            for visit, cached, local in zip(apart, cache.runs, windowed or [None] * len(apart), strict=True):
                x, run = layer(x, (*visit, cached, local), cache.length)
                new.append(run)
        return _norm(self.architecture, x, self.final_norm, self.final_norm_bias), new

    def _embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """`[B, T, D]`. On a mesh each device looks up its part of D for all tokens: the table is never gathered."""
        x = self.embed[...][constrain(tokens, "copies", "length")]
        if self.position_embed is not None:
            x = x + self.position_embed[...][constrain(positions, "copies", "length") + _NOBODYS]
        if self.architecture.scaled_embedding:
            x = x * math.sqrt(self.architecture.hidden_size)
        return constrain(constrain(x, "copies", "length", "embed"), "batch", "length", "hidden")

    def _seen(self, attention: Callable[[int | None], Attend]) -> Callable[[Any], tuple[jax.Array, Attend]]:
        """Rotary frequencies and attention of a layer, by whether it has the window: a bool where some have, else None.

        attention: for a window or None.
        """
        a = self.architecture
        frequencies = [jnp.asarray(rope_frequencies(a, windowed=local), jnp.float32) for local in (False, True)]
        if a.windowed is None:
            local = a.sliding_window is not None
            everywhere = frequencies[local], attention(a.sliding_window)
            return lambda _: everywhere
        full, narrow = attention(None), attention(a.sliding_window)

        def seen(local: jax.Array | bool) -> tuple[jax.Array, Attend]:
            if isinstance(local, bool):
                return frequencies[local], narrow if local else full
            by_kind = partial(jax.lax.cond, local, narrow, full)
            return jnp.where(local, frequencies[1], frequencies[0]), by_kind

        return seen

    def _attention(
        self,
        segments: jax.Array,
        positions: jax.Array,
        cache: Cache | None,
        shared: bool,
        written: bool,
        before: int,
        window: int | None,
    ) -> Attend:
        """With a cache, over its slots and the fresh keys behind them, if they are not written there.

        before: how many keys of adapters stand before all others, to be seen by every token.
        """
        softcap = self.architecture.attention_softcap
        if cache is None and not before:
            return among_themselves(segments, positions, window=window, shared=shared, softcap=softcap)
        masks = [jnp.ones((*segments.shape, before), bool)[:, None]]
        if cache is not None:
            masks.append(visible(segments, cache.segments, positions, cache.positions, cache.length, window))
        if not written:
            masks.append(visible(segments, segments, positions, positions, window=window))
        return partial(attend, mask=jnp.concatenate(masks, axis=-1), softcap=softcap)

    def layers_apart(self, adapters: tuple[Adapter, ...]) -> list[tuple[Layers, tuple[Adapter, ...]]]:
        """Each layer's weights and adapters as arrays of their own: a copy, which a loop over many short passes saves
        taking in each of them on XLA's CPU backend."""
        return unstacked((self.layers, adapters), self.architecture.num_layers)

    @property
    def output_embedding(self) -> jax.Array:
        """The table `[V, D]` that hidden states are compared with: the head, or the embedding if they are tied."""
        return self.embed[...] if self.head is None else self.head[...].T

    @property
    def final_softcap(self) -> float | None:
        """c where logits l become c tanh(l / c)."""
        return self.architecture.final_softcap

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., D]` -> `[..., V]`, float32."""
        return logits_of(self.output_embedding, hidden, self.final_softcap)


def logits_of(table: jax.Array, hidden: jax.Array, softcap: float | None) -> jax.Array:
    """`[..., V]`, float32, of hidden states `[..., D]` compared with a table `[V, D]`."""
    return softcapped((hidden @ table.T.astype(hidden.dtype)).astype(jnp.float32), softcap)


def _prefixes(adapters: tuple[Adapter, ...], dtype: DTypeLike) -> list[Run]:
    found = (adapter.prefix() for adapter in adapters)
    return [(run[0].astype(dtype), run[1].astype(dtype)) for run in found if run is not None]


def _unit(a: Architecture) -> float:
    """The weight of a norm that leaves its input's scale alone."""
    return 0.0 if a.norm == "rms_plus_one" else 1.0


def _norm(a: Architecture, x: jax.Array, weight: nnx.Param | None, bias: nnx.Param | None = None) -> jax.Array:
    """`x` normed over its last axis in float32; as it is where there is no weight."""
    if weight is None:
        return x
    wide = x.astype(jnp.float32)
    if a.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + a.norm_eps)
    wide = wide * (1 + weight[...] if a.norm == "rms_plus_one" else weight[...])
    return (wide if bias is None else wide + bias[...]).astype(x.dtype)


def _rematerialize(layer, remat: Remat):
    if remat == "none":
        return layer
    kept = {"dots": (_PRODUCT, KERNEL), "attention": (KERNEL,), "full": ()}[remat]
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def abstract_decoder(architecture: Architecture) -> Decoder:
    """The decoder with shapes in place of arrays: costs no memory."""
    return jax.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0)))


def leaf_name(path: tuple) -> str:
    """The dotted name of a decoder leaf ("layers.q_proj.kernel") from its pytree path."""
    return ".".join(key.name for key in path if getattr(key, "name", "value") != "value")
