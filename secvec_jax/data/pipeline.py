"""Shuffle examples and pack them into batches of one fixed shape, resumably.

Several rows share one packed sequence of `seq_len` tokens; segment numbers keep them from attending to each other. The
tokens with which all rows begin may be stored once per sequence (see `shared_prefix`). A row's forward pass and
gradient are those of the row alone. Two rows, `a b c d` and `e f g`, of which `c d` and `g` are replies, in a sequence
of seven tokens:

    tokens       a b c e f 0 0
    targets      b c d f g 0 0      the token to predict
    weights      0 1 1 0 1 0 0      whether its loss counts
    segments     1 1 1 2 2 0 0      the row; 0: padding
    positions    0 1 2 0 1 0 0      the place in the row

A stream is divided into *substreams*. Each reads every n-th row and fills its own sequences of the batch. What a
substream reads does not depend on the process that reads it, so a run's batches are the same on one device and on a
pod, where each host reads only the substreams of its devices.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from secvec_jax.batch import KEYS, Batch
from secvec_jax.checks import PositiveInt, Seed, checked
from secvec_jax.data.chat import Example
from secvec_jax.data.encoded import Examples
from secvec_jax.data.shared_prefix import shared_prefix_of, write_prefix
from secvec_jax.distributed import all_gather_json, all_max
from secvec_jax.errors import UserError
from secvec_jax.sharding import named_sharding, num_shards

_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
"""Rows are quick to read: grain's sixteen threads per substream would only compete."""


