"""Losses: chunked, packed and accumulated ones are the plain ones, gradients included."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.floor import above_floor
from secvec_jax.training.loss import group_sums, token_cross_entropy, token_kl
from secvec_jax.training.objective import KEEP, LEARN, Backbone, Objective, Params
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import make_train_step
from secvec_jax.vectors.lora import LoRA
from tests.toys import random_decoder, random_examples

VOCABULARY, WIDTH = 11, 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Head:
    output_embedding: jax.Array
    final_softcap: float | None = dataclasses.field(default=None, metadata={"static": True})

    def logits(self, hidden):
        found, cap = (hidden @ self.output_embedding.T).astype(jnp.float32), self.final_softcap
        return found if cap is None else cap * jnp.tanh(found / cap)


@pytest.fixture(params=[None, 1.5], ids=["", "softcapped"])
def head(request):
    return Head(jax.random.normal(jax.random.key(0), (VOCABULARY, WIDTH)), request.param)


def hidden_of(seed, lines, length):
    return jax.random.normal(jax.random.key(seed), (lines, length, WIDTH))


def tokens_of(seed, lines, length, share=0.4):
    rng = np.random.default_rng(seed)
    supervised = rng.random((lines, length)) < share
    supervised[0, 0] = True
    return jnp.asarray(rng.integers(0, VOCABULARY, (lines, length))), jnp.asarray(supervised, jnp.float32)


SIZES = pytest.mark.parametrize(
    ("lines", "length", "chunk", "share"),
    [(2, 10, 4, 0.4), (1, 3, 128, 0.5), (3, 7, 5, 1.0), (2, 9, 4, 0.06)],
)


@SIZES
def test_cross_entropy_and_its_gradients_are_the_naive_ones(head, lines, length, chunk, share):
    targets, weights = tokens_of(1, lines, length, share)
    coefficients = jax.random.normal(jax.random.key(9), (lines, length))

    def chunked(head, hidden):
        return token_cross_entropy(head, hidden, targets, weights, chunk)

    def naive(head, hidden):
        log_p = jax.nn.log_softmax(head.logits(hidden))
        return -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] * weights

    chex.assert_trees_all_close(*both(chunked, naive, head, hidden_of(2, lines, length), coefficients), atol=1e-5)


def both(one, other, head, hidden, coefficients):
    """The losses and the gradients of their weighted sum, of two functions of the head and the hidden states.

    The gradients are by both, and by the hidden states alone, as with a frozen head.
    """

    @jax.jit
    def run(head, hidden):
        def results(loss):
            def weighted(head, hidden):
                return (loss(head, hidden) * coefficients).sum()

            by_both, by_hidden = jax.grad(weighted, (0, 1)), jax.grad(weighted, 1)
            return loss(head, hidden), by_both(head, hidden), by_hidden(head, hidden)

        return results(one), results(other)

    return run(head, hidden)


@pytest.mark.parametrize("length", [3, 4])
def test_without_a_supervised_token_losses_and_gradients_are_zero(head, length):
    x, targets, none = hidden_of(0, 2, length), jnp.zeros((2, length), int), jnp.zeros((2, length))
    for loss, other in ((token_cross_entropy, targets), (token_kl, x + 1)):
        total = jax.jit(jax.value_and_grad(lambda h, x: loss(h, x, other, none, 4).sum(), (0, 1)))  # noqa: B023
        value, gradient = total(head, x)
        assert value == 0
        chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, (head, x)))


@SIZES
def test_kl_is_the_naive_one_and_never_negative(head, lines, length, chunk, share):
    _, weights = tokens_of(3, lines, length, share)
    x, reference = hidden_of(4, lines, length), hidden_of(5, lines, length)
    coefficients = jax.random.normal(jax.random.key(9), (lines, length))

    def chunked(head, hidden):
        return token_kl(head, hidden, reference, weights, chunk)

    def naive(head, hidden):
        log_p, log_q = jax.nn.log_softmax(head.logits(hidden)), jax.nn.log_softmax(fixed)
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1) * weights

    fixed = head.logits(reference)
    results = both(chunked, naive, head, x, coefficients)
    chex.assert_trees_all_close(*results, atol=1e-5)
    found = results[0][0]
    assert (found >= 0).all() and (found[weights > 0] > 0).all()
    same = jax.jit(token_kl, static_argnums=4)(head, x, x, weights, chunk)
    chex.assert_trees_all_close(same, jnp.zeros((lines, length)), atol=1e-6)


def test_kl_moves_the_model_and_never_its_reference(head):
    _, weights = tokens_of(3, 2, 9)
    x, reference = hidden_of(4, 2, 9), hidden_of(5, 2, 9)
    gradient = jax.jit(jax.grad(lambda a, b: token_kl(head, a, b, weights, 4).sum(), (0, 1)))
    by_x, by_reference = gradient(x, reference)
    assert jnp.abs(by_x).max() > 0
    chex.assert_trees_all_equal(by_reference, jnp.zeros_like(reference))


def test_sums_and_counts_are_those_of_each_group():
    losses = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    weights = jnp.array([[1.0, 0.0, 1.0, 1.0]])
    sums, counts = group_sums(losses, weights, jnp.array([[0, 0, 2, 2]]), 3)
    chex.assert_trees_all_equal((sums, counts), (jnp.array([1.0, 0, 7]), jnp.array([1.0, 0, 2])))


# Packed rows are rows alone -----------------------------------------------------------------------


def naive_sum(decoder, tokens, supervised):
    """The loss of one row alone, without packing, segments, positions or chunks."""
    hidden = decoder(tokens[None, :-1])
    log_p = jax.nn.log_softmax(decoder.logits(hidden))[0]
    return -(jnp.take_along_axis(log_p, tokens[1:, None], 1)[:, 0] * supervised[1:]).sum()


@jax.jit
def packed(decoder, batch):
    def loss(decoder):
        hidden = decoder(batch["tokens"], batch["segments"], batch["positions"])
        losses = token_cross_entropy(decoder, hidden, batch["targets"], batch["weights"], chunk=16)
        return (losses * batch["weights"]).sum()

    return jax.value_and_grad(loss)(decoder)


def total(parts):
    return jax.tree.map(lambda *leaves: sum(leaves), *parts)


@pytest.mark.parametrize("head", [pytest.param(0, marks=pytest.mark.release), 5])
def test_packed_rows_have_the_loss_and_gradient_of_rows_alone(head):
    decoder = random_decoder()
    # Few lengths, so that the naive program is compiled few times.
    examples = [e for e in random_examples(40, head=head) if len(e.tokens) - head in (6, 9)][:7]
    assert len({len(e.tokens) for e in examples}) == 2
    alone = jax.jit(jax.value_and_grad(naive_sum))
    expected = total([alone(decoder, e.tokens, e.supervised) for e in examples])
    count = sum(e.supervised.sum() for e in examples)
    mean = jax.tree.map(lambda leaf: leaf / count, expected)
    lengths = (1, 14), (1, 70), (3, 33)  # one row a line without a head, ..., all in one line
    for lines, length in lengths:
        batches = list(Stream({"a": examples}, lines, length).batches())
        found = total([packed(decoder, batch) for batch in batches])
        chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf / count, found), mean, atol=1e-5)


# Accumulation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_batches():
    """Two batches of each stream, the second with far fewer supervised tokens."""
    many, few = random_examples(9, seed=1), random_examples(2, seed=2)
    streams = {name: [next(iter(Stream({"a": rows}, 2, 48).batches())) for rows in (many, few)] for name in "lk"}
    assert streams["l"][0]["weights"].sum() > 2 * streams["l"][1]["weights"].sum()
    return {LEARN: streams["l"], KEEP: streams["k"][::-1]}


def test_two_micro_batches_are_one_batch_whatever_their_token_counts(two_batches):
    decoder = random_decoder()
    vectors = LoRA(rank=2, targets=("q_proj", "down_proj")).init(decoder.architecture, jax.random.key(0))
    vectors = jax.tree.map(lambda leaf: leaf + 0.1, vectors)
    params = Params(Backbone(decoder), vectors)
    phase = Phase({"backbone": "freeze", "vectors": "train"})
    train_step = make_train_step(Objective(kl_weight=0.7), phase.optimizer(optax.sgd(1.0), params))
    micro = {name: jax.tree.map(lambda *x: np.stack(x), *pair) for name, pair in two_batches.items()}
    whole = {name: jax.tree.map(lambda *x: np.concatenate(x)[None], *pair) for name, pair in two_batches.items()}
    results = []
    for batch in (micro, whole):
        trained, frozen = phase.split(jax.tree.map(jnp.copy, params))
        moved, _, metrics = train_step.step(trained, train_step.init(trained), frozen, batch)
        results.append((moved, metrics))
    chex.assert_trees_all_close(*results, atol=1e-5)
    # The mean of the two means, a common mistake, is something else.
    means = []
    for batch in zip(*two_batches.values(), strict=True):
        trained, frozen = phase.split(jax.tree.map(jnp.copy, params))
        named = zip(two_batches, batch, strict=True)
        twice = {name: jax.tree.map(lambda x: np.stack([x, x]), part) for name, part in named}  # the loss of one
        means.append(train_step.step(trained, train_step.init(trained), frozen, twice)[2]["loss"])
    assert abs(sum(means) / 2 - results[0][1]["loss"]) > 1e-3


def test_tokens_below_the_floor_give_no_gradient_and_are_still_reported(two_batches):
    decoder = random_decoder()
    batch = jax.tree.map(jnp.asarray, two_batches[LEARN][0])
    totals = {LEARN: batch["weights"].sum()}

    def run(floor, weights=batch["weights"]):
        return steps(decoder, weights, floor)

    @partial(jax.jit, static_argnames="floor")
    def steps(decoder, weights, floor):
        given = {LEARN: batch | {"weights": weights}}
        objective = Objective(counted=above_floor(floor))
        return jax.value_and_grad(lambda d: objective(Params(Backbone(d)), given, totals), has_aux=True)(decoder)

    @jax.jit
    def token_losses(decoder):
        hidden = decoder(batch["tokens"], batch["segments"], batch["positions"])
        return token_cross_entropy(decoder, hidden, batch["targets"], batch["weights"])

    losses = token_losses(decoder)
    floor = float(jnp.median(losses[batch["weights"] > 0]))
    above = batch["weights"] * (losses > floor)
    assert 0 < above.sum() < batch["weights"].sum()
    (value, metrics), gradient = run(floor)
    (expected, _), wanted = run(0.0, above)
    chex.assert_trees_all_close((value, gradient), (expected, wanted), atol=1e-5)
    chex.assert_trees_all_close(metrics, run(0.0)[0][1], atol=1e-5)
    (value, _), gradient = run(1e6)
    assert value == 0
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, decoder))
