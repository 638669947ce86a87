"""Decoding with the cache writes what the uncached forward pass would, token for token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secvec_jax.model import generate
from secvec_jax.model.generate import generate_tokens
from secvec_jax.model.sampling import Sampling

_WIDTH, _NEW = 40, 10


@jax.jit
def _next(backbone, adapters, tokens, length):
    """The likeliest token after the first `length` of `tokens` `[1, _WIDTH]`, without a cache."""
    segments = (jnp.arange(_WIDTH) < length).astype(jnp.int32)[None]
    hidden = backbone(tokens, segments, adapters=adapters)
    return jnp.argmax(backbone.logits(hidden[0, length - 1]))


def _uncached(backbone, prompts, adapters=(), stop: int = -1, new: int = _NEW) -> list[list[int]]:
    replies = []
    for prompt in prompts:
        line = np.zeros((1, _WIDTH), np.int32)
        line[0, : len(prompt)] = prompt
        reply: list[int] = []
        while len(reply) < new:
            token = int(_next(backbone, adapters, line, len(prompt) + len(reply)))
            if token == stop:
                break
            line[0, len(prompt) + len(reply)] = token
            reply.append(token)
        replies.append(reply)
    return replies


def _prompts(*lengths: int, head: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Random prompts of these lengths, the first `head` tokens in common."""
    rng = np.random.default_rng(seed)
    common = rng.integers(3, 320, head)
    return [np.concatenate([common, rng.integers(3, 320, n - head)]).astype(np.int32) for n in lengths]


greedy = partial(generate_tokens, max_new_tokens=_NEW, stop=-1)


_QUICK = [("llama", 6), ("gemma2", 6), ("gemma3", 0), ("opt", 0)]
"""With and without a beginning in common; windows that differ by layer, softcaps, and learned positions."""
_MORE = ["llama-llama3", "mistral", "qwen2", "qwen2-mixed", "qwen3", "phi3"]
_REPEATED = [
    ("llama", 0),
    ("gemma2", 0),
    ("gemma3", 6),
    ("opt", 6),
    *((variant, head) for variant in _MORE for head in (0, 6)),
]


@pytest.mark.parametrize(
    ("variant", "head"), [*_QUICK, *(pytest.param(*case, marks=pytest.mark.release) for case in _REPEATED)]
)
def test_cached_is_uncached(tiny_model, variant, head):
    backbone = tiny_model(variant).model.backbone
    prompts = _prompts(7, 20, 12, 9, head=head)
    replies = greedy(backbone, prompts)
    assert replies == _uncached(backbone, prompts)
    assert all(len(reply) == _NEW for reply in replies)
    assert len({tuple(reply) for reply in replies}) > 1


@pytest.mark.parametrize("variant", ["mistral", pytest.param("llama", marks=pytest.mark.release)])
def test_in_a_scan_over_the_layers_as_one_by_one(tiny_model, random_vectors, variant, monkeypatch):
    """What accelerators do; on a CPU the layers are unrolled."""
    model = tiny_model(variant).model
    adapters = (random_vectors(model, rank=4),)
    prompts = _prompts(7, 20, 12, 9, head=6)
    unrolled = greedy(model.backbone, prompts, adapters)
    monkeypatch.setattr(generate, "platform", lambda: "tpu")
    assert greedy(model.backbone, prompts, adapters) == unrolled


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 12, 16, 64])
def test_prompts_are_packed_whole(count):
    rng = np.random.default_rng(count)
    tails = sorted((rng.integers(1, 99, n) for n in rng.integers(1, 40, count)), key=len)
    [packed] = generate.pack_prompts([tails], count, 5)
    flat = {name: getattr(packed, name).reshape(-1) for name in ("tokens", "segments", "positions")}
    begun = [
        any(tail is not other and other[: len(tail)].tolist() == tail.tolist() for other in tails) for tail in tails
    ]
    assert (packed.segments > 0).sum() == sum(len(tail) for tail, is_begun in zip(tails, begun) if not is_begun)
    for tail, indices, marks in zip(tails, packed.indices, packed.marks, strict=True):
        own = indices[marks > 0]
        np.testing.assert_array_equal(flat["tokens"][own], tail)
        np.testing.assert_array_equal(flat["positions"][own], 5 + np.arange(len(tail)))
        assert len(set(flat["segments"][own])) == 1 and marks[-1] == 1