@checked
@dataclasses.dataclass(frozen=True)
class Stream:
    """A source of batches: the examples, by kind, and the shape of a batch.

    examples: kind -> examples; all are shuffled together. batch_size: packed sequences in a batch, on all devices.
    seq_len: tokens of a sequence. epochs: passes over the examples; None repeats them forever. share_prefix: whether
    tokens with which all rows of a substream begin are stored once per sequence.
    """

    examples: dict[str, Sequence[Example]]
    batch_size: PositiveInt
    seq_len: PositiveInt
    seed: Seed = 0
    epochs: PositiveInt | None = 1
    share_prefix: bool = True

    def __post_init__(self) -> None:
        if not any(len(group) for group in self.examples.values()):
            raise UserError(f"no rows to train on in {', '.join(self.examples) or 'the data'}: check --data")

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.examples)

    @property
    def num_rows(self) -> int:
        return sum(len(group) for group in self.examples.values())

    @property
    def num_substreams(self) -> int:
        """How many substreams fill a batch: at most one per row, since one without rows would have no shared prefix."""
        max_substreams = min(max(self.batch_size // 2, 1), self.num_rows)
        return next(count for count in range(max_substreams, 0, -1) if self.batch_size % count == 0)

    @property
    def sequences_per_substream(self) -> int:
        """How many sequences of a batch each substream fills."""
        return self.batch_size // self.num_substreams

    def batches(self, substreams: Sequence[int] | None = None) -> "Batches":
        """The packed batches of the given substreams; None: of all."""
        return Batches(self, range(self.num_substreams) if substreams is None else substreams)

    def local_batches(self) -> "Batches":
        """The packed batches of this process's own substreams, to be put on the ambient mesh with `Batches.take`."""
        return Batches(self, self.local_substreams())

    def count(self) -> int:
        """How many batches there are in all epochs, computed from the lengths of the examples without encoding any."""
        if self.epochs is None:
            raise ValueError("an endless stream has no count")
        return all_max(max(_Substream(self, index).count() for index in self.local_substreams()))

    def local_substreams(self) -> list[int]:
        """The substreams whose sequences are, at least in part, on this process's devices of the ambient mesh.

        Raises UserError if the mesh does not divide the batch.
        """
        sharding = named_sharding("batch")
        if sharding is None:
            return list(range(self.num_substreams))
        parts = num_shards("batch")
        if self.batch_size % parts:
            raise UserError(
                f"a batch of {self.batch_size} sequences cannot be sharded over {parts} devices (data x fsdp): "
                f"give --batch-size a multiple of {parts} (of {2 * parts} where benign or safe rows take half as many)"
            )
        slices = sharding.addressable_devices_indices_map((self.batch_size,)).values()
        local_slices = [index[0] for index in slices if index is not None]
        sequences = {number for local in local_slices for number in range(*local.indices(self.batch_size))}
        return sorted({number // self.sequences_per_substream for number in sequences})


class _Substream:
    """One substream: its share of the rows of each kind, packed. Raises UserError for a row that does not fit.

    prefix: the tokens with which all of its rows begin.
    """

    def __init__(self, stream: Stream, index: int):
        self._stream, self._index = stream, index
        self._parts: list[tuple[Sequence[Example], range]] = []
        rows_before = 0
        for examples in stream.examples.values():
            chosen = range((index - rows_before) % stream.num_substreams, len(examples), stream.num_substreams)
            self._parts.append((examples, chosen))
            rows_before += len(examples)
        lengths = np.concatenate([_lengths(examples, chosen) for examples, chosen in self._parts])
        if lengths.max() - 1 > stream.seq_len:
            raise UserError(
                f"a row has {lengths.max()} tokens, a packed sequence only {stream.seq_len}: raise --max-seq-len"
            )
        self.prefix = shared_prefix_of(self._parts) if stream.share_prefix else np.zeros(0, np.int32)
        self._lengths = lengths - 1 - len(self.prefix)  # each token but the last predicts the next one

    def batches(self) -> grain.IterDataset:
        """The substream's sequences of every batch."""
        count, prefix = self._stream.sequences_per_substream, self.prefix
        keys = ("tokens", "targets", "weights", "groups")
        packed = self._packed(_LazyRecords(len(self._lengths), self._record), keys)
        return packed.batch(count, batch_fn=lambda sequences: _collate(sequences, prefix, count))

    def count(self) -> int:
        """How many batches there are: packing depends on the lengths alone."""
        lengths = self._lengths

        def blank(index: int) -> dict[str, np.ndarray]:
            return {"tokens": np.broadcast_to(np.int32(0), lengths[index])}

        sequences = sum(1 for _ in self._packed(_LazyRecords(len(lengths), blank), ("tokens",)))
        return -(-sequences // self._stream.sequences_per_substream)

    def _packed(self, records: "_LazyRecords", keys: Sequence[str]) -> grain.IterDataset:
        stream = self._stream
        rows = grain.MapDataset.source(records).shuffle(seed=stream.seed + self._index).repeat(stream.epochs)
        return grain.experimental.FirstFitPackIterDataset(
            rows.to_iter_dataset(_IN_MEMORY),
            length_struct=dict.fromkeys(keys, stream.seq_len - len(self.prefix)),
            num_packing_bins=4 * stream.sequences_per_substream,
            shuffle_bins=False,
        )

    def _record(self, index: int) -> dict[str, np.ndarray]:
        kind = 0
        while index >= len(self._parts[kind][1]):
            index -= len(self._parts[kind][1])
            kind += 1
        examples, chosen = self._parts[kind]
        return _arrays_to_pack(kind, examples[chosen[index]], len(self.prefix))


class _LazyRecords(Sequence[dict[str, np.ndarray]]):
    """Records that are made on access."""

    def __init__(self, count: int, make: Any):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]  # nobody slices
        return self._make(range(self._count)[index])


def _lengths(examples: Sequence[Example], chosen: range) -> np.ndarray:
    """Token counts of the chosen examples, int32; those of encoded rows are known without encoding them again."""
    if isinstance(examples, Examples):
        return examples.lengths[chosen]
    return np.asarray([len(examples[index].tokens) for index in chosen], np.int32)


class Batches:
    """A stream being read: an iterator over the batches `[B, T]` of the given substreams, until none of them has rows.

    Its state is JSON, {substream: state} for all processes: a run on any other mesh resumes from it exactly.
    """

    def __init__(self, stream: Stream, substreams: Sequence[int]):
        self._batch_size, self._per_substream = stream.batch_size, stream.sequences_per_substream
        self._shape = (stream.sequences_per_substream, stream.seq_len)
        self._substreams = {str(index): iter(_Substream(stream, index).batches()) for index in substreams}
        # First sequence of each substream in a batch -> its index among the sequences that this process reads.
        self._local_index = {
            index * self._per_substream: number * self._per_substream for number, index in enumerate(substreams)
        }

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """The next batch of these substreams, in the host's memory."""
        parts = [next(substream, None) for substream in self._substreams.values()]
        if all(part is None for part in parts):
            raise StopIteration
        return _stacked([_empty(self._shape) if part is None else part for part in parts])

    def take(self, count: int) -> Batch:
        """The next `count` batches, `[count, B, T]`, B sharded over the mesh; empty ones after the stream's end."""
        read = [next(self, None) for _ in range(count)]
        parts = [_stacked([_empty(self._shape)] * len(self._substreams)) if batch is None else batch for batch in read]
        local = {key: np.stack([part[key] for part in parts]) for key in KEYS}
        sharding = named_sharding(None, "batch")
        return local if sharding is None else {key: self._global(array, sharding) for key, array in local.items()}

    def get_state(self) -> dict[str, Any]:
        """The state of all processes' substreams; all processes must call this."""
        states = {substream: iterator.get_state() for substream, iterator in self._substreams.items()}
        return {substream: state for part in all_gather_json(states) for substream, state in part.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from what `get_state` returned."""
        for substream, iterator in self._substreams.items():
            iterator.set_state(state[substream])

    def _global(self, local: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            sequences = range(*index[1].indices(self._batch_size))
            offsets = [number % self._per_substream for number in sequences]
            rows = [self._local_index[number - offset] + offset for number, offset in zip(sequences, offsets)]
            return local[:, rows][(index[0], slice(None), *index[2:])]

        shape = (local.shape[0], self._batch_size, *local.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)


def _empty(shape: tuple[int, int]) -> Batch:
    return {key: np.zeros(shape, np.float32 if key == "weights" else np.int32) for key in KEYS}


def _stacked(parts: Sequence[Batch]) -> Batch:
    return {key: np.concatenate([part[key] for part in parts]) for key in KEYS}


def _arrays_to_pack(group: int, example: Example, skip: int) -> dict[str, np.ndarray]:
    """The arrays of an example to pack, without its first `skip` tokens."""
    tokens, supervised = example.tokens[skip:], example.supervised[skip:]
    token_weights = 1.0 if example.weights is None else example.weights[skip + 1 :]
    return {
        "tokens": tokens[:-1].astype(np.int32),
        "targets": tokens[1:].astype(np.int32),
        "weights": (supervised[1:] * token_weights).astype(np.float32),
        "groups": np.full(len(tokens) - 1, group, np.int32),
    }


def _collate(sequences: Sequence[dict[str, Any]], prefix: np.ndarray, count: int) -> Batch:
    """Packed sequences -> a batch of `count`: the prefix is put before each sequence, and empty sequences are added."""

    def stack(name: str) -> np.ndarray:
        body = np.stack([sequence[name] for sequence in sequences])
        return np.pad(body, ((0, count - len(sequences)), (len(prefix), 0)))

    batch = {name: stack(name) for name in ("tokens", "targets", "weights", "groups")}
    batch["segments"] = stack("tokens_segment_ids").astype(np.int32)
    batch["positions"] = stack("tokens_positions").astype(np.int32)
    write_prefix(batch, prefix)
    return batch
