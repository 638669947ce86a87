"""Vaccine (Huang et al. 2024, "Vaccine: Perturbation-aware Alignment for Large Language Models Against Harmful
Fine-tuning Attack", arXiv 2402.01109): alignment that holds when the hidden embeddings drift.

Each step makes two passes over its batch. The first finds, for the output e_l of every attention layer, the
perturbation that raises the loss most, within one ball over all layers (equation 3):

    ε_l = ρ ∇_{e_l} L / ‖(∇_{e_1} L, ..., ∇_{e_L} L)‖₂

The second pass adds ε_l to e_l, as a constant, and the step takes its gradient.

Acts in alignment. Each step costs two forward and two backward passes, the first without gradients of the weights. Ours
differs from the paper in the data only: in the grid, alignment is one epoch on the first five tokens of each reply.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, PositiveInt, Seed, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import TrainStepMaker, make_step_on, train_model
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.training.objective import LEARN, Objective, Params
from secvec_jax.training.step import Loss, Metrics, Step, TrainStep, alternate, make_train_step, shared
from secvec_jax.trees import Tree


@checked
@dataclasses.dataclass(frozen=True)
class Vaccine(Defense):
    """Plain fine-tuning of a model that was aligned under the worst perturbation of its attention outputs."""

    name = "vaccine"
    stage = "alignment"
    needs = ("base model", "safe rows")
    cost = "an alignment of 2 forward and 2 backward passes per step, once"
    source = "Huang et al. 2402.01109"

    rho: NonNegativeFloat = 2.0
    """ρ, the norm of the perturbation of a whole batch"""
    every: PositiveInt = 1
    """τ: one step in τ is perturbed"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        align = partial(train_model, make_step=vaccine(self.rho, self.every))
        return Defended(inputs.finetune(inputs.align(self.label, align, share_prefix=False)))


@checked
@dataclasses.dataclass(frozen=True)
class RandomPerturbation(Defense):
    """Plain fine-tuning of a model that was aligned under random noise: the control of Vaccine."""

    name = "random perturbation"
    stage = "alignment"
    needs = ("base model", "safe rows")
    cost = "an alignment, once"
    source = "the control of Vaccine"

    variance: NonNegativeFloat = 0.01
    """ρ', the variance of the noise"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        seed = inputs.options["training"].seed
        align = partial(train_model, make_step=random_perturbation(self.variance, seed))
        return Defended(inputs.finetune(inputs.align(self.label, align, share_prefix=False)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perturbation(Adapter):
    """An adapter that adds `values` `[L, N, D]`, one row per token, to the attention layers' outputs."""

    values: jax.Array

    def linear(self, projection: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y + ε_l` after the attention's output projection, before the residual is added; `y` elsewhere."""
        return y + self.values.astype(y.dtype) if projection == "o_proj" else y


@checked
def vaccine(rho: NonNegativeFloat = 2.0, every: PositiveInt = 1) -> TrainStepMaker:
    """Vaccine's train step.

    rho: ρ, the norm of the perturbation of a whole batch (the paper's default is 2, with 5 rows in a batch). every: τ
    of the accelerated form (appendix A), which perturbs one step in τ; the others are plain. Raises UserError if rows
    share a prefix (`Training.share_prefix`), since each row is perturbed separately, and at the first step for several
    micro-batches (`Training.grad_accum_steps`), each of which would have a perturbation of this norm.
    """

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        if loss.share_prefix:
            raise UserError("Vaccine perturbs each row's own tokens: set share_prefix to false")
        worst = make_train_step(perturbed(loss, rho), optimizer)
        worst = TrainStep(worst.init, _of_one_micro_batch(worst.step))
        if every == 1:
            return worst
        return alternate((worst, make_train_step(loss, optimizer)), lambda step: int(step % every > 0))

    return make_step


@shared
def _of_one_micro_batch(step: Step) -> Step:
    """The step, which raises UserError for a batch of several micro-batches."""

    def checked_step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
        if len(batch[LEARN]["tokens"]) > 1:
            raise UserError("Vaccine limits the perturbation of a whole batch: set grad_accum_steps to 1")
        return step(trained, state, frozen, batch)

    return checked_step


@checked
def random_perturbation(variance: NonNegativeFloat, seed: Seed = 0) -> TrainStepMaker:
    """The paper's control (table 7): one pass under Gaussian noise on every attention output, of variance ρ'.

    The noise depends on the content of the batch, so a resumed run draws the same noise.
    """

    return make_step_on(partial(under_noise, variance=variance, seed=seed))


@shared
def under_noise(loss: Objective, variance: float, seed: int) -> Loss:
    """The loss under Gaussian noise on every attention output."""

    def noisy(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(seed), jnp.sum(batch[LEARN]["tokens"] * batch[LEARN]["positions"]))
        noise = math.sqrt(variance) * jax.random.normal(key, _shape(params, batch), loss.dtype)
        return loss(_perturbed_params(params, Perturbation(noise)), batch, totals)

    return noisy


@shared
def perturbed(loss: Objective, rho: float) -> Loss:
    """The loss under the perturbation that raises it most; no gradient goes through the perturbation."""

    def under_worst(params: Params, batch: dict[str, Batch], totals: dict[str, jax.Array]):
        def loss_under(perturbation: Perturbation, params: Params):
            return loss(_perturbed_params(params, perturbation), batch, totals)

        none = Perturbation(jnp.zeros(_shape(params, batch), loss.dtype))
        gradient, _ = jax.grad(loss_under, has_aux=True)(none, jax.lax.stop_gradient(params))
        return loss_under(jax.lax.stop_gradient(_worst_perturbation(gradient, rho)), params)

    return under_worst


def _perturbed_params(params: Params, perturbation: Perturbation) -> Params:
    """The parameters with the perturbation as one more active adapter."""
    return dataclasses.replace(params, vectors=as_adapters(params.vectors, perturbation))


def _shape(params: Params, batch: dict[str, Batch]) -> tuple[int, int, int]:
    architecture = params.backbone.decoder.architecture
    return architecture.num_layers, batch[LEARN]["tokens"].size, architecture.hidden_size


def _worst_perturbation(gradient: Tree, rho: float) -> Tree:
    scale = rho / (optax.tree.norm(gradient) + 1e-7)
    return jax.tree.map(lambda values: (scale * values).astype(values.dtype), gradient)
