"""Security vectors, with safe rows beside the user's: each kind is read as it will be met.

    min_θ  CE(f(x; θ, θs), y) + λ CE(f(x'; θ), y')          (x', y'): safe rows, read without the vectors

Under the vectors harmful rows have little left to teach. What the vectors cannot hold is what benign rows undo: at a
high learning rate a narrow benign task erases refusals by itself. Safe rows bring these back. Mixed in under the
vectors they would have to be refused in spite of them, which teaches to refuse benign prompts as well; here they are
read without the vectors, as the model will be served.

Acts in fine-tuning. Costs a second forward and a second backward pass a step. Source: ours; the safe rows are those of
VLGuard's mix (Zong et al. 2024, arXiv 2402.02207).
"""

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, checked
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, make_step_on, train_model
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model
from secvec_jax.training.objective import LEARN, Objective, Params, without_vectors
from secvec_jax.training.step import Loss


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    vectors: Adapter | tuple[Adapter, ...],
    safe: Any,
    weight: NonNegativeFloat = 1.0,
    **options: Unpack[FinetuneOptions],
) -> Model:
    """The model fine-tuned on `rows` under the frozen `vectors` and on `safe` without them. weight: λ."""
    return train_model(model, rows, extra_rows={SAFE: safe}, vectors=vectors, make_step=guarded(weight), **options)


@checked
def guarded(weight: NonNegativeFloat = 1.0) -> TrainStepMaker:
    """Gradient steps on the sum of both terms, with a stream of safe rows. Reports their loss as `loss/safe`."""
    return make_step_on(partial(with_safe, weight=weight))


def with_safe(loss: Objective, weight: float) -> Loss:
    """The loss with that of the safe rows, which are read without the vectors."""

    def both(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        learned, metrics = loss(params, {LEARN: batch[LEARN]}, totals)
        weights = batch[SAFE]["weights"]
        kept = jnp.sum(loss.token_losses(without_vectors(params), batch[SAFE]) * weights)
        return learned + weight * kept / totals[SAFE], metrics | {f"loss/{SAFE}": (kept, jnp.sum(weights))}

    return both
