"""Security vectors as low-rank factors (LoRA, Hu et al. 2021), in a pytree separate from the backbone.

    vectors = LoRA(rank=8).init(model.architecture, key)
    hidden = model.backbone(tokens, adapters=(vectors,))    # with the vectors
    merged = merge(model.backbone, vectors)                 # a backbone that computes the same

At each target projection with weight W `[in, out]`, factors A `[in, r]` and B `[r, out]` and scale s, LoRA computes

    y  = x W + s (x A) B                          dx = dy Wᵀ + s (dy Bᵀ) Aᵀ
    dA = s xᵀ (dy Bᵀ)    dB = s (x A)ᵀ dy

B starts at zero: a fresh adapter changes nothing. The usual implementation is that formula, with two thin products in
addition to x W. Here the weight is formed first, one layer at a time, inside the scan over layers:

    y  = x (W + s A B)                            dx = dy (W + s A B)ᵀ

That is the same function. For N tokens the thin products cost 2 N r (in + out) FLOPs, and A B costs 2 r in out: less
as soon as N exceeds in out / (in + out), which is half the hidden size where W is square. Training is far beyond that.
More importantly, thin products are bound by memory: each reads or writes all N tokens once more, forward and backward.
And for frozen vectors, as in phase 2, the backward pass has no thin products at all: dx is a single product. It was the
faster form on a CPU and by the compiler's estimate for TPUs (benchmarks/RESULTS.md), so there is only this one.

Autodiff by itself would derive dA and dB from dW = xᵀ dy: an array as large as the frozen weight, by a product as
expensive as x W. So W + s A B is formed from constant factors (`LoRAVectors.kernel`), and an identity on y
whose custom backward pass is the two formulas above hands A and B their gradients (`_with_factor_gradients`). It is
called after the product (`LoRAVectors.linear`), keeps x, A and B, and keeps nothing where the factors are frozen. The
backward pass recomputes W + s A B and x A: stored, they would take as much memory as the backbone.

In decoding, N is the number of rows, and W + s A B would be formed at every token: there, merge (`merge_adapters`).

The factors of all layers are stacked on a leading axis, as the decoder's weights are, and are scanned along with them.
"""

import dataclasses
import fnmatch
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from secvec_jax.arguments import instance
from secvec_jax.checks import NonZeroFloat, PositiveInt, checked
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import PROJECTIONS, Architecture
from secvec_jax.model.decoder import Decoder, leaf_name
from secvec_jax.model.layers import KERNEL_AXES
from secvec_jax.model.quantized import QuantizedKernel, is_quantized, linear_of, with_kernels
from secvec_jax.sharding import constrain, shard
from secvec_jax.trees import distance, num_parameters
from secvec_jax.vectors.origin import Origin, register_vectors


@checked
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (LoRA, Hu et al. 2021); in PEFT's `LoraConfig`: r, lora_alpha, use_rslora, target_modules."""

    rank: PositiveInt = 8
    """rank of the factors"""
    alpha: NonZeroFloat = 16.0
    """the update is scaled by alpha / rank"""
    rslora: bool = False
    """scale by alpha / sqrt(rank) (Kalajdzievski 2023)"""
    targets: tuple[str, ...] = ("*",)
    """patterns of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj; *: all"""

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError('no targets: give at least one pattern, "*" for all linear maps')
        for pattern in self.targets:
            if not fnmatch.filter(PROJECTIONS, pattern):
                raise UserError(
                    f"target pattern {pattern!r} matches nothing: the projections are {', '.join(PROJECTIONS)}"
                )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def projections(self, architecture: Architecture) -> tuple[str, ...]:
        """The projections of the model that a pattern matches. Raises UserError if there are none."""
        matched = tuple(
            projection
            for projection in architecture.projections
            if any(fnmatch.fnmatch(projection, p) for p in self.targets)
        )
        if not matched:
            raise UserError(
                f"targets {', '.join(self.targets)} match nothing: the model has {architecture.projections}"
            )
        return matched

    def init(self, architecture: Architecture, key: jax.Array) -> "LoRAVectors":
        """Fresh vectors: A uniform as in PEFT (Kaiming with a = sqrt(5)), B zero, so the logits are unchanged."""
        factors, projections = {}, self.projections(architecture)
        for projection, projection_key in zip(projections, jax.random.split(key, len(projections))):
            inputs, outputs = architecture.kernel_shape(projection)
            shape = (architecture.num_layers, inputs, self.rank)
            bound = 1 / math.sqrt(inputs)
            factors[projection] = {
                "a": jax.random.uniform(projection_key, shape, minval=-bound, maxval=bound),
                "b": jnp.zeros((architecture.num_layers, self.rank, outputs)),
            }
        return shard(LoRAVectors(factors, self))


