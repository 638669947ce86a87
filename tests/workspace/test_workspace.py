"""Experiments that cannot give a result are refused before anything is downloaded."""

import pytest

from secvec_jax.errors import UserError
from secvec_jax.workspace.workspace import Experiment


def test_a_base_model_is_not_aligned_on_its_own_replies():
    with pytest.raises(UserError, match=r"gemma3-270m is a base model.*train\.py align.*with --no-aligns"):
        Experiment(model="gemma3-270m")
    assert Experiment(model="gemma3-270m", aligns=False).model == "gemma3-270m"
