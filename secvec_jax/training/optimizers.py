"""optax optimizers from settings."""

import re
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib

from secvec_jax.config import Training
from secvec_jax.training.stochastic_rounding import rounded_weights, scale_by_adam_in_bfloat16
from secvec_jax.trees import Tree

_UNDECAYED = re.compile(r"(^|[._])(bias|norm)($|[._])")
"""Norms and biases, by a part of their name."""


def make_optimizer(training: Training, steps: int) -> optax.GradientTransformation:
    """The optimizer and its schedule over `steps` steps. Unset settings of `training` are those of `Training.base`.

    Weight decay leaves norms and biases alone, as transformers' Trainer does; with sgd it is added to the gradient,
    after it is clipped, as torch's SGD does.

    Learning rates of adamw suit adafactor and muon, whose steps are of the same size: adafactor's are not relative to
    the weights, and muon's are scaled (Liu et al. 2025, arXiv 2502.16982). Muon is for the matrices inside the layers;
    the other weights are updated by adamw. Equal settings give the same object, so that trainings can share a step: see
    `step.make_train_step`.
    """
    training = training.over(Training.base)
    in_bfloat16 = training.trained_weights == "bfloat16"
    return _optimizer(
        training.optimizer,
        (training.learning_rate, training.schedule, min(training.warmup_steps, steps - 1), steps),
        training.momentum,
        training.weight_decay,
        training.max_grad_norm,
        in_bfloat16,
        training.seed if in_bfloat16 or training.optimizer == "adamw-bf16" else 0,
    )


def learning_rate_at(training: Training, steps: int, step: int) -> float:
    """The learning rate of a step, counted from 1, of a training of `steps` steps, as `make_optimizer` applies it."""
    training = training.over(Training.base)
    warmup = min(training.warmup_steps, steps - 1)
    return float(_learning_rates(training.learning_rate, training.schedule, warmup, steps)[step - 1])


@lru_cache(maxsize=8)
def _learning_rates(learning_rate: float, schedule: str, warmup: int, steps: int) -> np.ndarray:
    """The learning rate of every step, `[steps]`: computed one by one, they would cost each step a few milliseconds."""
    rates = jax.jit(_schedule(learning_rate, schedule, warmup, steps))
    return np.broadcast_to(rates(np.arange(steps)), steps)


@lru_cache(maxsize=32)
def _optimizer(
    name: str,
    schedule: tuple[float, str, int, int],
    momentum: float,
    weight_decay: float,
    max_grad_norm: float,
    in_bfloat16: bool,
    seed: int,
) -> optax.GradientTransformation:
    rate = _schedule(*schedule)
    if name == "sgd":
        transform = optax.sgd(rate, momentum=momentum or None)
        if weight_decay:
            transform = optax.chain(optax.add_decayed_weights(weight_decay, decayed), transform)
    elif name == "adamw":
        mask = decayed if weight_decay else None
        transform = optax.adamw(rate, weight_decay=weight_decay, mask=mask)
    elif name == "muon":
        transform = optax.contrib.muon(
            rate,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=_stacked_matrices,
            consistent_rms=0.2,
        )
    else:
        scaled = _scale_by_adafactor() if name == "adafactor" else scale_by_adam_in_bfloat16(seed=seed)
        decay = [optax.add_decayed_weights(weight_decay, decayed)] if weight_decay else []
        transform = optax.chain(scaled, *decay, optax.scale_by_learning_rate(rate))
    if max_grad_norm:
        transform = optax.chain(optax.clip_by_global_norm(max_grad_norm), transform)
    return rounded_weights(transform, seed) if in_bfloat16 else transform


def _scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018) without momentum, its steps not relative to the weights."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _stacked_matrices(params: Tree) -> Tree:
    """Which axes of each matrix of the layers, `[L, in, out]`, muon orthogonalizes; None for other weights."""

    def axes(leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        return optax.contrib.MuonDimensionNumbers(1, 2) if leaf.ndim == 3 else None

    return jax.tree.map(axes, params)


@lru_cache(maxsize=32)
def _schedule(learning_rate: float, schedule: str, warmup: int, steps: int) -> optax.Schedule:
    """A linear warm-up to the learning rate, then its decay to a tenth."""
    rest = max(steps - warmup, 1)
    fall = {
        "cosine": optax.cosine_decay_schedule(learning_rate, rest, alpha=0.1),
        "linear": optax.linear_schedule(learning_rate, 0.1 * learning_rate, rest),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule]
    # A warm-up from zero would waste the first step.
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, max(warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])


def decayed(params: Tree) -> Tree:
    """Which leaves weight decay applies to, by their names: all but norms and biases."""

    def by_name(path: tuple[Any, ...], leaf: Any) -> bool:
        names = (getattr(key, "name", getattr(key, "key", "")) for key in path)
        return not any(_UNDECAYED.search(str(name)) for name in names)

    return jax.tree_util.tree_map_with_path(by_name, params)
