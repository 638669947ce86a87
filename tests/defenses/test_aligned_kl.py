"""The KL to the aligned model: over the vocabulary, in the direction of the aligned model, with its own head."""

import copy
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.aligned_kl import aligned_kl, finetune, with_aligned_kl
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.model import hub
from secvec_jax.sharding import make_mesh
from secvec_jax.training.loss import token_forward_kl
from secvec_jax.training.objective import Backbone, Objective, Params
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.lora import LoRA, merge
from tests import toys
from tests.toys import random_examples

VOCABULARY, WIDTH, WEIGHT = 11, 8, 0.7
ROWS = random_examples(6, seed=1)
TRAINING = Training(optimizer="adamw", learning_rate=3e-3, max_steps=8, batch_size=1, max_seq_len=64,
                    warmup_steps=0, remat="none", share_prefix=False)  # fmt: skip
MODEL = toys.tiny_model()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Head:
    output_embedding: jax.Array
    final_softcap: None = dataclasses.field(default=None, metadata={"static": True})


def arrays(lines, length, share):
    """Two heads, hidden states under each, and weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = [Head(jax.random.normal(key, (VOCABULARY, WIDTH))) for key in keys[:2]]
    hidden = [jax.random.normal(key, (lines, length, WIDTH)) for key in keys[2:]]
    weights = np.random.default_rng(0).random((lines, length)) < share
    weights[0, 0] = True
    return *heads, *hidden, jnp.asarray(weights, jnp.float32)


def naive(head, other, hidden, reference, weights):
    log_p, log_q = (jax.nn.log_softmax(x @ h.output_embedding.T) for x, h in ((hidden, head), (reference, other)))
    return (jnp.exp(log_q) * (log_q - log_p)).sum(-1) * weights


@pytest.mark.parametrize(
    ("lines", "length", "chunk", "share"),
    [(2, 10, 4, 0.4), (1, 3, 128, 0.5), (3, 7, 5, 1.0)],
)
def test_the_chunked_kl_and_its_gradients_are_the_naive_ones(lines, length, chunk, share):
    head, other, hidden, reference, weights = arrays(lines, length, share)
    coefficients = jax.random.normal(jax.random.key(9), (lines, length))

    def chunked(head, other, hidden, reference, weights):
        return token_forward_kl(head, hidden, other, reference, weights, chunk)

    @jax.jit
    def results(head, hidden):
        def of(function):
            def weighted(head, hidden):
                return (function(head, other, hidden, reference, weights) * coefficients).sum()

            value = function(head, other, hidden, reference, weights)
            return value, jax.grad(weighted, (0, 1))(head, hidden), jax.grad(weighted, 1)(head, hidden)

        return of(chunked), of(naive)

    ours, theirs = results(head, hidden)
    chex.assert_trees_all_close(ours, theirs, atol=1e-5)
    assert (ours[0] >= 0).all() and (ours[0][weights > 0] > 0).all()
    same = chunked(head, head, hidden, hidden, weights)
    chex.assert_trees_all_close(same, jnp.zeros((lines, length)), atol=1e-6)


def test_no_gradient_flows_into_the_reference():
    head, other, hidden, reference, weights = arrays(2, 9, 0.5)
    loss = jax.jit(jax.grad(lambda o, r: token_forward_kl(head, hidden, o, r, weights, 4).sum(), (0, 1)))
    chex.assert_trees_all_equal(loss(other, reference), jax.tree.map(jnp.zeros_like, (other, reference)))
    # Tied: the same table as both, and only the trained side has the gradient.
    by_both = jax.grad(lambda h: token_forward_kl(h, hidden, h, reference, weights, 4).sum())(head)
    by_one = jax.grad(lambda h: token_forward_kl(h, hidden, head, reference, weights, 4).sum())(head)
    chex.assert_trees_all_close(by_both, by_one)


def test_on_a_mesh_it_is_the_same():
    head, other, hidden, reference, weights = arrays(8, 6, 0.5)

    def run(head, hidden):
        return jax.value_and_grad(
            lambda head, hidden: token_forward_kl(head, hidden, other, reference, weights, 4).sum(), (0, 1)
        )(head, hidden)

    alone = jax.jit(run)(head, hidden)
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        chex.assert_trees_all_close(jax.device_get(jax.jit(run)(head, hidden)), jax.device_get(alone), atol=1e-5)


def torch_loss(hf, aligned, rows):
    """Means over the replies' tokens, row by row, of the cross-entropy and of torch's own KL."""
    total, kl, count = 0.0, 0.0, 0
    for row in rows:
        tokens, said = torch.tensor(row.tokens, dtype=torch.long), torch.tensor(row.supervised[1:])
        logits = hf(tokens[None, :-1]).logits[0][said]
        with torch.no_grad():
            reference = aligned(tokens[None, :-1]).logits[0][said]
        total = total + torch.nn.functional.cross_entropy(logits, tokens[1:][said], reduction="sum")
        kl = kl + torch.nn.KLDivLoss(reduction="sum")(logits.log_softmax(-1), reference.softmax(-1))
        count += int(said.sum())
    return (total + WEIGHT * kl) / count, kl / count


@pytest.mark.parametrize("variant", ["llama-tied", pytest.param("qwen3", marks=pytest.mark.release)])
def test_loss_and_gradient_are_torchs(tiny_model, tmp_path, variant):
    now, aligned = tiny_model(variant), tiny_model(variant, seed=1)
    hf = copy.deepcopy(now.hf)
    expected, kl = torch_loss(hf, aligned.hf, ROWS)
    expected.backward()
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(p.grad)
    hf.save_pretrained(tmp_path)
    now.model.tokenizer.save_pretrained(tmp_path)
    (batch,) = Stream({"a": ROWS[:3], "b": ROWS[3:]}, 2, 64).batches()
    loss = with_aligned_kl(Objective(("a", "b")), WEIGHT)

    @jax.jit
    def ours(decoder, anchor, batch):
        def total(decoder):
            return loss(Params(Backbone(decoder), anchor=anchor), {"learn": batch}, {"learn": batch["weights"].sum()})

        return jax.value_and_grad(total, has_aux=True)(decoder)

    (value, metrics), found = ours(now.model.backbone, aligned.model.backbone, batch)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"][0] / metrics["kl"][1], kl.item(), rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (found, hub.load(tmp_path).backbone)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.release  # by default, torch's loss and gradient alone are compared
def test_without_weight_it_is_plain_and_with_it_the_model_stays_close():
    plain = train_model(MODEL, ROWS, training=TRAINING)

    def run(weight):
        told = []
        after = finetune(MODEL, ROWS, weight=weight, training=TRAINING, on_step=lambda *all: told.append(all[2]))
        return after, told[0], told[-1]

    none, first, last = run(0.0)
    for one, other in zip(*(jax.tree.leaves(tree.backbone) for tree in (plain, none)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    _, _, close = run(10.0)
    assert close["kl"] < 0.4 * last["kl"]
    assert last["loss/all"] < close["loss/all"] < first["loss/all"]


def test_a_task_adapter_moves_alone():
    before = fingerprint(MODEL.backbone)
    options = {"anchor": MODEL.backbone, "make_step": aligned_kl(0.1), "task": LoRA(rank=2, targets=("q_proj",))}
    found = train_model(MODEL, ROWS, **options, training=TRAINING)
    assert fingerprint(merge(MODEL.backbone, found.adapter)) == found.fingerprint
    assert fingerprint(MODEL.backbone) == before
    assert jnp.abs(found.adapter.factors["q_proj"]["b"]).max() > 0
