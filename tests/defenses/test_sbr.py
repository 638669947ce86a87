"""The penalty of SBR is that of the published code: the last hidden state of the prompts, a mean over all channels."""

import copy
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.finetuning import finetune_phase
from secvec_jax.defenses.sbr import anchors_of, finetune, with_anchors
from secvec_jax.errors import UserError
from secvec_jax.model import hub
from secvec_jax.training.objective import Backbone, Objective, Params
from tests import toys
from tests.toys import example, random_examples

WEIGHT = 0.7
ROWS, ANCHORS = random_examples(6, seed=1), random_examples(4, seed=2)
TRAINING = Training(optimizer="adamw", learning_rate=3e-3, max_steps=8, batch_size=1, max_seq_len=64,
                    warmup_steps=0, remat="none", share_prefix=False)  # fmt: skip
MODEL = toys.tiny_model()


def torch_states(hf):
    """The last of transformers' hidden states at the last token of each prompt, prompt by prompt."""
    prompts = [torch.tensor(row.tokens[: row.answer_start], dtype=torch.long) for row in ANCHORS]
    return torch.stack([hf(p[None], output_hidden_states=True).hidden_states[-1][0, -1] for p in prompts])


def torch_loss(hf, aligned):
    """The mean cross-entropy over the replies' tokens plus the penalty, and the mean squared change."""
    total, count = 0.0, 0
    for row in ROWS:
        tokens, said = torch.tensor(row.tokens, dtype=torch.long), torch.tensor(row.supervised[1:])
        logits = hf(tokens[None, :-1]).logits[0][said]
        total = total + torch.nn.functional.cross_entropy(logits, tokens[1:][said], reduction="sum")
        count += int(said.sum())
    with torch.no_grad():
        reference = torch_states(aligned)
    change = torch.nn.functional.mse_loss(torch_states(hf), reference)
    return total / count + WEIGHT * change, change


def test_loss_and_gradient_are_torchs(tiny_model, tmp_path):
    now, aligned = tiny_model("llama-tied"), tiny_model("llama-tied", seed=1)
    hf = copy.deepcopy(now.hf)
    expected, change = torch_loss(hf, aligned.hf)
    expected.backward()
    assert change > 0.01, "the penalty matters"
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(p.grad)
    hf.save_pretrained(tmp_path)
    now.model.tokenizer.save_pretrained(tmp_path)
    (batch,) = Stream({"all": ROWS}, 2, 64).batches()
    loss = Objective()
    params = Params(Backbone(now.model.backbone), anchor=anchors_of(aligned.model, ANCHORS, loss))
    trained, frozen = finetune_phase(params).split(params)
    micro_batches = {"learn": {key: array[None] for key, array in batch.items()}}
    gradients, metrics = jax.jit(with_anchors(loss, WEIGHT))(trained, frozen, micro_batches)
    np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["anchor_change"], change.item(), rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (gradients, hub.load(tmp_path).backbone)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def trained(weight):
    """The metrics of each step."""
    told = []
    on_step = lambda step, steps, metrics: told.append(metrics)  # noqa: E731
    finetune(MODEL, ROWS, anchors=ANCHORS, weight=weight, training=TRAINING, on_step=on_step)
    return told


def test_the_change_starts_at_0_and_the_rows_are_learned():
    held = trained(10.0)
    assert held[0]["anchor_change"] == 0 < held[-1]["anchor_change"]
    assert held[-1]["loss"] == pytest.approx(held[-1]["loss/all"] + 10 * held[-1]["anchor_change"], rel=1e-5)
    assert held[-1]["loss/all"] < held[0]["loss/all"]


@pytest.mark.release  # by default, torch's loss and gradient alone are compared
def test_a_larger_weight_keeps_the_states_together():
    assert trained(10.0)[-1]["anchor_change"] < 0.3 * trained(0.0)[-1]["anchor_change"]


def test_the_replies_of_the_anchors_are_not_read():
    loss = Objective()
    others = [example(row.tokens[: row.answer_start].tolist(), [7, 8, 9]) for row in ANCHORS]
    one, other = (anchors_of(MODEL, rows, loss) for rows in (ANCHORS, others))
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_list_of_prompts_is_refused():
    with pytest.raises(UserError, match="there are no anchor prompts"):
        finetune(MODEL, ROWS, anchors=[], training=replace(TRAINING, max_steps=1))
