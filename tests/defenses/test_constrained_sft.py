"""Constrained fine-tuning: β by a token's position in its reply, in packed sequences too, and the paper's loss."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.constrained_sft import constrained, finetune, position_in_reply
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.model import hub
from secvec_jax.training.objective import Backbone, Objective, Params
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import make_train_step
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.lora import LoRA, merge
from tests import toys
from tests.toys import example, random_examples

ROWS = random_examples(6, seed=1, longest=24)
TRAINING = Training(optimizer="adamw", learning_rate=3e-3, max_steps=10, batch_size=2, max_seq_len=64,
                    warmup_steps=0, remat="none", share_prefix=False)  # fmt: skip
MODEL = toys.tiny_model()


def test_places_in_packed_sequences():
    #            two turns of one row        | another, its reply at once | padding
    weights = [[0, 1, 1, 1, 0, 0, 0.5, 2, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1]]
    segments = [[1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 3, 3, 3, 3, -1, 0, 0, 0, 0, 1]]
    expected = [[-1, 0, 1, 2, -1, -1, 0, 1, 2, 0, 1, 2, -1, -1], [0, 1, 2, 0, 0, 1, 2, -1, -1, -1, -1, -1, -1, 0]]
    weights = jnp.asarray(weights)
    found = position_in_reply(weights, jnp.asarray(segments))
    np.testing.assert_array_equal(np.where(weights > 0, found, -1), expected)


def test_places_are_those_of_the_rows_however_they_are_packed():
    """Each target is a token that says where in its reply it stands."""
    rows = [example([9, 9, 9][: 1 + i % 3], list(range(20, 20 + n))) for i, n in enumerate([1, 7, 3, 12, 2, 5])]
    turns = np.array([9, 20, 21, 9, 9, 20, 21, 22, 9], np.int32)
    rows.append(rows[0].__class__(turns, turns != 9))
    for share in (True, False):
        for batch in Stream({"all": rows}, 2, 24, share_prefix=share).batches():
            found = position_in_reply(jnp.asarray(batch["weights"]), jnp.asarray(batch["segments"]))
            said = batch["weights"] > 0
            np.testing.assert_array_equal(np.asarray(found)[said], batch["targets"][said] - 20)


def torch_loss(hf, aligned, rows):
    """The paper's loss, token by token of each row by itself."""
    total, count = 0.0, 0
    for row in rows:
        tokens, said = torch.tensor(row.tokens, dtype=torch.long), torch.tensor(row.supervised[1:])
        with torch.no_grad():
            before = aligned(tokens[None, :-1]).logits[0].log_softmax(-1)
        now = hf(tokens[None, :-1]).logits[0].log_softmax(-1)
        for place, t in enumerate(torch.nonzero(said)[:, 0]):
            beta = [0.5, 2.0, 2.0, 2.0, 2.0, 0.1][min(place, 5)]
            ratio = now[t, tokens[1 + t]] - before[t, tokens[1 + t]]
            total = total - 2 / beta * torch.nn.functional.logsigmoid(beta * ratio)
            count += 1
    return total / count


def gradient(model, anchor, batch, make_step=constrained()):
    """What a step of SGD with rate 1 takes off the decoder, and the metrics."""
    params = Params(Backbone(model.backbone), anchor=anchor)
    phase = Phase({"backbone": "train", "vectors": "freeze", "anchor": "freeze"})
    train_step = make_step(Objective(), phase.optimizer(optax.sgd(1.0), params))
    trained, frozen = phase.split(params)
    trained = jax.tree.map(jnp.copy, trained)
    trained, _, metrics = train_step.step(trained, train_step.init(trained), frozen, {"learn": batch})
    return jax.tree.map(jnp.subtract, model.backbone, trained.backbone.decoder), metrics


@pytest.mark.parametrize(
    ("variant", "micro"), [pytest.param("llama-tied", False, marks=pytest.mark.release), ("qwen3", True)]
)
def test_loss_and_gradient_are_torchs(tiny_model, tmp_path, variant, micro):
    now, aligned = tiny_model(variant), tiny_model(variant, seed=1)
    hf = copy.deepcopy(now.hf)
    expected = torch_loss(hf, aligned.hf, ROWS)
    expected.backward()
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(p.grad)
    hf.save_pretrained(tmp_path)
    now.model.tokenizer.save_pretrained(tmp_path)
    (batch,) = Stream({"all": ROWS}, 2, 96).batches()
    batch = {key: array[:, None] if micro else array[None] for key, array in batch.items()}
    found, metrics = gradient(now.model, aligned.model.backbone, batch)
    np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (found, hub.load(tmp_path).backbone)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max())


@pytest.mark.release  # by default, torch's loss and gradient alone are compared
def test_at_the_start_the_gradient_is_that_of_the_cross_entropy():
    (batch,) = Stream({"all": ROWS}, 2, 96).batches()
    batch = {key: array[None] for key, array in batch.items()}
    plain, told = gradient(MODEL, MODEL.backbone, batch, make_train_step)
    first, same = gradient(MODEL, MODEL.backbone, batch)
    expected = (told["loss"] * batch["weights"].sum(), batch["weights"].sum())
    for found in (same["loss/all"], told["loss/all"]):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (plain, first)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.release  # by default, torch's loss and gradient alone are compared
def test_early_tokens_stay_and_late_ones_are_learned():
    def losses(model):
        (batch,) = Stream({"all": ROWS}, 2, 96).batches()
        found = jax.jit(Objective().token_losses)(Params(Backbone(model.backbone)), batch)
        place, said = position_in_reply(batch["weights"], batch["segments"]), batch["weights"] > 0
        return np.array([found[said & early].mean() for early in (place < 5, place >= 5)])

    start = losses(MODEL)
    plain = start - losses(train_model(MODEL, ROWS, training=TRAINING))
    held = start - losses(finetune(MODEL, ROWS, beta=1.0, training=TRAINING))
    assert plain.min() > 1 and held[0] < 0.6 * plain[0] and held[1] > 0.8 * plain[1]


def test_a_task_adapter_moves_alone():
    before = fingerprint(MODEL.backbone)
    options = {"anchor": MODEL.backbone, "make_step": constrained(), "task": LoRA(rank=2, targets=("q_proj",))}
    found = train_model(MODEL, ROWS, **options, training=TRAINING)
    assert fingerprint(merge(MODEL.backbone, found.adapter)) == found.fingerprint
    assert fingerprint(MODEL.backbone) == before
    assert jnp.abs(found.adapter.factors["q_proj"]["b"]).max() > 0
