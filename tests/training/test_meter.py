"""Tokens and FLOPs are those of the formula, and speeds are these divided by the elapsed time."""

import dataclasses

import jax
import numpy as np
import pytest

from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.security_vectors import Phase1, finetune, train_vectors
from secvec_jax.training import meter
from secvec_jax.training.meter import Pace, counted
from secvec_jax.training.objective import KEEP, LEARN
from secvec_jax.vectors.lora import LoRA
from tests.toys import ARCHITECTURE, random_decoder, random_examples, tiny_model

KERNELS = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
MULTIPLIED = KERNELS + 320 * 32
"""N of the toy: two layers of q, k, v, o, gate, up and down, and the head."""


def line(*lengths: int, padding: int = 0):
    """A batch of one line, `[1, 1, T]`, of rows of these lengths."""
    segments = np.concatenate([np.full(n, i) for i, n in enumerate(lengths, 1)] + [np.zeros(padding)])
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.arange(padding)])
    return {"segments": segments[None, None].astype(np.int32), "positions": positions[None, None].astype(np.int32)}


@pytest.mark.parametrize(
    ("full", "batch", "tokens", "flops"),
    [
        (True, {LEARN: line(10)}, 10, 6 * MULTIPLIED * 10 + 3 * 4 * 32 * 2 * 55),
        (False, {LEARN: line(10)}, 10, 4 * MULTIPLIED * 10 + 3 * 4 * 32 * 2 * 55),
        (True, {LEARN: line(4, 6, padding=7)}, 10, 6 * MULTIPLIED * 10 + 3 * 4 * 32 * 2 * (10 + 21)),
        (False, {LEARN: line(3), KEEP: line(2)}, 5,
         4 * MULTIPLIED * 5 + 3 * 4 * 32 * 2 * (6 + 3) + 2 * MULTIPLIED * 2 + 4 * 32 * 2 * 3),
        (True, {LEARN: line(3), "safe": line(2)}, 5, 6 * MULTIPLIED * 5 + 3 * 4 * 32 * 2 * (6 + 3)),
    ],
    ids=["full", "frozen", "packed and padded", "rows to keep", "safe rows"],
)  # fmt: skip
def test_tokens_and_flops_by_hand(full, batch, tokens, flops):
    found = counted(batch, ARCHITECTURE, full)
    assert float(found["tokens"]) == tokens
    np.testing.assert_allclose(float(found["flops"]), flops, rtol=1e-6)


def test_the_formula_is_what_the_compiler_counts():
    """XLA's own count of a full step on one row: it does whole products of attention where the formula takes half."""
    architecture, length = dataclasses.replace(ARCHITECTURE, num_layers=1), 64  # XLA counts a loop's body once
    backbone = random_decoder(architecture=architecture)

    def loss(backbone, tokens):
        hidden = backbone(tokens)
        return jax.nn.logsumexp(backbone.logits(hidden)).sum()

    tokens = np.arange(length, dtype=np.int32)[None] + 3
    compiled = jax.jit(jax.value_and_grad(loss)).lower(backbone, tokens).compile()
    ours = float(counted({LEARN: line(length)}, architecture, True)["flops"])
    whole = ours + 3 * 4 * 32 * (length**2 - length * (length + 1) / 2)
    assert 0.95 < compiled.cost_analysis()["flops"] / whole < 1.15


def test_every_token_of_the_data_is_counted_once_an_epoch():
    rows = random_examples(12)
    batches = list(Stream({"all": rows}, 2, 32, epochs=2, share_prefix=False).batches())
    counts = [float(counted({LEARN: batch}, ARCHITECTURE, True)["tokens"]) for batch in batches]
    assert sum(counts) == 2 * sum(len(row.tokens) - 1 for row in rows), "a row's last token is read by no one"
    told = []
    training = Training(epochs=2, max_seq_len=32, batch_size=2, share_prefix=False)
    finetune(tiny_model(), rows, vectors=None, training=training, on_step=lambda *all: told.append(all[2]["tokens"]))
    assert told[:-1] == counts[:-1]


def test_frozen_weights_cost_two_thirds_and_a_task_adapter_freezes_them():
    rows, training = random_examples(4), Training(max_steps=1, max_seq_len=64, batch_size=2, share_prefix=False)
    found = {}
    finetune(tiny_model(), rows, vectors=None, training=training, on_step=lambda *all: found.update({"full": all[2]}))
    finetune(
        tiny_model(),
        rows,
        vectors=None,
        task=LoRA(rank=2),
        training=training,
        on_step=lambda *all: found.update({"task": all[2]}),
    )
    train_vectors(tiny_model(), rows, LoRA(rank=2), phase1=Phase1("cross_entropy"), training=training,
                  on_step=lambda *all: found.update({"vectors": all[2]}))  # fmt: skip
    assert found["task"]["flops"] == found["vectors"]["flops"]
    assert 0.6 < found["task"]["flops"] / found["full"]["flops"] < 0.75


def test_pace_is_work_over_time(monkeypatch):
    clock = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(clock))
    monkeypatch.setitem(meter.PEAK_FLOPS, jax.devices()[0].device_kind, 1000.0)
    pace = Pace()
    first = pace.of({"tokens": 100.0, "flops": 4000.0})
    assert set(first) == {"memory_gib"} and first["memory_gib"] > 0.01, "the first step's time is its compilation's"
    assert pace.of({"tokens": 100.0, "flops": 4000.0}) == {
        "memory_gib": pytest.approx(first["memory_gib"], rel=0.5),
        "seconds": 2.0,
        "tokens_per_second": 50.0,
        "mfu": 4000.0 / 2.0 / (1000.0 * jax.device_count()),
    }
    assert set(pace.of({"loss": 1.0})) == {"memory_gib", "seconds"}


def test_without_a_known_peak_there_is_no_mfu():
    pace = Pace()
    pace.of({})
    assert "mfu" not in pace.of({"tokens": 1.0, "flops": 1.0})


def test_other_architectures_are_other_work():
    wider = dataclasses.replace(ARCHITECTURE, intermediate_size=128)
    batch = {LEARN: line(5)}
    more = float(counted(batch, wider, True)["flops"]) - float(counted(batch, ARCHITECTURE, True)["flops"])
    assert more == pytest.approx(6 * 5 * 2 * 3 * 32 * 64)
