"""Decoding: jitted, batched, with a key-value cache; greedy or sampled.

Prompts that begin alike (the system prompt) are read once, and all rows look at the one cache of their common head.
The rest is read packed, as in training, and then laid out row by row, so that all replies start at the same slot.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from secvec_jax.batch import SHARED, check_token_ids, common_head
from secvec_jax.model.decoder import Adapter, Cache, Decoder, Run, written
from secvec_jax.model.sampling import GREEDY, Sampling, choose
from secvec_jax.sharding import constrain, num_shards, platform
from secvec_jax.trees import unstacked

_BUCKET = 16
_NO_TOKEN = -1
_PACKED, _LINE = 8, 512
"""A line holds so many prompts and no more than so many tokens, on average, or a single longer prompt."""
_SHORT = 128
"""Prompts up to here are alike: so few slots of a cache cost next to nothing beside the weights."""


def generate_tokens(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    adapters: tuple[Adapter, ...] = (),
    *,
    max_new_tokens: int,
    stop: int | tuple[int, ...],
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to but without the first that is `stop`, or one of several.

    prompts: token ids, one array each. progress is called with the number of prompts done after each batch.
    Raises UserError for a token id that the decoder has no embedding for.
    """
    if not prompts:
        return []
    vocab_size = decoder.architecture.vocab_size
    for number, prompt in enumerate(prompts, 1):
        check_token_ids(prompt, vocab_size, f"prompt {number}")
    head = common_head(prompts)
    tails = [np.asarray(prompt[len(head) :]) for prompt in prompts]
    replies: dict[int, list[int]] = {}
    apart = _apart(decoder, adapters) if platform() == "cpu" else None
    stops = (stop if isinstance(stop, tuple) else (stop,)) or (_NO_TOKEN,)
    options = {"max_new_tokens": max_new_tokens, "stops": stops, "sampling": sampling, "dtype": dtype}
    for rows, batches in _alike(tails, batch_size):
        for chosen, lines in zip(batches, _dealt([[tails[i] for i in batch] for batch in batches], rows, len(head))):
            cache, logits = _read(decoder, adapters, head[None], *lines, slots=max_new_tokens, dtype=dtype)
            key = jax.random.fold_in(jax.random.key(seed), len(replies))
            done = np.arange(rows) >= len(chosen)
            seen = None
            if sampling.repetition_penalty != 1:
                seen = np.zeros((rows, vocab_size), bool)
                for row, i in enumerate(chosen):
                    seen[row, prompts[i]] = True
            said = np.asarray(_write(decoder, adapters, apart, cache, logits, done, seen, key, **options))
            for i, row in zip(chosen, said):
                ends = np.flatnonzero(np.isin(row, stops))
                replies[i] = row[: ends[0] if len(ends) else None].tolist()
            progress(len(replies))
    return [replies[i] for i in range(len(prompts))]


