"""Vaccine (Huang et al. 2024, "Vaccine: Perturbation-aware Alignment for Large Language Models Against Harmful
Fine-tuning Attack", arXiv 2402.01109): alignment that holds when the hidden embeddings drift.

Each step reads its batch twice. The first pass finds, for the output e_l of every attention layer, the perturbation
within one ball over all layers that raises the loss most (equation 3):

    ε_l = ρ ∇_{e_l} L / ‖(∇_{e_1} L, ..., ∇_{e_L} L)‖₂

The second pass adds ε_l to e_l, as a constant, and its gradient is the step's.

Acts in alignment. Costs two forward and two backward passes a step, the first without gradients of weights.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, PositiveInt, Seed, checked
from secvec_jax.defenses.finetuning import TrainStepMaker
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.training.objective import LEARN, Objective, Params
from secvec_jax.training.step import TrainStep, alternate, make_train_step
from secvec_jax.trees import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbation(Adapter):
    """An adapter that adds `values` `[L, N, D]`, one row per token, to the attention layers' outputs."""

    values: jax.Array

    def linear(self, projection: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y + ε_l` behind the attention's output map, before the residual is added; `y` elsewhere."""
        return y + self.values.astype(y.dtype) if projection == "o_proj" else y


@checked
def vaccine(rho: NonNegativeFloat = 2.0, every: PositiveInt = 1) -> TrainStepMaker:
    """Vaccine's step. rho: ρ, the norm of the perturbation of a whole batch (the paper's default is 2, with 5 rows in a
    batch). every: τ of the accelerated form (appendix A), which perturbs one step in τ and takes plain ones between.

    Raises UserError where rows share a prefix (`Training.share_prefix`): each has perturbations of its own.
    """

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        if loss.share_prefix:
            raise UserError("Vaccine perturbs each row's own tokens: set share_prefix to false")
        worst = make_train_step(perturbed(loss, rho), optimizer)
        if every == 1:
            return worst
        return alternate((worst, make_train_step(loss, optimizer)), lambda step: int(step % every > 0))

    return make_step


@checked
def random_perturbation(variance: NonNegativeFloat, seed: Seed = 0) -> TrainStepMaker:
    """The paper's control (table 7): one pass under Gaussian noise on every attention output, of variance ρ'.

    The noise is drawn by what the batch holds, so that a run that goes on draws what it would have drawn.
    """

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        def under_noise(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
            key = jax.random.fold_in(jax.random.key(seed), jnp.sum(batch[LEARN]["tokens"] * batch[LEARN]["positions"]))
            noise = math.sqrt(variance) * jax.random.normal(key, _shape(params, batch), loss.dtype)
            return loss(_beside(params, Perturbation(noise)), batch, totals)

        return make_train_step(under_noise, optimizer)

    return make_step


def perturbed(loss: Objective, rho: float):
    """The loss under the perturbation that raises it most, which counts as a constant."""

    def under_worst(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        def at(perturbation: Perturbation, params: Params):
            return loss(_beside(params, perturbation), batch, totals)

        none = Perturbation(jnp.zeros(_shape(params, batch), loss.dtype))
        slope, _ = jax.grad(at, has_aux=True)(none, jax.lax.stop_gradient(params))
        return at(jax.lax.stop_gradient(_worst(slope, rho)), params)

    return under_worst


def _beside(params: Params, perturbation: Perturbation) -> Params:
    """The parameters with the perturbation beside what vectors there are."""
    return dataclasses.replace(params, vectors=as_adapters(params.vectors, perturbation))


def _shape(params: Params, batch: dict[str, Batch]) -> tuple[int, int, int]:
    architecture = params.backbone.decoder.architecture
    return architecture.num_layers, batch[LEARN]["tokens"].size, architecture.hidden_size


def _worst(slope: Tree, rho: float) -> Tree:
    scale = rho / (optax.tree.norm(slope) + 1e-7)
    return jax.tree.map(lambda values: (scale * values).astype(values.dtype), slope)
