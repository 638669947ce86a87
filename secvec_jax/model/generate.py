"""Decoding: jitted, batched, with a key-value cache; greedy or sampled.

Prompts that begin alike (the system prompt) are read once: the cache of their common head is shared out to all.
The rest is padded on the left, so that all replies start at the same slot.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.batch import common_head
from secvec_jax.mesh import place, shards
from secvec_jax.model.decoder import Cache, Decoder, Guest

_BUCKET = 16


def generate_tokens(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    guests: tuple[Guest, ...] = (),
    *,
    max_new_tokens: int,
    stop: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: jnp.dtype = jnp.float32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to but without `stop`.

    prompts: token ids, one array each. temperature: 0 takes the likeliest token, else samples from
    softmax(logits / temperature). progress is called with the number of prompts done after each batch.
    """
    if not prompts:
        return []
    head = common_head(prompts)
    tails = [np.asarray(prompt[len(head) :]) for prompt in prompts]
    batches = -(-len(prompts) // batch_size)
    batch_size = -(-len(prompts) // batches)  # equal batches: a last one of padding would cost as much as a full one
    batch_size = -(-batch_size // shards("batch")) * shards("batch")
    order = sorted(range(len(prompts)), key=lambda i: len(tails[i]))
    replies: dict[int, list[int]] = {}
    run = partial(_generate, max_new_tokens=max_new_tokens, stop=stop, temperature=temperature, dtype=dtype)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # Prompts are sorted by length, so a batch is no wider than it needs; buckets keep the programs few.
        width = -(-len(tails[chosen[-1]]) // _BUCKET) * _BUCKET
        tokens, segments = _left_padded([tails[i] for i in chosen], batch_size, width)
        key = jax.random.fold_in(jax.random.key(seed), start)
        done = np.arange(batch_size) >= len(chosen)
        written = np.asarray(run(decoder, guests, head[None], tokens, segments, done, key))
        for i, row in zip(chosen, written):
            ends = np.flatnonzero(row == stop)
            replies[i] = row[: ends[0] if len(ends) else None].tolist()
        progress(len(replies))
    return [replies[i] for i in range(len(prompts))]


def _left_padded(tails: Sequence[np.ndarray], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments `[rows, width]`; rows without a prompt hold one token, so that no row is empty."""
    tokens, segments = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    segments[:, -1] = 1
    for row, tail in enumerate(tails):
        tokens[row, width - len(tail) :] = tail
        segments[row, width - len(tail) :] = 1
    return tokens, segments


@partial(jax.jit, static_argnames=("max_new_tokens", "stop", "temperature", "dtype"))
def _generate(decoder, guests, head, tokens, segments, done, key, *, max_new_tokens, stop, temperature, dtype):
    """Replies `[B, max_new_tokens]`, filled up with `stop`, for the tails `[B, T]` of prompts that share `head`."""
    forward = partial(decoder, guests=guests, dtype=dtype)
    tokens, segments, done = (place(x, "batch", *["length"] * (x.ndim - 1)) for x in (tokens, segments, done))
    cache = shared_cache(forward, head, len(tokens), head.shape[1] + tokens.shape[1] + max_new_tokens, decoder)
    positions = head.shape[1] + jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)

    def advance(cache, tokens, segments, positions):
        hidden, new = forward(tokens, segments, positions, cache=cache)
        return _append(cache, new, segments, positions), decoder.logits(hidden[:, -1])

    def choose(logits, step):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature).astype(jnp.int32)

    def say(step, logits, replies, done):
        token = jnp.where(done, stop, choose(logits, step))
        return token, jax.lax.dynamic_update_slice(replies, token[:, None], (0, step)), done | (token == stop)

    def unfinished(state):
        step, *_, done = state
        return (step < max_new_tokens) & ~done.all()

    def write(state):
        step, cache, position, token, replies, done = state
        cache, logits = advance(cache, token[:, None], jnp.ones_like(token)[:, None], position[:, None] + 1)
        return step + 1, cache, position + 1, *say(step, logits, replies, done)

    cache, logits = advance(cache, tokens, segments, positions)
    replies = jnp.full((len(tokens), max_new_tokens), stop, jnp.int32)
    state = (jnp.int32(1), cache, positions[:, -1], *say(0, logits, replies, done))
    return place(jax.lax.while_loop(unfinished, write, state)[-2], None, None)


def shared_cache(forward, head, rows: int, slots: int, decoder: Decoder) -> Cache:
    """A cache of `slots` for `rows` conversations that all begin with `head` `[1, H]` (H may be 0).

    forward: the decoder with its guests and its `dtype` bound by keyword.
    """
    a = decoder.architecture
    shape = (a.num_layers, rows, a.num_kv_heads, slots, a.head_dim)
    dtype = forward.keywords["dtype"]
    marks = place(jnp.zeros((rows, slots), jnp.int32), "batch", "length")
    empty = place(jnp.zeros(shape, dtype), "layers", "batch", "heads", "length", "head_dim")
    cache = Cache(empty, empty, marks, marks, jnp.int32(0))
    if head.shape[1] == 0:
        return cache
    _, new = forward(head, keep_cache=True)
    new = tuple(jnp.broadcast_to(part, (part.shape[0], rows, *part.shape[2:])) for part in new)
    wide = (rows, head.shape[1])
    return _append(cache, new, jnp.ones(wide, jnp.int32), jnp.broadcast_to(jnp.arange(wide[1]), wide))


def _append(cache: Cache, new: tuple[jax.Array, jax.Array], segments: jax.Array, positions: jax.Array) -> Cache:
    def put(into: jax.Array, what: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(into, what.astype(into.dtype), cache.length, axis)

    return Cache(
        put(cache.keys, new[0], 3),
        put(cache.values, new[1], 3),
        put(cache.segments, segments, 1),
        put(cache.positions, positions, 1),
        cache.length + segments.shape[1],
    )