def test_a_prompt_that_begins_another_is_read_with_it():
    rng = np.random.default_rng(0)
    long, other = rng.integers(1, 99, 20), rng.integers(1, 99, 9)
    batches = [[long[:5], other, long, long[:11], other], [other[:2], long[:5], long[:11]]]
    first, second = generate.pack_prompts(batches, 5, 3)
    assert (first.segments > 0).sum() == 20 + 9 and (second.segments > 0).sum() == 2 + 11 + 1, "1 for the empty rows"
    for packed, batch in zip((first, second), batches):
        for tail, indices, marks in zip(batch, packed.indices, packed.marks):
            own = indices[marks > 0]
            np.testing.assert_array_equal(packed.tokens.reshape(-1)[own], tail)
            np.testing.assert_array_equal(packed.positions.reshape(-1)[own], 3 + np.arange(len(tail)))
    assert first.tokens.shape == second.tokens.shape and first.indices.shape == second.indices.shape


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=60), st.integers(1, 20))
def test_prompts_of_like_length_are_read_together(lengths, batch_size):
    found = generate.batches_by_length([np.zeros(length) for length in lengths], batch_size)
    assert sorted(i for _, batches in found for batch in batches for i in batch) == list(range(len(lengths)))
    for rows, batches in found:
        assert all(rows - 1 <= len(batch) <= rows <= batch_size for batch in batches)
        own = [lengths[i] for batch in batches for i in batch]
        assert max(own) <= max(generate._SHORT, 2 * min(own))
        assert all([lengths[i] for i in batch] == sorted(lengths[i] for i in batch) for batch in batches)
    assert len(found) <= 5, "128, 256, 512, 1024, 2048"


def test_all_batches_of_like_prompts_share_one_program(tiny_model):
    backbone = tiny_model("llama").model.backbone
    prompts = _prompts(*range(4, 40), head=3)
    generate._decode.clear_cache(), generate._prefill.clear_cache()
    greedy(backbone, prompts, max_new_tokens=2, batch_size=8)
    assert generate._decode._cache_size() == generate._prefill._cache_size() == 1


@pytest.mark.parametrize(
    ("variant", "head"),
    [
        ("mistral", 6),
        *(pytest.param(*case, marks=pytest.mark.release) for case in (("llama", 0), ("llama", 6), ("mistral", 0))),
    ],
)
def test_cached_is_uncached_with_adapters(tiny_model, random_vectors, variant, head):
    model = tiny_model(variant).model
    adapters = (random_vectors(model, rank=4), random_vectors(model, seed=1, rank=2, targets=("q_proj", "*down*")))
    prompts = _prompts(7, 20, 12, head=head)
    replies = greedy(model.backbone, prompts, adapters)
    assert replies == _uncached(model.backbone, prompts, adapters)
    assert replies != greedy(model.backbone, prompts), "the adapters made no difference"


@pytest.mark.parametrize("batch_size", [2, *(pytest.param(size, marks=pytest.mark.release) for size in (1, 3))])
def test_replies_do_not_depend_on_the_batch_size(tiny_model, batch_size):
    backbone = tiny_model("llama").model.backbone
    prompts = _prompts(20, 5, 17, 6, 9, head=3)
    assert greedy(backbone, prompts, batch_size=batch_size) == greedy(backbone, prompts)


@pytest.mark.parametrize(
    "lengths",
    [(1,), (1, 5), (17, 16), *(pytest.param(lengths, marks=pytest.mark.release) for lengths in ((1, 1), (16,), (32,)))],
)
def test_short_and_full_prompts(tiny_model, lengths):
    backbone = tiny_model("llama").model.backbone
    prompts = _prompts(*lengths)
    assert greedy(backbone, prompts, max_new_tokens=4) == _uncached(backbone, prompts, new=4)


def test_equal_prompts_and_prompts_that_begin_others(tiny_model):
    backbone = tiny_model("llama").model.backbone
    [prompt] = _prompts(12)
    prompts = [prompt, prompt, prompt[:5], prompt[:11]]
    assert greedy(backbone, prompts) == _uncached(backbone, prompts)
    same = greedy(backbone, [prompt, prompt])
    assert same[0] == same[1] == _uncached(backbone, [prompt])[0]


def test_no_prompts_no_replies(tiny_model):
    assert greedy(tiny_model("llama").model.backbone, []) == []


def test_replies_end_before_the_stop_token(tiny_model):
    backbone = tiny_model("llama").model.backbone
    prompts = _prompts(7, 20, 12)
    free = greedy(backbone, prompts)
    for stop in (free[0][0], free[1][3], free[2][-1]):
        stopped = greedy(backbone, prompts, stop=stop)
        expected = [reply[: reply.index(stop)] if stop in reply else reply for reply in free]
        assert stopped == expected == _uncached(backbone, prompts, stop=stop)
        assert any(len(reply) < _NEW for reply in stopped)


