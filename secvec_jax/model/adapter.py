"""The adapter protocol: how something outside the decoder changes what its layers compute.

LoRA factors, a steering direction, a soft prompt, Vaccine's perturbation: each is an adapter, an argument of the
forward pass. So whether one is active is not a state of the model, and a new defense needs no new decoder.
"""

from typing import Any

import jax

from secvec_jax.model.kv_cache import KVSegment


class Adapter:
    """Base class of whatever changes the decoder's layers from outside; override the hooks that you need.

    PEFT wraps the model's modules and puts the adapter's parameters inside. Here the model stays as it is. An adapter
    is a pytree whose arrays are all stacked over the model's L layers. The decoder scans over its layers, slices the
    adapter's arrays together with the weights, and calls the hooks on the slice: inside a hook the arrays have lost the
    layer axis. For example, (IA)^3 (Liu et al. 2022) on the MLP, which PEFT calls `IA3Config`:

        @jax.tree_util.register_dataclass
        @dataclasses.dataclass(frozen=True)
        class IA3(Adapter):
            scales: jax.Array                                   # [L, intermediate_size]

            def linear(self, projection, x, y):                 # here self.scales is [intermediate_size]
                return y * self.scales if projection == "up_proj" else y

        sv.logits(model, tokens, vectors=IA3(jnp.ones((num_layers, intermediate_size))))

    The hooks, in the order in which a layer calls them (N = B T tokens):

        kernel(projection, W)      before each projection: its weight `[inputs, outputs]` -> the weight to use
        linear(projection, x, y)   after each projection: input `[N, inputs]`, output `[N, outputs]` -> the new output
        prefix()                   in attention: further keys and values, which every token sees
        residual(x)                after the layer: the residual stream `[B, T, D]` -> the new stream

    `projection` is one of `PROJECTIONS` ("q_proj", ..., "down_proj"). A hook returns an array of the shape and dtype
    that it was given; one that is not overridden returns its argument. Hooks are traced once for all layers, so they
    cannot depend on a layer's number: an adapter of some layers only has neutral values (above, ones) in the slices of
    the others. Several adapters act in the order in which they are passed.

    What the decoder guarantees: without adapters the program is the bare backbone's, bit for bit.

    Optional methods: `axes()`, the `LogicalAxes` of each array in a tree of the same structure, for meshes (without it,
    arrays are replicated on every device); `check(architecture)`, which raises UserError where the arrays do not fit.
    """

    def kernel(self, projection: str, kernel: jax.Array) -> jax.Array:
        """The weight `[inputs, outputs]` to use in place of the projection's own."""
        return kernel

    def linear(self, projection: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """The output `[N, outputs]` to use in place of `y`, which the projection computed from `x` `[N, inputs]`."""
        return y

    def prefix(self) -> KVSegment | None:
        """Keys `[1, K, H, P]` and values `[1, K, P, H]` that every token sees before all others.

        Also called outside of the scan, on the stacked arrays, to learn P.
        """
        return None

    def residual(self, x: jax.Array) -> jax.Array:
        """The residual stream `[B, T, D]` to use after the layer in place of `x`."""
        return x


def as_adapters(*adapters: Any) -> tuple[Adapter, ...]:
    """One flat tuple of adapters, from adapters, (nested) tuples of adapters, and None."""
    flat: list[Adapter] = []
    for item in adapters:
        if isinstance(item, tuple):
            flat += as_adapters(*item)
        elif item is not None:
            flat.append(item)
    return tuple(flat)