def _alike(tails: Sequence[np.ndarray], batch_size: int) -> list[tuple[int, list[list[int]]]]:
    """(rows, batches of indices) for prompts of like length, which end within the same power of two.

    The batches of one kind are as large and, by turns, about as long as each other, so that one program does for all
    and no batch is mostly padding.
    """
    kinds: dict[int, list[int]] = {}
    for i in sorted(range(len(tails)), key=lambda i: len(tails[i])):
        kinds.setdefault(max(_SHORT, 1 << (len(tails[i]) - 1).bit_length()), []).append(i)
    found = []
    for members in kinds.values():
        count = -(-len(members) // batch_size)
        rows = rounded_up(-(-len(members) // count), num_shards("batch"))
        found.append((rows, [members[turn::count] for turn in range(count)]))
    return found


class _Lines(NamedTuple):
    """Prompts packed into lines, `tokens`, `segments`, `positions` `[P, W]`, and where each one's tokens stand in them.

    places, marks: `[B, T]`, the prompt's tokens at the right end, where marks are 1.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    marks: np.ndarray


def _dealt(batches: Sequence[Sequence[np.ndarray]], rows: int, head: int) -> list[_Lines]:
    """Batches of prompts, each packed into lines that are about as long as each other; all batches get one shape.

    Rows without a prompt hold one token, so that no row is empty.
    """
    filled = [[*tails, *[np.zeros(1, np.int32)] * (rows - len(tails))] for tails in batches]
    most = max(sum(map(len, tails)) for tails in filled)
    count = rounded_up(min(rows, max(-(-rows // _PACKED), -(-most // _LINE))), num_shards("batch"))
    deals = [_lines_of(list(map(len, tails)), count) for tails in filled]
    width = max(sum(len(tails[row]) for row in line) for tails, lines in zip(filled, deals) for line in lines)
    longest = rounded_up(max(len(tail) for tails in filled for tail in tails), _BUCKET)
    shape = (count, rounded_up(width, _BUCKET))
    return [_laid_out(tails, lines, shape, longest, head) for tails, lines in zip(filled, deals)]


def _lines_of(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The rows of each of `count` lines: the longest first, each to the line that holds least."""
    lines: list[list[int]] = [[] for _ in range(count)]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        min(lines, key=lambda line: sum(lengths[other] for other in line)).append(row)
    return lines


def _laid_out(
    tails: Sequence[np.ndarray], lines: Sequence[Sequence[int]], shape: tuple[int, int], longest: int, head: int
) -> _Lines:
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    index, marks = (np.zeros((len(tails), longest), np.int32) for _ in range(2))
    for number, line in enumerate(lines):
        start = 0
        for segment, row in enumerate(line, 1):
            end = start + len(tails[row])
            tokens[number, start:end], segments[number, start:end] = tails[row], segment
            positions[number, start:end] = head + np.arange(end - start)
            index[row, longest - (end - start) :] = number * shape[1] + np.arange(start, end)
            marks[row, longest - (end - start) :] = 1
            start = end
    return _Lines(tokens, segments, positions, index, marks)


def rounded_up(length: int, bucket: int) -> int:
    """Buckets keep the programs few."""
    return -(-length // bucket) * bucket


@partial(jax.jit, static_argnames=("slots", "dtype"))
def _read(decoder, adapters, head, tokens, segments, positions, index, marks, *, slots, dtype):
    """The cache after the prompts, with `slots` free, and the logits `[B, V]` of what follows them."""
    forward = partial(decoder, adapters=adapters, dtype=dtype)
    tokens, segments, positions, index, marks = (
        constrain(x, "batch", "length") for x in (tokens, segments, positions, index, marks)
    )
    cache = head_cache(forward, head, len(tokens))
    hidden, (keys, values) = forward(tokens, segments, positions, cache=cache)
    (layers, _, heads, size, _), (rows, longest) = keys.shape, index.shape

    def laid_out(packed: jax.Array, shared: Sequence[jax.Array]) -> jax.Array:
        """`[L, P, K, W, H]` -> `[L, B, K, S, H]`, the head's slots before the row's own, the free ones behind them."""
        flat = packed.swapaxes(1, 2).reshape(layers, heads, -1, size)
        own = jnp.take(flat, index.reshape(-1), axis=2).reshape(layers, heads, rows, longest, size).swapaxes(1, 2)
        before = [jnp.broadcast_to(part, (layers, rows, *part.shape[2:])) for part in shared]
        free = jnp.zeros((layers, rows, heads, slots, size), own.dtype)
        return constrain(
            jnp.concatenate([*before, own, free], axis=3), "layers", "batch", "heads", "length", "head_dim"
        )

    def row_by_row(own: jax.Array, head: jax.Array) -> jax.Array:
        before = jnp.broadcast_to(head, (rows, *head.shape))
        return jnp.concatenate([before, own, jnp.zeros((rows, slots), own.dtype)], axis=1)

    run = (
        laid_out(keys.swapaxes(3, 4), [run[0].swapaxes(3, 4) for run in cache.runs]).swapaxes(3, 4),
        laid_out(values, [run[1] for run in cache.runs]),
    )
    marks = row_by_row(marks, cache.segments[0])
    positions = row_by_row(positions.reshape(-1)[index], cache.positions[0])
    full = Cache((run,), marks, positions, jnp.int32(head.shape[1] + longest))
    return full, decoder.logits(hidden.reshape(-1, hidden.shape[-1])[index[:, -1]])


_apart = jax.jit(Decoder.layers_apart)


@partial(jax.jit, static_argnames=("max_new_tokens", "stops", "sampling", "dtype"))
def _write(decoder, adapters, apart, cache, logits, done, seen, key, *, max_new_tokens, stops, sampling, dtype):
    """Replies `[B, max_new_tokens]`, filled up with the first of `stops`.

    apart: `layers_apart`, or None for a scan over them. seen: the tokens of each prompt `[B, V]`, or None if it does
    not matter which have occurred.
    """
    done = constrain(done, "batch")
    if apart is not None:
        cache = dataclasses.replace(cache, runs=unstacked(cache.runs, len(apart)))
    forward = partial(decoder, adapters=adapters, dtype=dtype, apart=apart)

    def say(step, logits, replies, done, seen):
        token = jnp.where(done, stops[0], choose(logits, seen, jax.random.fold_in(key, step), sampling))
        ends = functools.reduce(operator.or_, (token == stop for stop in stops))
        if seen is not None:
            seen = seen | (jnp.arange(seen.shape[1]) == token[:, None])
        return token, jax.lax.dynamic_update_slice(replies, token[:, None], (0, step)), done | ends, seen

    def unfinished(state):
        step, *_, done, _ = state
        return (step < max_new_tokens) & ~done.all()

    def write(state):
        step, cache, position, token, replies, done, seen = state
        ones, position = jnp.ones_like(token)[:, None], position + 1
        marked = _marked(cache, ones, position[:, None])
        # Layer by layer the cache is written before it is read, or XLA copies it in between; a scan would copy it too.
        hidden, new = forward(token[:, None], ones, position[:, None], cache=cache if apart is None else marked)
        runs = _appended(cache, new) if apart is None else [(run,) for run in new]
        cache = dataclasses.replace(marked, runs=runs, length=cache.length + 1)
        return step + 1, cache, position, *say(step, decoder.logits(hidden[:, -1]), replies, done, seen)

    replies = jnp.full((len(done), max_new_tokens), stops[0], jnp.int32)
    position = cache.positions[:, -max_new_tokens - 1]
    state = (jnp.int32(1), cache, position, *say(0, logits, replies, done, seen))
    return constrain(jax.lax.while_loop(unfinished, write, state)[-3], None, None)


def head_cache(forward, head, rows: int) -> Cache:
    """A cache for `rows` lines, each row of which begins with `head` `[1, H]` (H may be 0).

    forward: the decoder with its adapters and its `dtype` bound by keyword.
    """
    shape = (rows, head.shape[1])
    segments = constrain(jnp.full(shape, SHARED, jnp.int32), "batch", "length")
    positions = constrain(jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape), "batch", "length")
    runs = (forward(head, keep_cache=True)[1],) if shape[1] else ()
    return Cache(runs, segments, positions, jnp.int32(shape[1]))


def _marked(cache: Cache, segments: jax.Array, positions: jax.Array) -> Cache:
    """The cache with the next slots' segments and positions."""
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache.length, axis=1)
    return dataclasses.replace(cache, segments=put(cache.segments, segments), positions=put(cache.positions, positions))


def _appended(cache: Cache, new: Run) -> tuple[Run, ...]:
    """The cache's one run with the next slots' keys and values."""
    return tuple(written(run, new, cache.length) for run in cast(tuple[Run, ...], cache.runs))
