"""Decoding: jitted, batched, with a key-value cache; greedy or sampled.

A prefix that all prompts share (the system prompt) is read once, and all rows attend to its cache. The rest of the
prompts is read in packed sequences, as in training. Its keys and values are then rearranged into one row per prompt,
with padding on the left, so that all replies start at the same slot.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from secvec_jax.batch import SHARED, check_token_ids, common_prefix
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.decoder import Decoder
from secvec_jax.model.kv_cache import KVCache, KVSegment
from secvec_jax.model.sampling import GREEDY, Sampling, choose
from secvec_jax.sharding import constrain, num_shards, platform
from secvec_jax.trees import unstacked

_BUCKET, _SLOT_BUCKET = 16, 64
"""The length of packed sequences and the number of a cache's slots are rounded up to multiples of these."""
_NO_TOKEN = -1
_PROMPTS_PER_SEQUENCE, _TOKENS_PER_SEQUENCE = 8, 512
"""Prompts are packed until a sequence has, on average, this many prompts or tokens; one prompt may be longer."""
_SHORT = 128
"""Prompts of up to this many tokens are batched together: their cache is tiny compared with the weights."""


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
    """The tokens that follow each prompt, up to the first stop token, which is left out.

    prompts: token ids, one array each. stop: one token or several. progress is called with the number of prompts done
    after each batch. Adapters are applied at every step: merge LoRA adapters first (`vectors.lora.merge_adapters`).
    Raises UserError for a token id that the decoder has no embedding for.
    """
    if not prompts:
        return []
    vocab_size = decoder.architecture.vocab_size
    for number, prompt in enumerate(prompts, 1):
        check_token_ids(prompt, vocab_size, f"prompt {number}")
    shared_prefix = common_prefix(prompts)
    suffixes = [np.asarray(prompt[len(shared_prefix) :]) for prompt in prompts]
    replies: dict[int, list[int]] = {}
    unrolled = decoder.unrolled_layers(adapters) if platform() == "cpu" else None
    stops = (stop if isinstance(stop, tuple) else (stop,)) or (_NO_TOKEN,)
    options = {"stops": stops, "sampling": sampling, "dtype": dtype}
    for rows, batches in batches_by_length(suffixes, batch_size):
        packed_batches = pack_prompts([[suffixes[i] for i in batch] for batch in batches], rows, len(shared_prefix))
        longest = packed_batches[0].indices.shape[1]
        slots = rounded_up(len(shared_prefix) + longest + max_new_tokens, _SLOT_BUCKET)
        for batch, packed in zip(batches, packed_batches):
            packed = packed.with_free_slots(slots - len(shared_prefix) - longest)
            arguments = (shared_prefix[None], *packed, np.int32(longest))
            cache, logits = _prefill(decoder, adapters, *arguments, stacked=unrolled is None, dtype=dtype)
            key = jax.random.fold_in(jax.random.key(seed), len(replies))
            done = np.arange(rows) >= len(batch)
            occurred = None
            if sampling.repetition_penalty != 1:
                occurred = np.zeros((rows, vocab_size), bool)
                for row, i in enumerate(batch):
                    occurred[row, prompts[i]] = True
            state = (cache, logits, done, occurred, key, np.int32(max_new_tokens))
            # The returned cache is dropped: it would be in memory together with the next batch's.
            tokens = np.asarray(_decode(decoder, adapters, unrolled, *state, **options)[0])
            for i, row in zip(batch, tokens[:, :max_new_tokens]):
                ends = np.flatnonzero(np.isin(row, stops))
                replies[i] = row[: ends[0] if len(ends) else None].tolist()
            progress(len(replies))
    return [replies[i] for i in range(len(prompts))]


