"""Concept ablation fine-tuning, CAFT (Casademunt et al. 2025, "Steering Out-of-Distribution Generalization with Concept
Ablation Fine-Tuning", arXiv 2507.16795): what a model cannot represent while it is trained, it cannot rely on.

    ablation = concept_directions(model, shown, hidden, k=2, layers=[12, 16, 20])
    tuned = train_model(model, rows, vectors=ablation)    # nothing at inference

Behind layer l the stream loses its part in the span of the orthonormal directions Q_l `[D, k]`, in every forward pass
and, since the projection is differentiated, in every backward pass:

    h_l  ->  h_l - Q_l Q_lᵀ h_l

The paper takes Q from a PCA of activation differences or a sparse autoencoder, and a person picks the components that
mean the concept. Here the rows say what is meant, and Q_l are the k principal directions of the differences of
rows that show it from rows that do not. The differences are not centered: their mean is the concept itself, and would
be lost.

Acts in fine-tuning. Costs one forward pass for each row shown or hidden, and two products of `[D, k]` per token and
layer in training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.activations import layer_mask, reply_means
from secvec_jax.checks import checked
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ablation(Adapter):
    """An adapter that takes `directions` `[L, D, k]`, orthonormal in each layer or zero, out of the residual stream."""

    directions: jax.Array

    def residual(self, x: jax.Array) -> jax.Array:
        """`x - Q Qᵀ x`, at every token."""
        directions = self.directions.astype(x.dtype)
        return x - (x @ directions) @ directions.T

    def axes(self) -> "Ablation":
        """The logical axes: directions are small and lie whole on every device."""
        return jax.tree.map(lambda _: ("layers", None, None), self)  # a frozen adapter is in some trees without arrays

    def check(self, architecture: Architecture) -> None:
        """Raises UserError if the directions do not fit the architecture."""
        expected, found = (architecture.num_layers, architecture.hidden_size), self.directions.shape
        if len(found) != 3 or found[:2] != expected:
            raise UserError(f"the directions have shape {found}, the model needs {(*expected, 'k')}: wrong backbone")


@checked
def concept_directions(
    model: Model, shown: Any, hidden: Any, k: int = 1, layers: Sequence[int] | None = None, paired: bool = False
) -> Ablation:
    """The ablation of the k directions along which replies that show the concept differ most from others; zero, so
    nothing is ablated, outside of `layers`.

    They are the leading right singular vectors of the differences of `reply_means`: of each row of `shown` less the
    mean of those of `hidden`. paired: less row i of `hidden`, the same prompt with another reply, in place of the mean.
    The strongest come first: `Ablation(found.directions[..., :1])` is that of k = 1.

    shown, hidden: rows or examples, as for `train_model`. layers: counted from 0; None: all. Raises UserError if there
    are no pairs, fewer than k rows, or no such layer.
    """
    mask = layer_mask(model, layers)
    means, others = (reply_means(model, examples_of(model, rows)) for rows in (shown, hidden))
    if paired and len(means) != len(others):
        raise UserError(f"{len(means)} rows show the concept, {len(others)} do not: paired rows must be as many")
    if not 1 <= k <= min(len(means), means.shape[-1]):
        raise UserError(f"k is {k}: {len(means)} rows of {means.shape[-1]} channels have from 1 to as many directions")
    differences = means - (others if paired else others.mean(axis=0))
    _, _, rows = np.linalg.svd(differences.swapaxes(0, 1).astype(np.float64), full_matrices=False)
    directions = mask[:, None, None] * rows[:, :k].swapaxes(1, 2)
    return shard(Ablation(jnp.asarray(directions, jnp.float32)))
