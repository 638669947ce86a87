"""Vaccine (Huang et al. 2024, "Vaccine: Perturbation-aware Alignment for Large Language Models Against Harmful
Fine-tuning Attack", arXiv 2402.01109): alignment that holds when the hidden embeddings drift.

Each step reads its batch twice. The first pass finds, for the output e_l of every attention layer, the perturbation
within one ball over all layers that raises the loss most (equation 3):

    ε_l = ρ ∇_{e_l} L / ‖(∇_{e_1} L, ..., ∇_{e_L} L)‖₂

The second pass adds ε_l to e_l, as a constant, and its gradient is the step's.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.config import Training
from secvec_jax.defenses.security_vectors import finetune_phase, forward_settings
from secvec_jax.training.objective import LEARN, Objective, Params
from secvec_jax.training.optimizers import make_optimizer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import Method, descent
from secvec_jax.trees import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A guest that adds `values` `[L, N, D]`, one row per token, to the attention layers' outputs."""

    values: jax.Array

    def linear(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y + ε_l` behind the attention's output map, before the residual is added; `y` elsewhere."""
        return y + self.values.astype(y.dtype) if site == "o_proj" else y

    def kernel(self, site: str, kernel: jax.Array) -> jax.Array:
        """The site's own weight."""
        return kernel


def vaccine_method(
    params: Params, groups: Sequence[str], training: Training, steps: int, rho: float = 2.0
) -> tuple[Phase, Method]:
    """What moves in Vaccine's alignment, and its step: a task adapter where the parameters have one, else the decoder.

    rho: ρ, the norm of the perturbation of a whole batch (the paper's default is 2, with 5 rows in a batch). Rows must
    not share beginnings: each has perturbations of its own.
    """
    phase = finetune_phase(params)
    loss = Objective(tuple(groups), **forward_settings(training))
    return phase, descent(perturbed(loss, rho), phase.optimizer(make_optimizer(training, steps), params))


def perturbed(loss: Objective, rho: float):
    """The loss under the perturbation that raises it most, which counts as a constant."""

    def under_worst(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        def at(perturbation: Perturbation, params: Params):
            return loss({**params, "vectors": perturbation}, batch, totals)

        architecture = params["backbone"]["decoder"].architecture
        shape = (architecture.num_layers, batch[LEARN]["tokens"].size, architecture.hidden_size)
        none = Perturbation(jnp.zeros(shape, loss.dtype))
        slope, _ = jax.grad(at, has_aux=True)(none, jax.lax.stop_gradient(params))
        return at(jax.lax.stop_gradient(_worst(slope, rho)), params)

    return under_worst


def _worst(slope: Tree, rho: float) -> Tree:
    scale = rho / (optax.tree.norm(slope) + 1e-7)
    return jax.tree.map(lambda values: (scale * values).astype(values.dtype), slope)
