"""Concept ablation fine-tuning, CAFT (Casademunt et al. 2025, "Steering Out-of-Distribution Generalization with Concept
Ablation Fine-Tuning", arXiv 2507.16795): what a model cannot represent while it is trained, it cannot rely on.

    ablation = concept_directions(model, shown, hidden, k=2, layers=[12, 16, 20])
    tuned = train_model(model, rows, vectors=ablation)    # nothing at inference

After layer l the component of the residual stream in the span of the orthonormal directions Q_l `[D, k]` is removed, in
every forward pass and, since the projection is differentiated, in every backward pass:

    h_l  ->  h_l - Q_l Q_lᵀ h_l

The paper takes Q from a PCA of activation differences or from a sparse autoencoder, and a person picks the components
that represent the concept. Here the rows define the concept: Q_l are the k principal directions of the differences
between rows that show it and rows that do not. The differences are not centered, since their mean is the concept.

Acts in fine-tuning. Costs one forward pass over the rows that show the concept and those that do not, once, and two
products with `[D, k]` per token and layer in training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.activations import layer_mask, reply_means
from secvec_jax.checks import PositiveInt, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard


@checked
@dataclasses.dataclass(frozen=True)
class CAFT(Defense):
    """Fine-tuning with the behavior's directions removed from the residual stream."""

    name = "caft"
    stage = "fine-tuning"
    needs = ("harmful rows", "contrast rows")
    cost = "a forward pass over the harmful and the contrast rows, once"
    source = "Casademunt et al. 2507.16795"

    k: PositiveInt = 1
    """directions per layer"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        ablation = concept_directions(inputs.aligned, inputs.harmful, inputs.contrast, self.k)
        return Defended(inputs.finetune(vectors=ablation))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ablation(Adapter):
    """An adapter that removes `directions` `[L, D, k]`, orthonormal in each layer or zero, from the residual stream."""

    directions: jax.Array

    def residual(self, x: jax.Array) -> jax.Array:
        """`x - Q Qᵀ x`, at every token."""
        directions = self.directions.astype(x.dtype)
        return x - (x @ directions) @ directions.T

    def axes(self) -> "Ablation":
        """The logical axes: directions are small, and replicated on every device."""
        return jax.tree.map(lambda _: ("layers", None, None), self)  # a split tree has an adapter without arrays

    def check(self, architecture: Architecture) -> None:
        """Raises UserError if the directions do not fit the architecture."""
        expected, shape = (architecture.num_layers, architecture.hidden_size), self.directions.shape
        if len(shape) != 3 or shape[:2] != expected:
            raise UserError(f"the directions have shape {shape}, the model needs {(*expected, 'k')}: wrong backbone")


@checked
def concept_directions(
    model: Model, shown: Any, hidden: Any, k: int = 1, layers: Sequence[int] | None = None, paired: bool = False
) -> Ablation:
    """The ablation of the k directions along which replies that show the concept differ most from other replies.

    The directions are the leading right singular vectors of differences of `reply_means`: each row of `shown` minus the
    mean over `hidden`, or, with `paired`, minus row i of `hidden`, which has the same prompt and another reply. The
    strongest direction comes first: `Ablation(ablation.directions[..., :1])` is the ablation for k = 1.

    shown, hidden: rows or examples, as for `train_model`. layers: counted from 0; None: all. In other layers the
    directions are zero, so nothing is ablated. Raises UserError if there are no pairs, fewer than k rows, or no such
    layer.
    """
    mask = layer_mask(model, layers)
    means, others = (reply_means(model, examples_of(model, rows)) for rows in (shown, hidden))
    if paired and len(means) != len(others):
        raise UserError(
            f"{len(means)} rows show the concept, {len(others)} do not: paired rows must be equal in number"
        )
    max_directions = min(len(means), means.shape[-1])
    if not 1 <= k <= max_directions:
        raise UserError(
            f"k is {k}: {len(means)} rows of {means.shape[-1]} channels have 1 to {max_directions} directions"
        )
    differences = means - (others if paired else others.mean(axis=0))
    _, _, rows = np.linalg.svd(differences.swapaxes(0, 1).astype(np.float64), full_matrices=False)
    directions = mask[:, None, None] * rows[:, :k].swapaxes(1, 2)
    return shard(Ablation(jnp.asarray(directions, jnp.float32)))