@register_vectors
@dataclasses.dataclass(frozen=True)
class LoRAVectors(Adapter):
    """Low-rank factors of all layers: projection -> {"a": `[L, in, r]`, "b": `[L, r, out]`}, float32."""

    factors: dict[str, dict[str, jax.Array]]
    spec: LoRA
    origin: Origin | None = dataclasses.field(default=None, compare=False, repr=False)
    """the model that they were trained on, if it is known"""

    def __repr__(self) -> str:
        return f"LoRAVectors({self.spec!r}, {', '.join(self.factors)}: {num_parameters(self):,} parameters)"

    def linear(self, projection: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y` itself, since `kernel` has already changed the product; in the backward pass, the factors' gradients."""
        factors = self.factors.get(projection)
        if factors is None:
            return y
        return _with_factor_gradients(self.spec.scale, y, x, factors["a"], factors["b"])

    def kernel(self, projection: str, kernel: jax.Array) -> jax.Array:
        """`W + scale * A B` of one layer, with A and B as constants, where the projection has factors."""
        factors = self.factors.get(projection)
        if factors is None:
            return kernel
        a, b = jax.lax.stop_gradient((factors["a"], factors["b"]))
        return _updated_kernel(projection, self.spec.scale, kernel, a, b)

    def axes(self) -> "LoRAVectors":
        """The logical axes of the factors, in the same tree form; they are small: only heads and MLP are sharded."""

        def of(path: tuple, _: jax.Array) -> tuple[str, str, str]:
            projection, name = path[1].key, path[2].key
            inputs, outputs = ("hidden" if axis == "embed" else axis for axis in KERNEL_AXES[projection])
            return ("layers", inputs, "rank") if name == "a" else ("layers", "rank", outputs)

        return jax.tree_util.tree_map_with_path(of, self)

    def check(self, architecture: Architecture) -> None:
        """Raises UserError if the factors do not fit the architecture."""
        for projection, factors in self.factors.items():
            inputs, outputs = architecture.kernel_shape(projection)
            expected = ((architecture.num_layers, inputs, self.spec.rank),
                        (architecture.num_layers, self.spec.rank, outputs))  # fmt: skip
            shapes = (factors["a"].shape, factors["b"].shape)
            if shapes != expected:
                raise UserError(
                    f"vectors at {projection} have shapes {shapes}, the model needs {expected}: wrong backbone"
                )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_factor_gradients(scale: float, y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The identity on `y` `[N, out]`, whose backward pass also gives A and B the gradients of `scale * (x A) B`.

    x `[N, in]`, a `[in, r]`, b `[r, out]`. x gets no gradient here, since it has its full gradient from the product.
    """
    return y


def _forward(scale, y, x, a, b):
    trained = a.perturbed or b.perturbed
    return y.value, (x.value, a.value, b.value) if trained else None


def _backward(scale, residuals, dy):
    if residuals is None:
        return dy, None, None, None
    x, a, b = residuals
    dy_b = dy @ b.astype(x.dtype).T
    x_a = x @ a.astype(x.dtype)
    da = scale * _float32_product(x.T, dy_b)
    db = scale * _float32_product(x_a.T, dy)
    return dy, None, da, db


def _float32_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


# With symbolic zeros, the forward pass learns whether the factors are differentiated at all.
_with_factor_gradients.defvjp(_forward, _backward, symbolic_zeros=True)


def random_like(vectors: LoRAVectors, key: jax.Array) -> LoRAVectors:
    """The norm-matched random control: Gaussian factors whose updates are as large as those of `vectors`.

    At each projection and layer, both factors are scaled so that the Frobenius norm of A B is that of `vectors`.

    key: such as `jax.random.key(0)`. Raises UserError for other arguments.
    """
    instance("vectors", vectors, LoRAVectors, "pass low-rank vectors, as sv.train_vectors(..., sv.LoRA()) returns")
    instance("key", key, jax.Array, "pass a key, such as jax.random.key(0)")
    keys = iter(jax.random.split(key, 2 * len(vectors.factors)))
    factors = {}
    for projection, original in vectors.factors.items():
        a, b = (jax.random.normal(next(keys), original[name].shape) for name in ("a", "b"))
        ratio = _update_norm(original["a"], original["b"]) / _update_norm(a, b)
        factors[projection] = {"a": a * jnp.sqrt(ratio), "b": b * jnp.sqrt(ratio)}
    return shard(dataclasses.replace(vectors, factors=factors, origin=None))


def _update_norm(a: jax.Array, b: jax.Array) -> jax.Array:
    """The Frobenius norm of each layer's A B, `[L, 1, 1]`, as the root of tr(Aᵀ A B Bᵀ): A B is not formed."""
    return jnp.sqrt(jnp.einsum("lir,lis,lso,lro->l", a, a, b, b, optimize="optimal"))[:, None, None]


def merge(backbone: Decoder, vectors: LoRAVectors) -> Decoder:
    """The backbone with `scale * A B` added to its weights: one model, no adapter.

    For a trained task adapter, and to use a model under vectors; a fine-tuned model that is kept has no vectors in it.
    A bfloat16 weight is rounded again; a quantized one keeps the factors separately, unrounded.
    """
    kernels = {}

    def add(path: tuple, leaf: Any) -> Any:
        projection = leaf_name(path).removeprefix("layers.").removesuffix(".kernel")
        factors = vectors.factors.get(projection)
        if factors is None:
            return leaf
        if isinstance(leaf, QuantizedKernel):
            kernels[projection] = leaf.with_update(factors["a"], vectors.spec.scale * factors["b"])
            return leaf
        merged = _merged_kernel(projection, vectors.spec.scale, leaf, factors["a"], factors["b"])
        return merged.astype(leaf.dtype)

    merged = jax.tree_util.tree_map_with_path(add, backbone, is_leaf=lambda node: isinstance(node, QuantizedKernel))
    return shard(with_kernels(merged, kernels) if kernels else merged)


def merge_adapters(backbone: Decoder, adapters: tuple[Adapter, ...]) -> tuple[Decoder, tuple[Adapter, ...]]:
    """The backbone with all LoRA adapters merged into it, and the other adapters.

    For decoding and judging, where the adapted weights would be formed again at each token; merged, they are a copy of
    the adapted kernels in memory. Without LoRA adapters the backbone is returned unchanged. A LoRA adapter is not
    merged if an adapter before it changes kernels in another way, since the order would change.
    """
    others: list[Adapter] = []
    kernels_changed = False
    for adapter in adapters:
        if isinstance(adapter, LoRAVectors) and not kernels_changed:
            backbone = merge(backbone, adapter)
        else:
            others.append(adapter)
            kernels_changed |= type(adapter).kernel is not Adapter.kernel
    return backbone, tuple(others)


def drift(tuned: Decoder, start: Decoder) -> float:
    """The L2 norm of what training changed in the weights, in float32; of quantized weights, of what was merged."""
    if not is_quantized(start.precision):
        return float(distance(tuned, start))
    squares = 0.0
    for projection in start.architecture.projections:
        kernel, before = (linear_of(decoder, projection).kernel for decoder in (tuned, start))
        if kernel.update_a is not None:
            known = 0 if before.update_a is None else before.update_a.shape[-1]
            norms = _update_norm(kernel.update_a[..., known:], kernel.update_b[..., known:, :])
            squares += float(jnp.sum(jnp.square(norms)))
    return math.sqrt(squares)


def _updated_kernel(projection: str, scale: float, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`W + scale * A B` of one layer or of all.

    A B is sharded as W is: without the constraint, every device would hold all of it.
    """
    layers = ("layers",) * (kernel.ndim - 2)
    return kernel + constrain(scale * a @ b, *layers, *KERNEL_AXES[projection])


_merged_kernel = jax.jit(_updated_kernel, static_argnums=(0, 1))
