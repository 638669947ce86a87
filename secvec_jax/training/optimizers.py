"""optax optimizers from settings."""

import re
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from secvec_jax.config import Training
from secvec_jax.training.stochastic_rounding import rounded_weights, scale_by_adam_in_bfloat16
from secvec_jax.trees import Tree

_UNDECAYED = re.compile(r"(^|[._])(bias|norm)($|[._])")
"""Norms and biases, by a part of their name."""


class ScheduleState(NamedTuple):
    """The step, counted from 0, and the schedule: data, so that trainings that differ in it share compiled programs."""

    step: jax.Array | int
    learning_rate: jax.Array | float
    warmup_steps: jax.Array | int
    steps: jax.Array | int


def make_optimizer(training: Training, steps: int) -> optax.GradientTransformation:
    """The optimizer and its schedule over `steps` steps. Unset settings of `training` are those of `Training.base`.

    Weight decay leaves norms and biases alone, as transformers' Trainer does; with sgd it is added to the gradient,
    after it is clipped, as torch's SGD does.

    Learning rates of adamw suit adafactor and muon, whose steps are of the same size: adafactor's are not relative to
    the weights, and muon's are scaled (Liu et al. 2025, arXiv 2502.16982). Muon is for the matrices inside the layers;
    the other weights are updated by adamw. Equal settings give the same object, and settings that differ only in the
    learning rate, the warm-up and the steps the same `update`, so that trainings can share a step: see
    `step.make_train_step`.
    """
    training = training.over(Training.base)
    in_bfloat16 = training.trained_weights == "bfloat16"
    update_rule = _update_rule(
        training.optimizer,
        training.schedule,
        training.momentum,
        training.weight_decay,
        training.max_grad_norm,
        in_bfloat16,
        training.seed if in_bfloat16 or training.optimizer == "adamw-bf16" else 0,
    )
    return _scheduled(update_rule, training.learning_rate, min(training.warmup_steps, steps - 1), steps)


def learning_rate_at(training: Training, steps: int, step: int) -> float:
    """The learning rate of a step, counted from 1, of a training of `steps` steps, as `make_optimizer` applies it."""
    training = training.over(Training.base)
    warmup_steps = min(training.warmup_steps, steps - 1)
    state = ScheduleState(step - 1, training.learning_rate, warmup_steps, steps)
    return float(_rate(training.schedule, state, np))


@lru_cache(maxsize=32)
def _scheduled(
    update_rule: optax.GradientTransformation, learning_rate: float, warmup_steps: int, steps: int
) -> optax.GradientTransformation:
    """The update rule, whose state has this schedule from the start."""

    def init(params: Tree) -> optax.OptState:
        schedule = _start(learning_rate, warmup_steps, steps)
        return jax.tree.map(
            lambda node: schedule if _is_schedule(node) else node, update_rule.init(params), is_leaf=_is_schedule
        )

    return type(update_rule)(init, update_rule.update)


def _start(learning_rate: float, warmup_steps: int, steps: int) -> ScheduleState:
    return ScheduleState(jnp.int32(0), jnp.float32(learning_rate), jnp.int32(warmup_steps), jnp.int32(steps))


def _is_schedule(node: Any) -> bool:
    return isinstance(node, ScheduleState)


@lru_cache(maxsize=32)
def _update_rule(
    name: str,
    schedule: str,
    momentum: float,
    weight_decay: float,
    max_grad_norm: float,
    in_bfloat16: bool,
    seed: int,
) -> optax.GradientTransformation:
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    decay = [optax.add_decayed_weights(weight_decay, decayed)] if weight_decay else []
    descend = optax.scale_by_learning_rate(1.0)
    if name == "sgd":
        direction = [*decay, *([optax.trace(momentum)] if momentum else []), descend]
    elif name == "muon":
        muon = optax.contrib.muon(
            1.0,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=_stacked_matrices,
            consistent_rms=0.2,
        )
        direction = [muon]
    else:
        scale_by = {
            "adamw": optax.scale_by_adam,
            "adamw-bf16": partial(scale_by_adam_in_bfloat16, seed=seed),
            "adafactor": _scale_by_adafactor,
        }[name]
        direction = [scale_by(), *decay, descend]
    transform = optax.chain(*clip, *direction, _scale_by_schedule(schedule))
    return rounded_weights(transform, seed) if in_bfloat16 else transform


def _scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018) without momentum, its steps not relative to the weights."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _stacked_matrices(params: Tree) -> Tree:
    """Which axes of each matrix of the layers, `[L, in, out]`, muon orthogonalizes; None for other weights."""

    def axes(leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        return optax.contrib.MuonDimensionNumbers(1, 2) if leaf.ndim == 3 else None

    return jax.tree.map(axes, params)


def _scale_by_schedule(schedule: str) -> optax.GradientTransformation:
    """Multiplies the updates by the step's learning rate, computed from its `ScheduleState`."""

    def init(params: Tree) -> ScheduleState:
        del params
        return _start(np.nan, 0, 1)  # `_scheduled` replaces it

    def update(updates: Tree, state: ScheduleState, params: Tree | None = None) -> tuple[Tree, ScheduleState]:
        del params
        rate = _rate(schedule, state)
        return jax.tree.map(lambda leaf: rate.astype(leaf.dtype) * leaf, updates), state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)


def _rate(schedule: str, state: ScheduleState, xp: Any = jnp) -> Any:
    """The learning rate at the state's step: a linear warm-up to the highest, then its decay to a tenth.

    xp: numpy computes it without compiling anything. Not optax's schedules, whose numbers of steps are constants of the
    program.
    """
    # A warm-up from zero would waste the first step.
    rise = (state.step + 1) / (state.warmup_steps + 1)
    steps_of_decay = xp.maximum(state.steps - state.warmup_steps, 1)
    done = xp.clip((state.step - state.warmup_steps) / steps_of_decay, 0.0, 1.0)
    fall = {
        "cosine": 0.1 + 0.9 * 0.5 * (1.0 + xp.cos(np.pi * done)),
        "linear": 1.0 - 0.9 * done,
        "constant": xp.ones_like(done),
    }[schedule]
    return state.learning_rate * xp.where(state.step < state.warmup_steps, rise, fall)


def decayed(params: Tree) -> Tree:
    """Which leaves weight decay applies to, by their names: all but norms and biases."""

    def by_name(path: tuple[Any, ...], leaf: Any) -> bool:
        names = (getattr(key, "name", getattr(key, "key", "")) for key in path)
        return not any(_UNDECAYED.search(str(name)) for name in names)

    return jax.tree_util.tree_map_with_path(by_name, params)