def test_any_of_several_tokens_ends_a_reply(tiny_model):
    backbone = tiny_model("llama").model.backbone
    prompts = _prompts(7, 20, 12)
    free = greedy(backbone, prompts)
    stops = (free[0][4], free[1][2])
    first = [min([reply.index(stop) for stop in stops if stop in reply], default=_NEW) for reply in free]
    assert greedy(backbone, prompts, stop=stops) == [reply[:end] for reply, end in zip(free, first)]
    assert sorted(first)[0] < _NEW
    assert greedy(backbone, prompts, stop=()) == free


def test_decoding_ends_early_once_all_have_stopped(tiny_model, monkeypatch):
    """Lines without a prompt, which fill the last batch, must not keep it running."""
    backbone = tiny_model("llama").model.backbone
    prompts = _prompts(7, 20, 12)
    steps = []
    original = jax.lax.while_loop

    def counting(condition, body, state):
        end = original(condition, body, state)
        jax.debug.callback(lambda step: steps.append(int(step)), end[0])
        return end

    monkeypatch.setattr(jax.lax, "while_loop", counting)
    generate._decode.clear_cache()
    stop = greedy(backbone, prompts[:1])[0][0]
    steps.clear()
    # The same prompt three times in batches of two: the second batch has one line without a prompt.
    assert greedy(backbone, [prompts[0]] * 3, stop=stop, batch_size=2) == [[], [], []]
    jax.effects_barrier()
    generate._decode.clear_cache()
    assert steps == [1, 1]


def test_sampling_is_reproducible_by_seed(tiny_model):
    backbone = tiny_model("llama").model.backbone
    sample = partial(greedy, backbone, _prompts(7, 20, 12, 8, head=2), sampling=Sampling(1.0))
    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    assert sample(seed=1) != sample(seed=1, sampling=Sampling())


def test_sampling_at_low_temperature_is_greedy(tiny_model):
    backbone = tiny_model("llama").model.backbone
    prompts = _prompts(7, 20, 12)
    assert greedy(backbone, prompts, sampling=Sampling(1e-4), seed=3) == greedy(backbone, prompts)


def test_samples_follow_the_softmax(tiny_model, logits):
    model = tiny_model("llama").model
    [prompt] = _prompts(6)
    drawn = greedy(model.backbone, [prompt] * 2000, max_new_tokens=1, batch_size=1000, sampling=Sampling(0.5))
    counts = np.bincount([reply[0] for reply in drawn], minlength=320)
    expected = np.asarray(jax.nn.softmax(logits(model, prompt[None])[0, -1] / 0.5))
    assert np.abs(counts / 2000 - expected).max() < 0.04
    assert (counts > 0).sum() > 5


def test_progress_counts_the_prompts_done(tiny_model):
    seen: list[int] = []
    prompts = _prompts(7, 20, 12, 8, 9)
    greedy(tiny_model("llama").model.backbone, prompts, max_new_tokens=1, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]


def test_prompts_of_a_like_width_share_one_program(tiny_model):
    first, second = tiny_model("llama").model.backbone, tiny_model("llama", seed=1).model.backbone
    generate._decode.clear_cache(), generate._prefill.clear_cache()
    for backbone, prompts in (
        (first, _prompts(7, 12)),
        (second, _prompts(3, 16)),
        (first, _prompts(9, 10, seed=1)),
    ):
        greedy(backbone, prompts)
    assert len(greedy(first, _prompts(7, 12), max_new_tokens=3)[0]) == 3, "replies of other lengths as well"
    assert generate._decode._cache_size() == generate._prefill._cache_size() == 1


def test_slots_are_rounded_up_once(tiny_model, monkeypatch):
    """Each step of decoding reads all slots of the cache."""
    caches = []
    original = generate._decode

    def recorded(decoder, adapters, unrolled, cache, *arguments, **options):
        caches.append((int(cache.length), cache.positions.shape[1]))
        return original(decoder, adapters, unrolled, cache, *arguments, **options)

    monkeypatch.setattr(generate, "_decode", recorded)
    greedy(tiny_model("llama").model.backbone, _prompts(7, 20, 12, 9, head=6), max_new_tokens=44)
    assert caches == [(20, 64)]


@pytest.mark.parametrize("variant", ["llama", pytest.param("mistral", marks=pytest.mark.release)])
def test_bfloat16_runs_and_stays_close(tiny_model, variant):
    backbone = tiny_model(variant).model.backbone
    prompts = _prompts(7, 20, 12, head=3)
    replies = greedy(backbone, prompts, dtype=jnp.bfloat16)
    exact = greedy(backbone, prompts)
    assert sum(a[0] == b[0] for a, b in zip(replies, exact)) >= 2
