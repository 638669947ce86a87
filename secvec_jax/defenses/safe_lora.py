"""SafeLoRA (Hsu et al. 2024, "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language
Models", arXiv 2405.16833): what a fine-tuning did is kept where alignment had moved the weights as well.

    safe, where = project(tuned, aligned, base)

For a weight W `[outputs, inputs]` of y = W x let V = W_aligned - W_base, and

    C = V Vᵀ / ‖V‖_F          ΔW = W_tuned - W_aligned          ΔW  ->  C ΔW   where cos(C ΔW, ΔW) <= τ

(C is no projection, since it scales by ‖V‖_F; it is what the paper and its code have.) Our kernels are K = Wᵀ
`[inputs, outputs]` of y = x K, so with V = K_aligned - K_base the same C is Vᵀ V / ‖V‖_F, and stands on the right:
ΔK -> ΔK C. Only the kernels of the linear projections change; norms, biases and embeddings stay as they were tuned.

Acts after fine-tuning, on weights, so whether a LoRA was trained or all of them. No forward or backward passes: two
products of matrices per kernel, and the same again where it is projected. Needs the model from before its alignment.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.checks import Bounds, NonNegativeInt, checked
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import PROJECTIONS
from secvec_jax.model.decoder import Decoder, leaf_name
from secvec_jax.model.hub import Model
from secvec_jax.sharding import constrain, shard

Cosine = Annotated[float, Bounds(at_least=-1, at_most=1)]
Where = list[tuple[str, int]]
"""Projections and layers, such as ("q_proj", 0)."""

_TINY = np.finfo(np.float32).tiny


@checked
def project(
    tuned: Model,
    aligned: Model,
    base: Model,
    threshold: Cosine = 0.5,
    lowest: NonNegativeInt | None = None,
) -> tuple[Model, Where]:
    """The tuned model with its updates projected, and where: at the projections and layers with a cosine of at most
    `threshold`, or, if given, at the `lowest` so many.

    A kernel that the fine-tuning or the alignment left as it was has no cosine, and stays. Raises UserError if the
    models are of different shape.
    """
    found = cosines(tuned, aligned, base)
    order = sorted(found, key=found.__getitem__)
    where = [at for at in order if found[at] <= threshold] if lowest is None else order[:lowest]
    masks = {projection: np.zeros(tuned.architecture.num_layers, bool) for projection, _ in where}
    for projection, layer in where:
        masks[projection][layer] = True

    def replaced(path: tuple, *leaves: jax.Array) -> jax.Array:
        mask = masks.get(_projection(path))
        return leaves[0] if mask is None else _replaced(*leaves, mask)

    trees = (model.backbone for model in (tuned, aligned, base))
    return tuned.with_backbone(shard(jax.tree_util.tree_map_with_path(replaced, *trees))), where


def cosines(tuned: Model, aligned: Model, base: Model) -> dict[tuple[str, int], float]:
    """cos(C ΔW, ΔW) at every projection and layer that both alignment and fine-tuning changed.

    Raises UserError if the models are of different shape.
    """
    if not tuned.architecture == aligned.architecture == base.architecture:
        raise UserError("SafeLoRA compares three states of one model: tuned, aligned and base must be of one shape")
    trees = [_kernels(model.backbone) for model in (tuned, aligned, base)]
    found = {}
    for projection in tuned.architecture.projections:
        for layer, cosine in enumerate(np.asarray(_cosines(*(kernels[projection] for kernels in trees)))):
            if not np.isnan(cosine):
                found[projection, layer] = float(cosine)
    return found


def _kernels(decoder: Decoder) -> dict[str, jax.Array]:
    return {
        _projection(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(decoder)
        if _projection(path) in PROJECTIONS
    }


def _projection(path: tuple) -> str:
    return leaf_name(path).removeprefix("layers.").removesuffix(".kernel")


@jax.jit
def _cosines(tuned: jax.Array, aligned: jax.Array, base: jax.Array) -> jax.Array:
    """`[L]`, not a number where a kernel did not move."""

    def of_layer(kernels: tuple[jax.Array, ...]) -> jax.Array:
        update, projected = _update(*kernels)
        length = jnp.linalg.norm(update)
        # Of an update that C takes away whole it is 0, as in the published code.
        cosine = jnp.sum(update * projected) / jnp.maximum(length * jnp.linalg.norm(projected), _TINY)
        return jnp.where(length > 0, cosine, jnp.nan)

    return constrain(jax.lax.map(of_layer, (tuned, aligned, base)), None)


@jax.jit
def _replaced(tuned: jax.Array, aligned: jax.Array, base: jax.Array, mask: jax.Array) -> jax.Array:
    """`[L, inputs, outputs]`, projected where the mask `[L]` says so, else as tuned."""

    def of_layer(layer: tuple[jax.Array, ...]) -> jax.Array:
        *kernels, chosen = layer
        return jnp.where(chosen, kernels[1] + _update(*kernels)[1], kernels[0])

    return jax.lax.map(of_layer, (tuned, aligned, base, mask))


def _update(tuned: jax.Array, aligned: jax.Array, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's ΔK `[inputs, outputs]`, and ΔK C."""
    update, moved = tuned - aligned, aligned - base
    exact = jax.lax.Precision.HIGHEST  # these are weights, not activations
    projector = jnp.matmul(moved.T, moved, precision=exact) / jnp.linalg.norm(moved)
    return update, jnp.matmul(update, projector, precision=exact)
