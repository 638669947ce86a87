"""Ablation is h - Q Qᵀ h forward and backward, as with hooks in torch; Q is where rows that show the concept differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from secvec_jax.activations import reply_means
from secvec_jax.config import Training
from secvec_jax.defenses.caft import Ablation, concept_directions
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.errors import UserError
from secvec_jax.sharding import logical_axes
from secvec_jax.training.objective import Backbone, Objective, Params
from secvec_jax.trees import distance
from tests.toys import random_examples, tiny_model

SHOWN, HIDDEN = random_examples(6, seed=1), random_examples(6, seed=2)


def random_directions(layers=2, k=3):
    bases = np.random.default_rng(0).normal(size=(layers, 32, k))
    return np.linalg.qr(bases)[0].astype(np.float32)


@pytest.fixture
def batch():
    """Two rows of 12 tokens, the last 5 and 3 learned."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 320, (2, 13)).astype(np.int32)
    weights = np.zeros((2, 12), np.float32)
    weights[0, -5:] = weights[1, -3:] = 1
    ones = np.ones((2, 12), np.int32)
    learn = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "groups": 0 * ones,
             "segments": ones, "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))}  # fmt: skip
    return {"learn": learn}


@pytest.mark.parametrize("ablated", [pytest.param((0, 1), marks=pytest.mark.release), (1,)])
def test_loss_and_gradient_are_those_of_hooks(tiny_model, batch, ablated):
    tiny = tiny_model("llama")
    directions = random_directions()
    directions[[layer for layer in range(2) if layer not in ablated]] = 0
    learn = {name: torch.tensor(np.asarray(array)).long() for name, array in batch["learn"].items()}

    def without(q):
        def hook(module, inputs, out):
            h = out[0] if isinstance(out, tuple) else out
            h = h - h @ q @ q.T
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook

    hooks = [tiny.hf.model.layers[at].register_forward_hook(without(torch.tensor(directions[at]))) for at in ablated]
    tiny.hf.zero_grad()
    mask = learn["weights"] > 0
    theirs = torch.nn.functional.cross_entropy(tiny.hf(learn["tokens"]).logits[mask], learn["targets"][mask])
    theirs.backward()
    for hook in hooks:
        hook.remove()
    expected = tiny.hf.model.layers[0].mlp.up_proj.weight.grad.T.numpy()

    params = Params(Backbone(tiny.model.backbone), Ablation(directions))
    totals = {"learn": jnp.float32(8)}
    (ours, _), gradient = jax.value_and_grad(Objective(), has_aux=True)(params, batch, totals)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    found = gradient.backbone.decoder.layers.mlp.up_proj.kernel[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    plain = Objective()(Params(Backbone(tiny.model.backbone)), batch, totals)[0]
    assert abs(float(plain - ours)) > 1e-2


def test_nothing_is_left_in_the_span():
    model, directions = tiny_model(), random_directions()
    directions[0] = 0
    before, after = reply_means(model, SHOWN), reply_means(model, SHOWN, Ablation(directions))
    np.testing.assert_allclose(after[:, 0], before[:, 0], atol=1e-5)
    np.testing.assert_allclose(after[:, 1] @ directions[1], 0, atol=1e-5)
    rest = np.eye(32) - directions[1] @ directions[1].T
    np.testing.assert_allclose(after[:, 1], before[:, 1] @ rest, atol=1e-4)


@pytest.mark.parametrize("paired", [True, False])
def test_directions_are_the_leading_ones_of_the_uncentered_differences(paired):
    model = tiny_model()
    hidden = HIDDEN if paired else HIDDEN[:4]
    found = concept_directions(model, SHOWN, hidden, k=2, paired=paired).directions
    shown, others = reply_means(model, SHOWN), reply_means(model, hidden)
    for layer in range(2):
        rows = [a - b for a, b in zip(shown, others)] if paired else [a - others.mean(axis=0) for a in shown]
        moment = sum(np.outer(row[layer], row[layer]) for row in rows)
        _, vectors = np.linalg.eigh(moment.astype(np.float64))
        expected = vectors[:, [-1, -2]]
        np.testing.assert_allclose(np.abs(found[layer].T @ expected), np.eye(2), atol=1e-4)
        np.testing.assert_allclose(found[layer].T @ found[layer], np.eye(2), atol=1e-5)


def test_the_mean_difference_is_taken_out():
    """One pair: the only direction is the difference itself, which centering would lose."""
    model = tiny_model()
    found = concept_directions(model, SHOWN[:1], HIDDEN[:1], layers=[1]).directions
    difference = (reply_means(model, SHOWN[:1]) - reply_means(model, HIDDEN[:1]))[0, 1]
    np.testing.assert_allclose(np.abs(found[1, :, 0] @ difference), np.linalg.norm(difference), rtol=1e-5)
    assert found.shape == (2, 32, 1) and not found[0].any()


def test_a_model_is_trained_under_an_ablation_and_served_without():
    model = tiny_model()
    training = Training(learning_rate=1e-2, max_steps=2, batch_size=1, max_seq_len=64)
    ablation = concept_directions(model, SHOWN, HIDDEN, k=2)
    ablated = train_model(model, HIDDEN, vectors=ablation, training=training)
    assert float(distance(ablated.backbone, train_model(model, HIDDEN, training=training).backbone)) > 0
    assert logical_axes({"adapter": ablation}) == [("layers", None, None)]
    assert logical_axes({"adapter": Ablation(None)}) == [], "as in an optimizer's state, where it is frozen"


def test_what_cannot_be_meant_is_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="6 rows show the concept, 5 do not: paired rows"):
        concept_directions(model, SHOWN, HIDDEN[:5], paired=True)
    for k in (0, 7):
        with pytest.raises(UserError, match=f"k is {k}: 6 rows"):
            concept_directions(model, SHOWN, HIDDEN, k=k)
    for shape in ((3, 32, 2), (2, 32)):
        with pytest.raises(UserError, match="wrong backbone"):
            train_model(model, SHOWN, vectors=Ablation(np.zeros(shape, np.float32)))