def batches_by_length(
    suffixes: Sequence[np.ndarray], batch_size: int, max_tokens: int | None = None
) -> list[tuple[int, list[list[int]]]]:
    """(rows, batches of indices) for each power of two that suffixes' lengths are rounded up to.

    The batches of one power are of one size, and each takes every n-th suffix by length. So one compiled program serves
    all of them, and no batch is mostly padding. max_tokens: limit for a batch, with all suffixes counted at that power;
    None: only `batch_size` limits its rows.
    """
    by_length: dict[int, list[int]] = {}
    for i in sorted(range(len(suffixes)), key=lambda i: len(suffixes[i])):
        by_length.setdefault(max(_SHORT, 1 << (len(suffixes[i]) - 1).bit_length()), []).append(i)
    groups = []
    for length, members in by_length.items():
        max_rows = batch_size if max_tokens is None else max(1, min(batch_size, max_tokens // length))
        count = -(-len(members) // max_rows)
        rows = rounded_up(-(-len(members) // count), num_shards("batch"))
        groups.append((rows, [members[first::count] for first in range(count)]))
    return groups


class PackedPrompts(NamedTuple):
    """Prompts packed into P sequences of W tokens, and where each prompt's tokens are in them.

    tokens, segments, positions: `[P, W]`. indices, marks: `[B, T]`, one row per prompt, padded on the left: each
    token's index in the flattened sequences, and 1 where there is a token.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    indices: np.ndarray
    marks: np.ndarray

    def with_free_slots(self, count: int) -> "PackedPrompts":
        """The same with `count` slots after each prompt's last token, marked 0, which no token attends to."""
        indices, marks = (np.pad(array, ((0, 0), (0, count))) for array in (self.indices, self.marks))
        return self._replace(indices=indices, marks=marks)


def pack_prompts(batches: Sequence[Sequence[np.ndarray]], rows: int, prefix_len: int) -> list[PackedPrompts]:
    """Each batch of suffixes packed into sequences of about the same length, all batches in the same shapes.

    A suffix that begins another one is not packed: it is read with it. A batch with fewer suffixes than `rows` is
    filled with suffixes of one token, so that no row is empty.
    """
    filled = [[*batch, *[np.zeros(1, np.int32)] * (rows - len(batch))] for batch in batches]
    holders = [_holders(batch) for batch in filled]
    lengths = [{row: len(batch[row]) for row in sorted(set(holder_of))} for batch, holder_of in zip(filled, holders)]
    max_rows, max_tokens = max(map(len, lengths)), max(sum(of_row.values()) for of_row in lengths)
    needed = max(-(-max_rows // _PROMPTS_PER_SEQUENCE), -(-max_tokens // _TOKENS_PER_SEQUENCE))
    count = rounded_up(min(max_rows, needed), num_shards("batch"))
    assignments = [_assigned(of_row, count) for of_row in lengths]
    width = max(
        sum(len(batch[row]) for row in sequence)
        for batch, assignment in zip(filled, assignments)
        for sequence in assignment
    )
    longest = max(len(suffix) for batch in filled for suffix in batch)
    shape = (count, rounded_up(width, _BUCKET))
    return [
        _pack(batch, holder_of, assignment, shape, longest, prefix_len)
        for batch, holder_of, assignment in zip(filled, holders, assignments)
    ]


def _holders(suffixes: Sequence[np.ndarray]) -> list[int]:
    """For each suffix, the index of one that starts with it: its own index, if no other suffix does."""
    tokens = [suffix.tolist() for suffix in suffixes]
    order = sorted(range(len(tokens)), key=lambda index: tokens[index])
    holders = list(range(len(tokens)))
    for index, following in reversed(
        [*itertools.pairwise(order)]
    ):  # suffixes that start with this one follow it directly
        if tokens[following][: len(tokens[index])] == tokens[index]:
            holders[index] = holders[following]
    return holders


def _assigned(lengths: Mapping[int, int], count: int) -> list[list[int]]:
    """The rows of each of `count` sequences: the longest row first, each to the sequence with the fewest tokens."""
    sequences: list[list[int]] = [[] for _ in range(count)]
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        min(sequences, key=lambda sequence: sum(lengths[other] for other in sequence)).append(row)
    return sequences


def _pack(
    suffixes: Sequence[np.ndarray],
    holders: Sequence[int],
    assignment: Sequence[Sequence[int]],
    shape: tuple[int, int],
    longest: int,
    prefix_len: int,
) -> PackedPrompts:
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    indices, marks = (np.zeros((len(suffixes), longest), np.int32) for _ in range(2))
    starts: dict[int, int] = {}
    for number, sequence in enumerate(assignment):
        start = 0
        for segment, row in enumerate(sequence, 1):
            length = len(suffixes[row])
            end = start + length
            tokens[number, start:end] = suffixes[row]
            segments[number, start:end] = segment
            positions[number, start:end] = prefix_len + np.arange(length)
            starts[row] = number * shape[1] + start
            start = end
    for row, suffix in enumerate(suffixes):
        indices[row, longest - len(suffix) :] = starts[holders[row]] + np.arange(len(suffix))
        marks[row, longest - len(suffix) :] = 1
    return PackedPrompts(tokens, segments, positions, indices, marks)


def rounded_up(length: int, bucket: int) -> int:
    """The next multiple of `bucket`: shapes in buckets keep the number of compiled programs small."""
    return -(-length // bucket) * bucket


@partial(jax.jit, static_argnames=("stacked", "dtype"))
def _prefill(decoder, adapters, shared_prefix, tokens, segments, positions, indices, marks, longest, *, stacked, dtype):
    """The cache after the prompts, and the logits `[B, V]` of the first reply token.

    stacked: whether the cache is one part, stacked over layers; else it has a part for each layer. shared_prefix
    `[1, H]`; the other arrays are those of `PackedPrompts.with_free_slots`. longest: how many of their T slots are the
    prompts'; an array, so that one program serves all lengths.
    """
    tokens, segments, positions, indices, marks = (
        constrain(x, "batch", "length") for x in (tokens, segments, positions, indices, marks)
    )
    cache = prefix_cache(decoder, adapters, shared_prefix, len(tokens), dtype)
    hidden, (keys, values) = decoder.prefill(tokens, segments, positions, adapters, cache, dtype)
    prefix = cache.parts[0] if cache.parts else KVSegment(keys[:, :1, ..., :0], values[:, :1, :, :0])
    rows, slots = indices.shape

    def one_row_per_prompt(packed: jax.Array, prefix: jax.Array) -> jax.Array:
        """`[P, K, W, H]` of a layer -> `[B, K, S, H]`: slots of the prefix, of the prompt, and free ones."""
        _, heads, _, size = packed.shape
        flat = packed.swapaxes(0, 1).reshape(heads, -1, size)
        prompt = jnp.take(flat, indices.reshape(-1), axis=1).reshape(heads, rows, slots, size).swapaxes(0, 1)
        before = jnp.broadcast_to(prefix, (rows, *prefix.shape[1:]))
        return jnp.concatenate([before, prompt], axis=2)

    def of_layer(layer: tuple[KVSegment, KVSegment]) -> KVSegment:
        packed, prefix = layer
        keys = one_row_per_prompt(packed.keys.swapaxes(2, 3), prefix.keys.swapaxes(2, 3)).swapaxes(2, 3)
        return KVSegment(keys, one_row_per_prompt(packed.values, prefix.values))

    def with_prefix(prompt: jax.Array, prefix: jax.Array) -> jax.Array:
        """`[B, T]` -> `[B, S]`"""
        return jnp.concatenate([jnp.broadcast_to(prefix, (rows, *prefix.shape)), prompt], axis=1)

    by_layer = (KVSegment(keys, values), prefix)
    if stacked:
        parts = (_constrained(jax.vmap(of_layer)(by_layer), "layers"),)
    else:
        parts = tuple(_constrained(of_layer(layer)) for layer in unstacked(by_layer, len(keys)))
    row_segments = with_prefix(marks, cache.segments[0])
    row_positions = with_prefix(positions.reshape(-1)[indices], cache.positions[0])
    last = jax.lax.dynamic_index_in_dim(indices, longest - 1, axis=1, keepdims=False)
    last_hidden = hidden.reshape(-1, hidden.shape[-1])[last]
    length = jnp.int32(shared_prefix.shape[1] + longest)
    return KVCache(parts, row_segments, row_positions, length), decoder.logits(last_hidden)


def _constrained(part: KVSegment, *layers: str) -> KVSegment:
    keys = constrain(part.keys, *layers, "batch", "heads", "head_dim", "length")
    return KVSegment(keys, constrain(part.values, *layers, "batch", "heads", "length", "head_dim"))


@partial(jax.jit, static_argnames=("stops", "sampling", "dtype"), donate_argnames="cache")
def _decode(decoder, adapters, unrolled, cache, logits, done, occurred, key, max_new_tokens, *, stops, sampling, dtype):
    """Replies `[B, S]`, of which the first `max_new_tokens` count, padded with the first of `stops`; and the cache.

    The cache is donated, and returned so that it is written in place.

    max_new_tokens: an array, so that one program serves all lengths for which the cache has free slots.
    unrolled: `unrolled_layers`, or None for a scan over the layers. logits `[B, V]`: of the first token. done `[B]`:
    rows without a prompt. occurred `[B, V]`: the tokens that each row has so far, or None if sampling ignores them.
    """
    done = constrain(done, "batch")
    position = jax.lax.dynamic_index_in_dim(cache.positions, cache.length - 1, axis=1, keepdims=False)

    def append(step, logits, replies, done, occurred):
        token = jnp.where(done, stops[0], choose(logits, occurred, jax.random.fold_in(key, step), sampling))
        is_stop = functools.reduce(operator.or_, (token == stop for stop in stops))
        if occurred is not None:
            occurred = occurred | (jnp.arange(occurred.shape[1]) == token[:, None])
        replies = jax.lax.dynamic_update_slice(replies, token[:, None], (0, step))
        return token, replies, done | is_stop, occurred

    def unfinished(state):
        step, *_, done, _ = state
        return (step < max_new_tokens) & ~done.all()

    def advance(state):
        step, cache, position, token, replies, done, occurred = state
        position = position + 1
        hidden, cache = decoder.decode_step(token[:, None], position[:, None], cache, adapters, dtype, unrolled)
        return step + 1, cache, position, *append(step, decoder.logits(hidden[:, -1]), replies, done, occurred)

    replies = jnp.full(cache.positions.shape, stops[0], jnp.int32)
    state = (jnp.int32(1), cache, position, *append(0, logits, replies, done, occurred))
    _, cache, _, _, replies, _, _ = jax.lax.while_loop(unfinished, advance, state)
    return constrain(replies, None, None), cache


def prefix_cache(
    decoder: Decoder, adapters: tuple[Adapter, ...], shared_prefix: jax.Array, rows: int, dtype: DTypeLike
) -> KVCache:
    """The cache of a prefix `[1, H]` that all of `rows` sequences share; H may be 0."""
    shape = (rows, shared_prefix.shape[1])
    segments = constrain(jnp.full(shape, SHARED, jnp.int32), "batch", "length")
    positions = constrain(jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape), "batch", "length")
    parts: tuple[KVSegment, ...] = ()
    if shape[1]:
        _, prefix = decoder.prefill(shared_prefix, adapters=adapters, dtype=dtype)
        parts = (prefix,)
    return KVCache(parts, segments, positions, jnp.int32(shape[1]))
