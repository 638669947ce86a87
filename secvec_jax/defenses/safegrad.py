"""SafeGrad (Yi et al. 2025, "Gradient Surgery for Safe LLM Fine-Tuning", arXiv 2508.07172): the part of the gradient on
the user's rows that would undo alignment is removed.

    g_u = ∇ L_user(w)        g_a = ∇ KL( p_aligned || p_w ) on alignment rows
    where g_u · g_a < 0:     g_u  <-  g_u - ( g_u · g_a / ‖g_a‖² ) g_a
    the step follows         g_u + λ g_a

The surgery and the KL are the paper's. Ours are: one product over all trained weights; the KL as a mean over the
supervised tokens of the safe rows' replies; and λ = 1, since we have not seen how the authors weigh g_a (λ = 0 is the
surgery alone). The KL and its gradient are 0 at the start, up to rounding, so the first step is a plain one. An
optimizer that rescales each weight's gradient, such as adamw, does not step orthogonally to g_a.

Acts in fine-tuning. Each step costs two forward and one backward pass over as many safe rows, and memory for one more
gradient; where all weights are trained, training also keeps a copy of the decoder.
"""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, train_model
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.model.hub import Model
from secvec_jax.training.loss import token_forward_kl
from secvec_jax.training.objective import LEARN, Objective, Params, anchor_params, without_vectors
from secvec_jax.training.step import Gradient, Loss, Metrics, TrainStep, gradient_of, shared, step_from_gradient
from secvec_jax.trees import Tree


@checked
@dataclasses.dataclass(frozen=True)
class SafeGrad(Defense):
    """Fine-tuning without the part of each gradient that opposes staying close to the aligned model on safe rows."""

    name = "safegrad"
    stage = "fine-tuning"
    needs = ("safe rows",)
    cost = "2 more forward passes and 1 more backward pass per step; a copy of the weights and one more gradient"
    source = "Yi et al. 2508.07172"

    weight: NonNegativeFloat = 1.0
    """λ, weight of the KL's gradient; 0: the surgery alone"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        model = finetune(inputs.aligned, inputs.rows, safe=inputs.safe, weight=self.weight, **inputs.options)
        return Defended(model)


@checked
def finetune(
    model: Model, rows: Any, *, safe: Any, weight: NonNegativeFloat = 1.0, **options: Unpack[FinetuneOptions]
) -> Model:
    """The model fine-tuned on `rows`, without what opposes staying close to `model` without `task` on the `safe` rows.

    weight: λ.
    """
    return train_model(
        model, rows, extra_rows={SAFE: safe}, anchor=model.backbone, make_step=safegrad(weight), **options
    )


@checked
def safegrad(weight: NonNegativeFloat = 1.0) -> TrainStepMaker:
    """Steps along the combined gradient, for an anchor that is the aligned decoder and a stream of safe rows.

    Reports the `kl` on the safe rows, and `gradient_cosine`, the cosine of the two gradients before the surgery (0
    where one of them is 0).
    """

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        return step_from_gradient(without_conflict(loss, weight), optimizer)

    return make_step


@shared
def without_conflict(loss: Objective, weight: float) -> Gradient:
    """The user's gradient after the surgery, plus λ times that of the KL."""
    of_user, of_alignment = gradient_of(loss), gradient_of(safe_kl(loss))

    def gradient(trained: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Metrics]:
        user, metrics = of_user(trained, frozen, {LEARN: batch[LEARN]})
        alignment, of_kl = of_alignment(trained, frozen, {SAFE: batch[SAFE]})
        product, squared = optax.tree.vdot(user, alignment), optax.tree.vdot(alignment, alignment)
        opposing = operated(user, alignment, product, squared)
        cosine = product / jnp.maximum(optax.tree.norm(user) * jnp.sqrt(squared), _TINY)
        metrics |= {"loss": metrics["loss"] + weight * of_kl["loss"], "kl": of_kl["kl"], "gradient_cosine": cosine}
        return jax.tree.map(lambda u, a: u + weight * a, opposing, alignment), metrics

    return gradient


def operated(user: Tree, alignment: Tree, product: jax.Array, squared: jax.Array) -> Tree:
    """The user's gradient without its component against the alignment gradient, if it has one.

    product: of both gradients. squared: ‖g_a‖².
    """
    against = jnp.where(squared > 0, jnp.minimum(product, 0.0) / jnp.maximum(squared, _TINY), 0.0)
    return jax.tree.map(lambda u, a: (u - against * a).astype(u.dtype), user, alignment)


@shared
def safe_kl(loss: Objective) -> Loss:
    """The mean KL(p_aligned || p_w) over the supervised tokens of the safe rows, without vectors."""

    def mean_kl(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        rows, aligned = batch[SAFE], anchor_params(params)
        head, aligned_head = (tree.backbone.decoder for tree in (params, aligned))
        hidden, reference = loss.hidden(without_vectors(params), rows), loss.hidden(aligned, rows)
        divergence = token_forward_kl(head, hidden, aligned_head, reference, rows["weights"])
        kl = jnp.sum(rows["weights"] * divergence)
        return kl / totals[SAFE], {"kl": (kl, jnp.sum(rows["weights"]))}

    return mean_kl


_TINY = float(jnp.finfo(jnp.float32).tiny)
