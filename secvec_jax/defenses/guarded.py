"""Guarded vectors: the user's rows are learned under security vectors, safe rows without them.

    min_θ  CE(f(x; θ, θs), y) + λ CE(f(x'; θ), y')          (x', y'): safe rows, without the vectors

Under the vectors, harmful rows have little left to teach. At a high learning rate that little is enough: with Adam at
3e-4 and half of the rows harmful, models tuned under plain security vectors comply with 24, 3 and 66% of harmful
prompts (docs/results.md). Besides, the benign rows alone turn many refusals into replies that neither refuse nor
comply. Safe rows in every step work against both. If the safe rows were also learned under the vectors, the model would
have to learn to refuse despite them, and would then refuse benign prompts as well; here they are learned without the
vectors, as the model will be served. The settings `under` and `share` separate the effect of the vectors from that of
the safe rows: without the vectors, the same safe rows restore refusals, but the harmful replies are learned as in plain
fine-tuning (docs/results.md, three seeds and more).

Acts in fine-tuning. Each step costs a second forward and a second backward pass. Source: ours; the safe rows are those
of VLGuard's mix (Zong et al. 2024, arXiv 2402.02207).
"""

import dataclasses
from functools import partial
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.batch import Batch
from secvec_jax.checks import Fraction, NonNegativeFloat, PositiveFraction, PositiveInt, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs, Need, lora_of_rank
from secvec_jax.defenses.controls import OTHER_BEHAVIOR, irrelevant_vectors, random_vectors
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, make_step_on, train_model
from secvec_jax.defenses.inputs import select_rows
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model
from secvec_jax.training.objective import LEARN, Objective, Params, without_vectors
from secvec_jax.training.step import Loss, shared


@checked
@dataclasses.dataclass(frozen=True)
class GuardedVectors(Defense):
    """Fine-tuning under security vectors, with safe rows in every step that are learned without them."""

    name = "guarded vectors"
    stage = "fine-tuning"
    needs = ("security vectors", "safe rows")
    cost = "training the vectors, once; 2 forward and 2 backward passes per step"
    source = "ours: security vectors, with safe rows in every step that are learned without them"

    weight: NonNegativeFloat = 1.0
    """λ, weight of the safe rows' loss"""
    rank: PositiveInt = 8
    """rank of the vectors"""
    safe_batch: PositiveFraction = 1.0
    """the safe rows of a step, as a share of the batch size"""
    under: Literal["trained", "none", "random", "irrelevant"] = "trained"
    """ablation: what the user's rows are learned under: the behavior's vectors, nothing, a random adapter of their
    size, or vectors of another behavior (in grids only)"""
    share: Fraction = 1.0
    """ablation: the share of the safe rows that is used; 0: none, as with security vectors alone"""

    @property
    def reads(self) -> tuple[Need, ...]:
        read: list[Need] = [] if self.under == "none" else ["security vectors"]
        return (*read, "safe rows") if self.share else tuple(read)

    @property
    def unusable(self) -> str:
        return OTHER_BEHAVIOR if self.under == "irrelevant" else ""

    @property
    def extra_batch(self) -> float:
        return self.safe_batch if self.share else 0.0

    def apply(self, inputs: DefenseInputs) -> Defended:
        vectors = self._vectors(inputs)
        if not self.share:
            return Defended(inputs.finetune(vectors=vectors))
        safe = inputs.safe
        safe = select_rows(safe, np.arange(max(1, round(self.share * len(safe))))) if self.share < 1 else safe
        model = finetune(
            inputs.aligned,
            inputs.rows,
            vectors=vectors,
            safe=safe,
            weight=self.weight,
            safe_batch=self.safe_batch,
            **inputs.options,
        )
        return Defended(model)

    def _vectors(self, inputs: DefenseInputs) -> Any:
        spec = lora_of_rank(self.rank)
        match self.under:
            case "none":
                return None
            case "random":
                return random_vectors(inputs, spec)
            case "irrelevant":
                return irrelevant_vectors(inputs, spec)
        return inputs.vectors(spec)


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    vectors: Adapter | tuple[Adapter, ...] | None,
    safe: Any,
    weight: NonNegativeFloat = 1.0,
    safe_batch: PositiveFraction = 1.0,
    **options: Unpack[FinetuneOptions],
) -> Model:
    """The model fine-tuned on `rows` under the frozen `vectors` (None: under nothing) and on `safe` without them.

    weight: λ. safe_batch: the batch size of the safe rows, as a share of that of `rows`.
    """
    return train_model(
        model,
        rows,
        extra_rows={SAFE: safe},
        extra_batch=safe_batch,
        vectors=vectors,
        make_step=guarded(weight),
        **options,
    )


@checked
def guarded(weight: NonNegativeFloat = 1.0) -> TrainStepMaker:
    """Gradient steps on the sum of both terms, with a stream of safe rows. Reports their loss as `loss/safe`."""
    return make_step_on(partial(with_safe, weight=weight))


@shared
def with_safe(loss: Objective, weight: float) -> Loss:
    """The loss plus that of the safe rows, which is computed without the vectors."""

    def total(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        user_loss, metrics = loss(params, {LEARN: batch[LEARN]}, totals)
        weights = batch[SAFE]["weights"]
        safe_sum = jnp.sum(loss.token_losses(without_vectors(params), batch[SAFE]) * weights)
        return user_loss + weight * safe_sum / totals[SAFE], metrics | {f"loss/{SAFE}": (safe_sum, jnp.sum(weights))}

    return total
