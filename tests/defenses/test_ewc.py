"""EWC is that of the published code: F a sum over batches, no factor 1/2, the penalty once a step."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from secvec_jax.config import Training
from secvec_jax.defenses.ewc import ewc, finetune, fisher, penalty
from secvec_jax.defenses.finetuning import stream_of, train_model
from secvec_jax.model import hub
from secvec_jax.trees import distance, fingerprint
from secvec_jax.vectors.lora import LoRA, merge
from tests import toys
from tests.toys import random_examples

USER, SAFE = random_examples(7, seed=1), random_examples(9, seed=2)
RATE, WEIGHT = 0.05, 30.0
TRAINING = Training(learning_rate=RATE, momentum=0.0, schedule="constant", warmup_steps=0, max_steps=3,
                    epochs=1, batch_size=1, max_seq_len=24, grad_accum_steps=2,
                    remat="none", share_prefix=False)  # fmt: skip
MODEL = toys.tiny_model()


def torch_gradients(hf, batches):
    """The gradients of the mean loss over all batches' tokens, each packed row read by itself."""
    total, count = 0.0, 0
    for batch in batches:
        for line in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][line].max() + 1):
                here = batch["segments"][line] == segment
                tokens, targets = (torch.tensor(batch[k][line][here], dtype=torch.long) for k in ("tokens", "targets"))
                said = torch.tensor(batch["weights"][line][here]) > 0
                losses = torch.nn.functional.cross_entropy(hf(tokens[None]).logits[0], targets, reduction="none")
                total, count = total + losses[said].sum(), count + int(said.sum())
    hf.zero_grad()
    (total / count).backward()
    return [p.grad.clone() for p in hf.parameters()]


def as_backbone(hf, tensors, model, folder):
    """Tensors, one for each of torch's parameters, as our tree."""
    hf = copy.deepcopy(hf)
    with torch.no_grad():
        for p, tensor in zip(hf.parameters(), tensors):
            p.copy_(tensor)
    hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return hub.load(folder).backbone


@pytest.mark.parametrize("variant", ["llama-tied", pytest.param("qwen3", marks=pytest.mark.release)])
def test_fisher_and_steps_are_those_of_the_published_code(tiny_model, tmp_path, variant):
    tiny = tiny_model(variant)
    hf = copy.deepcopy(tiny.hf)
    importance = [torch.zeros_like(p) for p in hf.parameters()]
    batches = list(stream_of(tiny.model, {"all": SAFE}, TRAINING).batches())
    assert len(batches) > 2
    for batch in batches:
        importance = [f + g**2 for f, g in zip(importance, torch_gradients(hf, [batch]))]
    ours = fisher(tiny.model, SAFE, training=TRAINING)
    expected = as_backbone(tiny.hf, importance, tiny.model, tmp_path / "fisher")
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())

    # Each step of the user's takes two batches; the penalty counts once.
    start = [p.detach().clone() for p in hf.parameters()]
    batches = iter(replace(stream_of(tiny.model, {"all": USER}, TRAINING), epochs=None).batches())
    pulls = []
    for _ in range(TRAINING.max_steps):
        gradients = torch_gradients(hf, [next(batches), next(batches)])
        with torch.no_grad():
            held = [2 * WEIGHT * f * (p - w0) for f, p, w0 in zip(importance, hf.parameters(), start)]
            pulls.append(max(float(h.norm() / g.norm()) for h, g in zip(held, gradients)))
            for p, g, h in zip(hf.parameters(), gradients, held):
                p -= RATE * (g + h)
    assert pulls[0] == 0 and max(pulls) > 0.1, "the penalty matters"
    told = []
    moved = finetune(tiny.model, USER, safe=SAFE, weight=WEIGHT, training=TRAINING,
                     on_step=lambda *all: told.append(all[2])).backbone  # fmt: skip
    assert told[0]["penalty"] == 0 < told[-1]["penalty"]
    assert told[-1]["loss"] == pytest.approx(told[-1]["loss/all"] + told[-1]["penalty"], rel=1e-5)
    expected = as_backbone(hf, hf.parameters(), tiny.model, tmp_path / "moved")
    for w0, one, other in zip(*map(jax.tree.leaves, (tiny.model.backbone, moved, expected)), strict=True):
        np.testing.assert_allclose(one - w0, other - w0, atol=2e-3 * np.abs(other - w0).max())


def test_the_penalty_by_hand():
    trained, start = {"a": jnp.array([1.0, 2.0]), "b": None}, {"c": jnp.array([0.5, 4.0])}
    assert float(penalty(trained, 10.0, start, {"f": jnp.array([3.0, 0.25])})) == 10 * (3 * 0.25 + 0.25 * 4)


@pytest.mark.release  # by default, the published steps alone are compared
def test_without_weight_it_is_plain_fine_tuning():
    plain = train_model(MODEL, USER, training=TRAINING)
    none = finetune(MODEL, USER, safe=SAFE, weight=0.0, training=TRAINING)
    for one, other in zip(*(jax.tree.leaves(tree.backbone) for tree in (plain, none)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.release  # by default, the published steps alone are compared
def test_a_large_weight_keeps_a_task_adapter_where_it_was():
    before = MODEL.fingerprint
    training = replace(TRAINING, optimizer="adamw", learning_rate=2e-2, max_steps=6, grad_accum_steps=1)
    spec = LoRA(rank=4, targets=("[qv]_proj", "up_proj"))
    options = {"safe": SAFE, "task": spec, "training": training}
    moved = [distance(finetune(MODEL, USER, weight=w, **options).backbone, MODEL.backbone) for w in (0.0, 1e9)]
    assert moved[1] < 0.3 * moved[0] and MODEL.fingerprint == before

    # A fresh adapter's B is what is held; one that was trained before is held where it is.
    fresh = spec.init(MODEL.architecture, jax.random.key(0))
    held = fisher(MODEL, SAFE, fresh, training)
    assert all(f["a"].max() == 0 < f["b"].max() for f in held.factors.values())
    given = jax.tree.map(lambda leaf: leaf + 0.05, fresh)
    anchor = {"start": given, "fisher": jax.tree.map(jnp.ones_like, given)}
    found = train_model(MODEL, USER, anchor=anchor, make_step=ewc(1e9), task=given, training=training)
    assert fingerprint(merge(MODEL.backbone, found.adapter)) == found.fingerprint
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (given, found.adapter)))) < 0.05
