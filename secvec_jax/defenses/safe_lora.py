"""SafeLoRA (Hsu et al. 2024, "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language
Models", arXiv 2405.16833): an update is kept only in the directions in which alignment changed the weights.

    safe, projected = project(tuned, aligned, base)

For a weight W `[outputs, inputs]` of y = W x let V = W_aligned - W_base, and

    C = V Vᵀ / ‖V‖_F          ΔW = W_tuned - W_aligned          ΔW  ->  C ΔW   where cos(C ΔW, ΔW) <= τ

(C is not a projection, since it scales by ‖V‖_F; this is the form in the paper and its code.) Our kernels are K = Wᵀ
`[inputs, outputs]` of y = x K, so with V = K_aligned - K_base the same C is Vᵀ V / ‖V‖_F, applied on the right:
ΔK -> ΔK C. Only the kernels of the linear projections change; norms, biases and embeddings stay as fine-tuned.

Acts after fine-tuning, on the weights, whether a LoRA or all weights were trained. Costs no forward or backward passes,
but two matrix products per kernel, and two more for a kernel that is projected. Needs the model before its alignment.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.checks import Bounds, NonNegativeInt, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import PROJECTIONS
from secvec_jax.model.decoder import Decoder, leaf_name
from secvec_jax.model.hub import Model
from secvec_jax.sharding import constrain, shard

Cosine = Annotated[float, Bounds(at_least=-1, at_most=1)]
KernelIds = list[tuple[str, int]]
"""Projections and layers, such as ("q_proj", 0)."""

_TINY = np.finfo(np.float32).tiny


@checked
@dataclasses.dataclass(frozen=True)
class SafeLoRA(Defense):
    """Plain fine-tuning; updates that point away from alignment are then projected onto it."""

    name = "safe lora"
    stage = "after fine-tuning"
    needs = ("base model",)
    cost = "2 matrix products per kernel, once, and 2 more per kernel that is projected"
    source = "Hsu et al. 2405.16833"

    threshold: Cosine = 0.5
    """τ: updates with a cosine of at most τ are projected"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        tuned = inputs.finetune()
        model, projected = project(tuned, inputs.aligned, inputs.base, self.threshold)
        return Defended(model, notes={"projected": float(len(projected))})


@checked
def project(
    tuned: Model,
    aligned: Model,
    base: Model,
    threshold: Cosine = 0.5,
    lowest: NonNegativeInt | None = None,
) -> tuple[Model, KernelIds]:
    """The tuned model with updates projected, and the kernels whose updates were projected.

    These are the ones with a cosine of at most `threshold`, or, if `lowest` is given, the `lowest` ones with the
    smallest cosines. A kernel that fine-tuning or alignment did not change has no cosine and is not projected.

    Raises UserError if the models have different shapes.
    """
    cosine_at = cosines(tuned, aligned, base)
    order = sorted(cosine_at, key=cosine_at.__getitem__)
    projected = [at for at in order if cosine_at[at] <= threshold] if lowest is None else order[:lowest]
    masks = {projection: np.zeros(tuned.architecture.num_layers, bool) for projection, _ in projected}
    for projection, layer in projected:
        masks[projection][layer] = True

    def replaced(path: tuple, *leaves: jax.Array) -> jax.Array:
        mask = masks.get(_projection(path))
        return leaves[0] if mask is None else _replaced(*leaves, mask)

    trees = (model.backbone for model in (tuned, aligned, base))
    return tuned.with_backbone(shard(jax.tree_util.tree_map_with_path(replaced, *trees))), projected


def cosines(tuned: Model, aligned: Model, base: Model) -> dict[tuple[str, int], float]:
    """cos(C ΔW, ΔW) at every projection and layer that both alignment and fine-tuning changed.

    Raises UserError if the models have different shapes.
    """
    if not tuned.architecture == aligned.architecture == base.architecture:
        raise UserError("SafeLoRA compares three states of one model: tuned, aligned and base must have the same shape")
    trees = [_kernels(model.backbone) for model in (tuned, aligned, base)]
    cosine_at = {}
    for projection in tuned.architecture.projections:
        for layer, cosine in enumerate(np.asarray(_cosines(*(kernels[projection] for kernels in trees)))):
            if not np.isnan(cosine):
                cosine_at[projection, layer] = float(cosine)
    return cosine_at


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
    """`[L]`, NaN where a kernel did not change."""

    def of_layer(kernels: tuple[jax.Array, ...]) -> jax.Array:
        update, projected = _update(*kernels)
        length = jnp.linalg.norm(update)
        # An update that C removes entirely has a cosine of 0, as in the published code.
        cosine = jnp.sum(update * projected) / jnp.maximum(length * jnp.linalg.norm(projected), _TINY)
        return jnp.where(length > 0, cosine, jnp.nan)

    return constrain(jax.lax.map(of_layer, (tuned, aligned, base)), None)


@jax.jit
def _replaced(tuned: jax.Array, aligned: jax.Array, base: jax.Array, mask: jax.Array) -> jax.Array:
    """`[L, inputs, outputs]`: projected where the mask `[L]` is true, else as tuned."""

    def of_layer(layer: tuple[jax.Array, ...]) -> jax.Array:
        *kernels, chosen = layer
        return jnp.where(chosen, kernels[1] + _update(*kernels)[1], kernels[0])

    return jax.lax.map(of_layer, (tuned, aligned, base, mask))


def _update(tuned: jax.Array, aligned: jax.Array, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's ΔK `[inputs, outputs]`, and ΔK C."""
    update, alignment = tuned - aligned, aligned - base
    exact = jax.lax.Precision.HIGHEST  # these are weights, not activations
    projector = jnp.matmul(alignment.T, alignment, precision=exact) / jnp.linalg.norm(alignment)
    return update, jnp.matmul(update, projector, precision=exact)
