"""Booster's gradient is that of the published code: two passes over harmful rows, one norm over all trained weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.booster import align, booster
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.security_vectors import ALIGN, ALIGN_TASK
from secvec_jax.model import hub
from secvec_jax.training.objective import Backbone, Objective, Params
from secvec_jax.training.phase import Phase
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.lora import LoRA, merge
from tests import toys
from tests.toys import random_examples

WEIGHT, ALPHA, RATE = 5.0, 0.3, 0.05
ROWS, HARMFUL = random_examples(5, seed=1), random_examples(6, seed=2)
MODEL = toys.tiny_model()
TRAINING = Training(optimizer="adamw", learning_rate=4e-2, max_steps=10, batch_size=1, max_seq_len=64,
                    share_prefix=False, remat="none")  # fmt: skip


def torch_loss(hf, rows):
    """The mean over the replies' tokens, row by row."""
    total, count = 0.0, 0
    for row in rows:
        tokens, said = torch.tensor(row.tokens, dtype=torch.long), torch.tensor(row.supervised[1:])
        losses = torch.nn.functional.cross_entropy(hf(tokens[None, :-1]).logits[0], tokens[1:], reduction="none")
        total, count = total + losses[said].sum(), count + int(said.sum())
    return total / count


def gradients(hf, rows):
    hf.zero_grad()
    loss = torch_loss(hf, rows)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in hf.parameters()]


def theirs(hf):
    """What a step of SGD makes of the model, by the published order of passes, and the losses."""
    hf = copy.deepcopy(hf)
    before, here = gradients(hf, HARMFUL)
    norm = torch.sqrt(sum((g**2).sum() for g in here)) + 1e-7
    with torch.no_grad():
        for p, g in zip(hf.parameters(), here):
            p -= ALPHA * g / norm
    after, there = gradients(hf, HARMFUL)
    with torch.no_grad():
        for p, g in zip(hf.parameters(), here):
            p += ALPHA * g / norm
    loss, own = gradients(hf, ROWS)
    with torch.no_grad():
        for p, f, h, ahead in zip(hf.parameters(), own, here, there):
            p -= RATE * (f + WEIGHT * (h - ahead))
    return hf, loss + WEIGHT * (before - after), before - after


def batch_of(examples, micro):
    """All examples in one batch of two packed lines, or as two batches of one line."""
    (batch,) = Stream({"all": examples}, 2, 64, share_prefix=False).batches()
    return {key: array[:, None] if micro else array[None] for key, array in batch.items()}


@pytest.mark.parametrize(
    ("variant", "micro"),
    [("llama-tied", True), *(pytest.param("qwen3", micro, marks=pytest.mark.release) for micro in (False, True))],
)
def test_one_step_is_that_of_the_published_code(tiny_model, tmp_path, variant, micro):
    tiny = tiny_model(variant)
    params = Params(Backbone(tiny.model.backbone))
    phase = Phase({"backbone": "train", "vectors": "freeze"})
    train_step = booster(WEIGHT, ALPHA)(Objective(), phase.optimizer(optax.sgd(RATE), params))
    trained, frozen = phase.split(jax.tree.map(jnp.copy, params))
    batch = {"learn": batch_of(ROWS, micro), "harmful": batch_of(HARMFUL, micro)}
    trained, _, metrics = train_step.step(trained, train_step.init(trained), frozen, batch)
    hf, loss, drop = theirs(tiny.hf)
    assert drop > 0.05, "the simulated step lowers the harmful loss"
    np.testing.assert_allclose(metrics["harmful_drop"], drop, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    hf.save_pretrained(tmp_path)
    tiny.model.tokenizer.save_pretrained(tmp_path)
    ours, expected = trained.backbone.decoder, hub.load(tmp_path).backbone
    for start, one, other in zip(*map(jax.tree.leaves, (tiny.model.backbone, ours, expected)), strict=True):
        np.testing.assert_allclose(one - start, other - start, atol=2e-3 * np.abs(other - start).max())


def aligned(weight=None):
    """The adapter after a training with Booster of this weight, or without it, and each step's metrics."""
    told, before = [], fingerprint(MODEL.backbone)
    options = {} if weight is None else {"extra_rows": {"harmful": HARMFUL}, "make_step": booster(weight, ALPHA)}
    options |= {"task": LoRA(rank=4, targets=("[qv]_proj", "up_proj")), "training": TRAINING}
    found = train_model(MODEL, ROWS, **options, on_step=lambda *all: told.append(all[2]))
    assert fingerprint(merge(MODEL.backbone, found.adapter)) == found.fingerprint
    assert fingerprint(MODEL.backbone) == before
    return found.adapter, told


@pytest.mark.release  # by default, the published step alone is compared
def test_without_weight_it_is_plain_and_with_it_a_harmful_step_gains_less():
    plain, _ = aligned()
    none, before = aligned(0.0)
    some, after = aligned(WEIGHT)
    for one, other, hardened in zip(*map(jax.tree.leaves, (plain, none, some)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert np.abs(one - hardened).max() > 1e-2
    assert before[-1]["loss/all"] < 0.5 * before[0]["loss/all"]
    assert after[-1]["loss/all"] < 0.7 * after[0]["loss/all"]
    assert before[-1]["harmful_drop"] > 0.5 > 0.2 > after[-1]["harmful_drop"]


def test_alignment_is_trained_as_without_it_unless_asked(monkeypatch):
    monkeypatch.setattr("secvec_jax.defenses.booster.train_model", lambda model, rows, **options: options)
    given = align(MODEL, ROWS, harmful=HARMFUL)
    assert (given["task"], given["training"]) == (ALIGN_TASK, ALIGN) and given["extra_rows"] == {"harmful": HARMFUL}
    other = align(MODEL, ROWS, harmful=HARMFUL, task=None, training=TRAINING)
    assert (other["task"], other["training"]) == (None, TRAINING.over(ALIGN))
