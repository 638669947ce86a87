"""Which experiments are refused before anything is downloaded, and which models and rows a workspace has."""

import copy
import gc
import weakref

import pytest

from secvec_jax.errors import UserError
from secvec_jax.model.embedded import ALIGNED
from secvec_jax.workspace import workspace as workspace_module
from secvec_jax.workspace.splits import Sizes
from secvec_jax.workspace.workspace import Experiment, Workspace
from tests.toys import tiny_model


def test_a_base_model_is_not_aligned_on_its_own_replies():
    with pytest.raises(UserError, match=r"gemma3-270m is a base model.*train\.py align.*with --no-aligns"):
        Experiment(model="gemma3-270m")
    assert Experiment(model="gemma3-270m", aligns=False).model == "gemma3-270m"


def test_an_aligned_model_is_not_aligned_again():
    with pytest.raises(UserError, match="smollm2-aligned is aligned already: leave out --aligns, or align smollm2"):
        Experiment(model=ALIGNED, aligns=True)
    choices = ((ALIGNED, None), (ALIGNED, False), ("smollm2", None), ("smollm2", True), ("folder", False))
    chosen = [Experiment(model=model, aligns=aligns).aligns_first for model, aligns in choices]
    assert chosen == [False, False, True, True, False]


def test_the_packaged_aligned_model_was_smollm2_before(monkeypatch, tmp_path):
    monkeypatch.setattr(workspace_module, "load", lambda source: source)
    workspace = Workspace(Experiment(model=ALIGNED), tmp_path)
    assert (workspace.base, workspace.aligned) == ("smollm2", ALIGNED)


def test_the_base_model_is_forgotten_once_it_was_evaluated(monkeypatch, tmp_path):
    monkeypatch.setattr(workspace_module, "load", lambda source: copy.copy(tiny_model()))
    monkeypatch.setattr(Workspace, "evaluate", lambda self, model, stage: weakref.ref(model))
    workspace = Workspace(Experiment(model=ALIGNED), tmp_path)
    model = workspace.evaluate_base(None)
    gc.collect()
    assert model() is None


@pytest.mark.parametrize(
    ("settings", "alignment"),
    [
        (Experiment(seed=3, model=ALIGNED), (Sizes(), 0)),
        (Experiment(seed=3, model="folder", aligns=False), None),
        (Experiment(seed=3), None),
    ],
)
def test_rows_leave_out_what_the_packaged_model_was_aligned_with(monkeypatch, tmp_path, settings, alignment):
    monkeypatch.setattr(workspace_module, "load", lambda source: source)
    monkeypatch.setattr(workspace_module, "make_splits", lambda *args, alignment: alignment)
    assert Workspace(settings, tmp_path).splits == alignment
