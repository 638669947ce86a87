"""The projection is the published one, written here in torch and in its layout: weights [outputs, inputs]."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from secvec_jax.defenses.safe_lora import cosines, project
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import PROJECTIONS
from secvec_jax.model.decoder import leaf_name
from secvec_jax.trees import fingerprint
from tests.toys import ARCHITECTURE, random_decoder, tiny_model

LAYERS = range(2)


def weight(model, projection, layer):
    """As torch has it, `[outputs, inputs]`."""
    layers = model.backbone.layers
    module = layers.attention if hasattr(layers.attention, projection) else layers.mlp
    return torch.tensor(np.asarray(getattr(module, projection).kernel[layer])).T


def published(tuned, aligned, base):
    """Of one weight: the projected one, and the cosine."""
    v = aligned - base
    c = torch.mm(v, v.t()) / torch.norm(v)
    delta = tuned - aligned
    projected = torch.mm(c, delta)
    cosine = torch.nn.functional.cosine_similarity(projected.reshape(1, -1), delta.reshape(1, -1)).item()
    return aligned + projected, cosine


def moved(model, seed, size, rank, projections=PROJECTIONS, layers=LAYERS):
    """Every leaf changed: kernels of some projections and layers by a low-rank update, the rest by noise if none."""
    rng = np.random.default_rng(seed)

    def of(path, leaf):
        projection = leaf_name(path).removeprefix("layers.").removesuffix(".kernel")
        if projection not in PROJECTIONS:
            return leaf + size * rng.normal(size=leaf.shape).astype(np.float32)
        _, inputs, outputs = leaf.shape
        update = rng.normal(size=(2, inputs, rank)) @ rng.normal(size=(2, rank, outputs))
        chosen = np.asarray([projection in projections and layer in layers for layer in LAYERS])[:, None, None]
        return leaf + (size * chosen * update).astype(np.float32)

    return model.with_backbone(jax.tree_util.tree_map_with_path(of, model.backbone))


@pytest.fixture(scope="module")
def models():
    base = tiny_model()
    aligned = moved(base, 1, 0.05, rank=12)
    return moved(aligned, 2, 0.02, rank=2), aligned, base


@pytest.fixture(scope="module")
def expected(models):
    return {(projection, layer): published(*(weight(model, projection, layer) for model in models))
            for projection in PROJECTIONS for layer in LAYERS}  # fmt: skip


def same(found, expected, tuned, projected):
    for (projection, layer), (theirs, _) in expected.items():
        wanted = theirs if (projection, layer) in projected else weight(tuned, projection, layer)
        np.testing.assert_allclose(weight(found, projection, layer), wanted, atol=1e-5)


def test_cosines_are_the_published_ones(models, expected):
    found = cosines(*models)
    assert set(found) == set(expected)
    for at, (_, cosine) in expected.items():
        assert found[at] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_updates_below_the_threshold_are_projected_and_no_others(models, expected, quantile):
    all_cosines = [cosine for _, cosine in expected.values()]
    threshold = float(np.quantile(all_cosines, quantile)) + (1e-4 if quantile else -1e-4)
    wanted = {at for at, (_, cosine) in expected.items() if cosine <= threshold}
    assert len(wanted) == {0.0: 0, 0.5: 7, 1.0: 14}[quantile]
    before = [model.fingerprint for model in models]
    found, where = project(*models, threshold=threshold)
    assert set(where) == wanted and len(where) == len(wanted)
    same(found, expected, models[0], wanted)
    assert [fingerprint(model.backbone) for model in models] == before


def test_the_lowest_are_projected_whatever_the_threshold(models, expected):
    found, where = project(*models, threshold=-1.0, lowest=3)
    assert where == sorted(expected, key=lambda at: expected[at][1])[:3]
    same(found, expected, models[0], where)


def test_all_but_kernels_stay_as_tuned(models):
    found, where = project(*models, threshold=1.0)
    assert len(where) == 14
    for (path, one), (_, tuned) in zip(*(jax.tree_util.tree_leaves_with_path(m.backbone) for m in (found, models[0]))):
        assert ("kernel" in leaf_name(path)) == bool((one != tuned).any())


def test_what_did_not_move_has_no_cosine(models):
    _, aligned, base = models
    tuned = moved(aligned, 2, 0.02, rank=2, projections=("q_proj", "up_proj"), layers=(1,))
    assert set(cosines(tuned, aligned, base)) == {("q_proj", 1), ("up_proj", 1)}
    partly = moved(base, 1, 0.05, rank=12, projections=("q_proj",))
    tuned = moved(partly, 2, 0.02, rank=2)
    found, where = project(tuned, partly, base, threshold=1.0)
    assert set(where) == {("q_proj", 0), ("q_proj", 1)}
    np.testing.assert_array_equal(weight(found, "up_proj", 0), weight(tuned, "up_proj", 0))


def test_an_update_that_alignment_never_made_is_taken_away_whole():
    """V has only the first half of the outputs, ΔW the second."""
    base = tiny_model()

    def add(model, half):
        kernel = model.backbone.layers.mlp.up_proj.kernel
        update = np.zeros(kernel.shape, np.float32)
        update[..., half] = np.random.default_rng(0).normal(size=update[..., half].shape)
        leaves, structure = jax.tree.flatten(model.backbone)
        return model.with_backbone(structure.unflatten([x + update if x is kernel[...] else x for x in leaves]))

    aligned = add(base, slice(32))
    tuned = add(aligned, slice(32, 64))
    assert not torch.equal(weight(tuned, "up_proj", 0), weight(aligned, "up_proj", 0))
    found, where = project(tuned, aligned, base)
    assert set(where) == {("up_proj", 0), ("up_proj", 1)}
    assert fingerprint(found.backbone) == fingerprint(aligned.backbone)


def test_models_of_another_shape_are_refused(models):
    wider = random_decoder(architecture=dataclasses.replace(ARCHITECTURE, intermediate_size=48))
    with pytest.raises(UserError, match="the same shape"):
        project(*models[:2], models[2].with_backbone(wider))
