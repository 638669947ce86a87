"""The loss of given replies, against the plain forward pass of each row alone."""

import chex
import jax
import numpy as np
import pytest

from secvec_jax.data.chat import Example
from secvec_jax.evaluation import likelihood
from secvec_jax.evaluation.likelihood import kl_divergences, mean_losses
from secvec_jax.vectors.lora import LoRA
from tests.toys import losses_alone


@pytest.mark.parametrize("shared", [0, 6])
def test_each_row_has_the_mean_loss_of_its_own_supervised_tokens(tiny_model, shared):
    model = tiny_model("llama").model
    rng = np.random.default_rng(0)
    lengths, said = (40, 3, 70, 33, 9, 64, 5, 12, 31, 2), (7, 1, 40, 33, 4, 1, 0, 12, 2, 2)
    head = rng.integers(1, 100, shared)
    examples = [
        Example(
            np.concatenate([head, rng.integers(1, 100, size)]).astype(np.int32),
            np.arange(shared + size) >= shared + size - count,
        )
        for size, count in zip(lengths, said)
    ]
    moved = jax.tree.map(lambda leaf: leaf + 0.1, LoRA(rank=2).init(model.architecture, jax.random.key(0)))
    for vectors in (None, moved):
        alone = [losses_alone(model, example, vectors) for example in examples]
        expected = [losses.mean() if len(losses) else 0.0 for losses in alone]
        chex.assert_trees_all_close(np.array(mean_losses(model, examples, vectors)), np.array(expected), atol=1e-5)


@pytest.mark.parametrize("shared", [0, 6])
def test_many_rows_are_read_in_few_programs_and_each_once(tiny_model, monkeypatch, shared):
    """Of like lengths in any number of batches, more than are packed at a time, one that begins another, and twice."""
    model = tiny_model("llama").model
    rng = np.random.default_rng(1)
    head = rng.integers(1, 100, shared)
    rows = [np.concatenate([head, rng.integers(1, 100, size)]).astype(np.int32) for size in rng.integers(4, 30, 11)]
    rows += [rows[0][: shared + 3], rows[5]]
    examples = [Example(tokens, np.arange(len(tokens)) >= len(tokens) - 2) for tokens in rows]
    alone = [losses_alone(model, example).mean() for example in examples]
    monkeypatch.setattr(likelihood, "_MAX_ROWS", 4)
    likelihood._row_losses.clear_cache()
    chex.assert_trees_all_close(np.array(mean_losses(model, examples)), np.array(alone), atol=1e-5)
    assert likelihood._row_losses._cache_size() == 1
    monkeypatch.setattr(likelihood, "_PACKED_TOGETHER", 5)
    chex.assert_trees_all_close(np.array(mean_losses(model, examples)), np.array(alone), atol=1e-5)
    reference = model.with_backbone(jax.tree.map(lambda leaf: leaf * 1.01, model.backbone))
    assert kl_divergences(model, model, examples) == [0.0] * len(examples)
    together = kl_divergences(model, reference, examples)
    one_by_one = [kl_divergences(model, reference, [example])[0] for example in examples]
    chex.assert_trees_all_close(np.array(together), np.array(one_by_one), atol=1e-5)
    assert min(together) > 0
