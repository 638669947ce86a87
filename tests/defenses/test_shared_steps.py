"""Trainings by one defense share a train step where their settings are equal, so that a grid compiles it once."""

import optax
import pytest

from secvec_jax.defenses.aligned_kl import aligned_kl
from secvec_jax.defenses.booster import booster
from secvec_jax.defenses.constrained_sft import constrained
from secvec_jax.defenses.ema import ema
from secvec_jax.defenses.ewc import ewc
from secvec_jax.defenses.floor import floored
from secvec_jax.defenses.guarded import guarded
from secvec_jax.defenses.lisa import with_pull
from secvec_jax.defenses.safegrad import safegrad
from secvec_jax.defenses.sbr import sbr
from secvec_jax.defenses.vaccine import random_perturbation, vaccine
from secvec_jax.training.objective import Objective

MAKERS = [aligned_kl, booster, constrained, ema, ewc, floored, guarded, random_perturbation, safegrad, sbr, vaccine]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_step_is_shared_by_trainings_of_equal_settings_alone(make):
    optimizer = optax.sgd(0.1)

    def step_of(setting: float, **objective):
        return make(setting)(Objective(("all",), share_prefix=False, **objective), optimizer).step

    assert step_of(0.5) is step_of(0.5)
    assert len({step_of(0.5), step_of(0.25), step_of(0.5, remat="full")}) == 3


def test_the_optimizer_of_lisa_is_shared_too():
    optimizer = optax.sgd(0.1)
    assert with_pull(optimizer, 1.0, 2, 3) is with_pull(optimizer, 1.0, 2, 3)
    assert len({with_pull(optimizer, *settings) for settings in ((1.0, 2, 3), (0.5, 2, 3), (1.0, 3, 2))}) == 3
