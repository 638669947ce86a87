"""Security vectors as low-rank factors (LoRA, Hu et al. 2021), one pytree apart from the backbone.

At every site it was made for, the guest adds `scale * (x A) B` to the frozen map's own output:

    x ──┬── W (backbone) ────────────┬──> y
        └── A [in, r] ── B [r, out] ──┘      B starts at zero: a fresh adapter changes nothing

The factors of all layers are stacked on a leading axis, as the decoder's weights are, and are scanned beside them.
"""

import dataclasses
import fnmatch
import math
from functools import partial

import jax
import jax.numpy as jnp

from secvec_jax.arguments import instance
from secvec_jax.checks import NonZeroFloat, PositiveInt, checked
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import SITES, Architecture
from secvec_jax.model.decoder import SITE_AXES, Decoder, Guest, leaf_name
from secvec_jax.sharding import constrain, shard
from secvec_jax.trees import num_parameters


@checked
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (LoRA, Hu et al. 2021)."""

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
            if not fnmatch.filter(SITES, pattern):
                raise UserError(f"target pattern {pattern!r} matches nothing: the sites are {', '.join(SITES)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def sites(self, architecture: Architecture) -> tuple[str, ...]:
        """The sites of the model that a pattern matches. Raises UserError if there are none."""
        found = tuple(site for site in architecture.sites if any(fnmatch.fnmatch(site, p) for p in self.targets))
        if not found:
            raise UserError(f"targets {', '.join(self.targets)} match nothing: the model has {architecture.sites}")
        return found

    def init(self, architecture: Architecture, key: jax.Array) -> "LoRAVectors":
        """Fresh vectors: A uniform as in PEFT (Kaiming with a = sqrt(5)), B zero, so the logits are unchanged."""
        factors, sites = {}, self.sites(architecture)
        for site, site_key in zip(sites, jax.random.split(key, len(sites))):
            inputs, outputs = architecture.site_shape(site)
            shape = (architecture.num_layers, inputs, self.rank)
            bound = 1 / math.sqrt(inputs)
            factors[site] = {
                "a": jax.random.uniform(site_key, shape, minval=-bound, maxval=bound),
                "b": jnp.zeros((architecture.num_layers, self.rank, outputs)),
            }
        return shard(LoRAVectors(factors, self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAVectors(Guest):
    """Low-rank factors of all layers: site -> {"a": `[L, in, r]`, "b": `[L, r, out]`}, float32."""

    factors: dict[str, dict[str, jax.Array]]
    spec: LoRA = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"LoRAVectors({self.spec!r}, {', '.join(self.factors)}: {num_parameters(self):,} parameters)"

    def linear(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y`, which `kernel` has had its effect on; here the factors get their gradients."""
        factors = self.factors.get(site)
        return y if factors is None else _attached(self.spec.scale, y, x, factors["a"], factors["b"])

    def kernel(self, site: str, kernel: jax.Array) -> jax.Array:
        """`W + scale * A B` at the sites that have factors; called on one layer's slice."""
        factors = self.factors.get(site)
        if factors is None:
            return kernel
        a, b = (jax.lax.stop_gradient(factors[name]) for name in ("a", "b"))
        return _updated(site, self.spec.scale, kernel, a, b)

    def axes(self) -> "LoRAVectors":
        """The logical axes of the factors, in the same tree form; they are small, so only wide sides are spread."""

        def of(path: tuple, _: jax.Array) -> tuple[str, str, str]:
            site, name = path[1].key, path[2].key
            inputs, outputs = ("hidden" if axis == "embed" else axis for axis in SITE_AXES[site])
            return ("layers", inputs, "rank") if name == "a" else ("layers", "rank", outputs)

        return jax.tree_util.tree_map_with_path(of, self)

    def check(self, architecture: Architecture) -> None:
        """Raises UserError if the factors do not fit the architecture."""
        for site, factors in self.factors.items():
            inputs, outputs = architecture.site_shape(site)
            expected = ((architecture.num_layers, inputs, self.spec.rank),
                        (architecture.num_layers, self.spec.rank, outputs))  # fmt: skip
            found = (factors["a"].shape, factors["b"].shape)
            if found != expected:
                raise UserError(f"vectors at {site} have shapes {found}, the model needs {expected}: wrong backbone")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attached(scale: float, y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`y`, with the gradients that `scale * x A B` in it gives to A and B, and to nothing else."""
    return y


def _attach(scale, y, x, a, b):
    trained = a.perturbed or b.perturbed
    return y.value, (x.value, a.value, b.value) if trained else None


def _detach(scale, residuals, slope):
    if residuals is None:
        return slope, None, None, None
    x, a, b = residuals
    inner, outer = slope @ b.astype(x.dtype).T, x @ a.astype(x.dtype)
    return slope, None, scale * _product(x.T, inner), scale * _product(outer.T, slope)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


_attached.defvjp(_attach, _detach, symbolic_zeros=True)


def random_like(vectors: LoRAVectors, key: jax.Array) -> LoRAVectors:
    """The norm-matched random control: Gaussian factors, each layer's update as large as the vectors' own.

    Per site and layer, B is scaled so that the Frobenius norm of the update A B is that of `vectors`. key: such as
    `jax.random.key(0)`. Raises UserError for other arguments.
    """
    instance("vectors", vectors, LoRAVectors, "pass low-rank vectors, as sv.train_vectors(..., sv.LoRA()) returns")
    instance("key", key, jax.Array, "pass a key, such as jax.random.key(0)")
    keys = iter(jax.random.split(key, 2 * len(vectors.factors)))
    factors = {}
    for site, own in vectors.factors.items():
        a, b = (jax.random.normal(next(keys), own[name].shape) for name in ("a", "b"))
        ratio = _update_norm(own["a"], own["b"]) / _update_norm(a, b)
        factors[site] = {"a": a * jnp.sqrt(ratio), "b": b * jnp.sqrt(ratio)}
    return shard(dataclasses.replace(vectors, factors=factors))


def _update_norm(a: jax.Array, b: jax.Array) -> jax.Array:
    """Frobenius norm of each layer's A B, `[L, 1, 1]`, without forming it: tr(Aᵀ A B Bᵀ)."""
    return jnp.sqrt(jnp.einsum("lir,lis,lso,lro->l", a, a, b, b, optimize="optimal"))[:, None, None]


def merge(backbone: Decoder, vectors: LoRAVectors) -> Decoder:
    """The backbone with the vectors' update added to its weights: one model, no guest.

    For a trained task adapter, and to judge a model through its vectors; what is kept of a fine-tuning has none.
    """

    def add(path: tuple, leaf: jax.Array) -> jax.Array:
        site = leaf_name(path).removeprefix("layers.").removesuffix(".kernel")
        factors = vectors.factors.get(site)
        return leaf if factors is None else _merged(site, vectors.spec.scale, leaf, factors["a"], factors["b"])

    return shard(jax.tree_util.tree_map_with_path(add, backbone))


def _updated(site: str, scale: float, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`W + scale * A B`, of one layer or all, spread over the mesh as W is: A B would else lie whole on each device."""
    layers = ("layers",) * (kernel.ndim - 2)
    return kernel + constrain(scale * a @ b, *layers, *SITE_AXES[site])


_merged = jax.jit(_updated, static_argnums=(0, 1))
