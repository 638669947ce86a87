"""The surgery of SafeGrad: only a gradient that opposes the alignment gradient is changed, and by its component."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.finetuning import finetune_phase
from secvec_jax.defenses.safegrad import finetune, operated, without_conflict
from secvec_jax.model import hub
from secvec_jax.training.objective import Backbone, Objective, Params
from tests import toys
from tests.toys import random_examples

ROWS, SAFE = random_examples(6, seed=1), random_examples(6, seed=2)
TRAINING = Training(optimizer="adamw", learning_rate=3e-3, max_steps=8, batch_size=1, max_seq_len=64,
                    warmup_steps=0, remat="none", share_prefix=False)  # fmt: skip
MODEL = toys.tiny_model()


@pytest.mark.parametrize(
    ("user", "alignment", "expected"),
    [
        # g_u · g_a = 1 - 4 = -3 and ‖g_a‖² = 5: -3/5 of (1, 2) is taken out of (1, -2).
        ((1.0, -2.0), (1.0, 2.0), (1.6, -0.8)),
        ((3.0, 1.0), (1.0, 2.0), (3.0, 1.0)),
        ((2.0, -1.0), (1.0, 2.0), (2.0, -1.0)),
        ((1.0, -2.0), (0.0, 0.0), (1.0, -2.0)),
    ],
    ids=["opposing", "agreeing", "orthogonal", "no alignment gradient"],
)
def test_the_surgery_by_hand(user, alignment, expected):
    """Over two leaves, whose product and norm are those of one vector."""
    trees = [{"a": jnp.float32(first), "b": jnp.array([[second]])} for first, second in (user, alignment)]
    product, squared = optax.tree.vdot(*trees), optax.tree.vdot(trees[1], trees[1])
    found = operated(*trees, product, squared)
    np.testing.assert_allclose((found["a"], found["b"][0, 0]), expected, rtol=1e-6)


def torch_losses(hf, aligned):
    """The mean cross-entropy over the user's replies, and the mean of torch's own KL over the safe rows'."""
    totals, counts = [0.0, 0.0], [0, 0]
    for index, rows in enumerate((ROWS, SAFE)):
        for row in rows:
            tokens, said = torch.tensor(row.tokens, dtype=torch.long), torch.tensor(row.supervised[1:])
            logits = hf(tokens[None, :-1]).logits[0][said]
            if index:
                with torch.no_grad():
                    reference = aligned(tokens[None, :-1]).logits[0][said].softmax(-1)
                value = torch.nn.KLDivLoss(reduction="sum")(logits.log_softmax(-1), reference)
            else:
                value = torch.nn.functional.cross_entropy(logits, tokens[1:][said], reduction="sum")
            totals[index], counts[index] = totals[index] + value, counts[index] + int(said.sum())
    return [total / count for total, count in zip(totals, counts)]


def gradients_of(value, hf):
    return torch.autograd.grad(value, list(hf.parameters()), retain_graph=True)


def moved(hf, by, folder, tokenizer):
    """A copy of torch's model whose parameters are moved, and ours of it."""
    hf = copy.deepcopy(hf)
    with torch.no_grad():
        for p, change in zip(hf.parameters(), by, strict=True):
            p += change
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hf, hub.load(folder).backbone


def test_the_gradient_is_that_of_torchs_gradients(tiny_model, tmp_path):
    tiny, weight = tiny_model("llama-tied"), 0.5
    hf, tokenizer = tiny.hf, tiny.model.tokenizer
    # An aligned model that is worse at the user's rows: staying close to it opposes learning them.
    back = [0.1 * g for g in gradients_of(torch_losses(hf, hf)[0], hf)]
    aligned, anchor = moved(hf, back, tmp_path / "aligned", tokenizer)
    loss, kl = torch_losses(hf, aligned)
    user, alignment = gradients_of(loss, hf), gradients_of(kl, hf)
    product = sum((u * a).sum() for u, a in zip(user, alignment))
    norms = [torch.sqrt(sum((g**2).sum() for g in gradients)) for gradients in (user, alignment)]
    cosine = product / norms[0] / norms[1]
    assert cosine < -0.1, "there is something to take out"
    combined = [u - product / norms[1] ** 2 * a + weight * a for u, a in zip(user, alignment)]
    _, expected = moved(hf, [g - p for g, p in zip(combined, hf.parameters())], tmp_path / "combined", tokenizer)
    batches = [next(iter(Stream({"all": rows}, 2, 64).batches())) for rows in (ROWS, SAFE)]
    batch = {name: {key: x[None] for key, x in each.items()} for name, each in zip(("learn", "safe"), batches)}
    params = Params(Backbone(tiny.model.backbone), anchor=anchor)
    trained, frozen = finetune_phase(params).split(params)
    gradients, metrics = jax.jit(without_conflict(Objective(), weight))(trained, frozen, batch)
    np.testing.assert_allclose(metrics["loss"], (loss + weight * kl).item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"][0] / metrics["kl"][1], kl.item(), rtol=1e-4)
    np.testing.assert_allclose(metrics["gradient_cosine"], cosine.item(), rtol=1e-3)
    for one, other in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max())


def trained(weight):
    """The metrics of each step."""
    told = []
    on_step = lambda step, steps, metrics: told.append(metrics)  # noqa: E731
    finetune(MODEL, ROWS, safe=SAFE, weight=weight, training=TRAINING, on_step=on_step)
    return told


def test_the_kl_starts_at_0_and_the_users_rows_are_learned():
    both = trained(2.0)
    assert both[0]["kl"] == pytest.approx(0, abs=1e-5) and both[-1]["kl"] > 0.01
    assert both[-1]["loss"] == pytest.approx(both[-1]["loss/all"] + 2 * both[-1]["kl"], rel=1e-5)
    assert both[-1]["loss/all"] < both[0]["loss/all"]


@pytest.mark.release  # by default, the surgery and torch's gradients alone are compared
def test_the_gradient_of_the_kl_keeps_the_model_close_on_safe_rows():
    assert trained(10.0)[-1]["kl"] < 0.5 * trained(0.0)[-1]["kl"]
