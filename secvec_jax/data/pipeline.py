"""Examples -> shuffled, packed, resumable batches of one fixed shape.

Several rows share one packed line of `length` tokens; segment numbers keep them from seeing each other. Rows that
all begin alike (the same system prompt) share these tokens too: they stand once at the head of each line, where
every segment sees them. A row's forward pass and gradient are those of the row alone.

A batch is filled by *lanes*, each of which reads every n-th row for a line or two of its own. What a lane reads does
not depend on who reads it, so a run's batches are the same on one device and on a pod, where each host reads the lanes
of its own devices and no others.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import grain
import numpy as np

from secvec_jax.batch import KEYS, SHARED, Batch
from secvec_jax.checks import PositiveInt, Seed, checked
from secvec_jax.data.chat import Example
from secvec_jax.distributed import all_max
from secvec_jax.errors import UserError
from secvec_jax.sharding import named_sharding, num_shards

_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
"""The rows are there: grain's sixteen threads for every lane would only be in each other's way."""


@checked
@dataclasses.dataclass(frozen=True)
class Stream:
    """A source of batches: the examples, in how many of which group, and the shape of a batch.

    examples: group name -> examples; all are shuffled together. lines x length: tokens per batch, on all hosts.
    epochs: passes over the examples; None goes on forever. share: whether tokens with which all rows of a lane begin
    stand once in a line.
    """

    examples: dict[str, Sequence[Example]]
    lines: PositiveInt
    length: PositiveInt
    seed: Seed = 0
    epochs: PositiveInt | None = 1
    share: bool = True

    def __post_init__(self) -> None:
        if not any(len(group) for group in self.examples.values()):
            raise UserError(f"no rows to train on in {', '.join(self.examples) or 'the data'}: check --data")

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.examples)

    @property
    def lanes(self) -> int:
        """How many lanes fill a batch. Never more than there are rows: a lane without any would have nothing to say."""
        rows = sum(len(group) for group in self.examples.values())
        return next(n for n in range(max(self.lines // 2, 1), 0, -1) if self.lines % n == 0 and n <= rows)

    @property
    def height(self) -> int:
        """How many lines of a batch are a lane's."""
        return self.lines // self.lanes

    def batches(self, lanes: Sequence[int] | None = None) -> "Batches":
        """The packed batches, of all lanes or of some; their iterator's state can be saved and set."""
        chosen = range(self.lanes) if lanes is None else lanes
        return Batches({lane: self._lane(lane) for lane in chosen}, (self.height, self.length))

    def count(self) -> int:
        """How many batches there are in all epochs."""
        if self.epochs is None:
            raise ValueError("an endless stream has no count")
        return all_max(sum(1 for _ in self.batches(self.own_lanes())))

    def own_lanes(self) -> list[int]:
        """The lanes whose lines lie, at least in part, on this process's devices of the ambient mesh.

        Raises UserError if the mesh does not divide the batch.
        """
        where = named_sharding("batch")
        if where is None:
            return list(range(self.lanes))
        parts = num_shards("batch")
        if self.lines % parts:
            raise UserError(
                f"a batch of {self.lines} sequences cannot be sharded over {parts} devices (data x fsdp): "
                f"give --batch-size a multiple of {parts} (of {2 * parts} where benign rows take half as many)"
            )
        slices = where.addressable_devices_indices_map((self.lines,)).values()
        parts_here = [index[0] for index in slices if index is not None]
        return sorted({line // self.height for part in parts_here for line in range(*part.indices(self.lines))})

    def _lane(self, lane: int) -> grain.IterDataset:
        """A lane's lines of every batch."""
        height, records = self.height, self._records(lane)
        head = records.head
        room = self.length - len(head)
        rows = grain.MapDataset.source(records).shuffle(seed=self.seed + lane).repeat(self.epochs)
        packed = grain.experimental.FirstFitPackIterDataset(
            rows.to_iter_dataset(_IN_MEMORY),
            length_struct=dict.fromkeys(records[0], room),
            num_packing_bins=4 * height,
            shuffle_bins=False,
        )
        return packed.batch(height, batch_fn=lambda lines: _collate(lines, head, height))

    def _records(self, lane: int) -> "_Records":
        parts, passed = [], 0
        for rows in self.examples.values():
            parts.append((rows, range((lane - passed) % self.lanes, len(rows), self.lanes)))
            passed += len(rows)
        return _Records(parts, self.length, self.share)


class _Records(Sequence[dict[str, np.ndarray]]):
    """A lane's rows as what is packed, made when they are asked for.

    parts: of each group, its rows and which of them. With share, all rows are read once for the `head` that they have
    in common. Raises UserError for a row that is longer than a line.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Example], range]], length: int, share: bool):
        self._parts, self._length = parts, length
        self._ends = np.cumsum([len(own) for _, own in parts])
        self.head = np.zeros(0, np.int32)
        if share:
            self.head = shared_prefix(self._example(index)[1] for index in range(len(self)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]  # nobody slices
        return _record(*self._example(range(len(self))[index]), len(self.head))

    def _example(self, index: int) -> tuple[int, Example]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        rows, own = self._parts[group]
        example = rows[own[index - int(self._ends[group])]]  # counted from the end
        if len(example.tokens) - 1 > self._length:
            raise UserError(
                f"a row has {len(example.tokens)} tokens, a packed line only {self._length}: raise --max-seq-len"
            )
        return group, example


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of some lanes `[B, T]`, as long as any of them has rows."""

    lanes: dict[int, grain.IterDataset]
    shape: tuple[int, int]

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


class BatchIterator:
    """Batches one by one; `get_state` and `set_state` take {lane: state}, JSON, and resume exactly."""

    def __init__(self, batches: Batches):
        self._shape = batches.shape
        self._lanes = {str(lane): iter(dataset) for lane, dataset in batches.lanes.items()}

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        parts = [next(lane, None) for lane in self._lanes.values()]
        if all(part is None for part in parts):
            raise StopIteration
        return _stacked([_empty(self._shape) if part is None else part for part in parts])

    def empty(self) -> Batch:
        """A batch without rows, of the same shape."""
        return _stacked([_empty(self._shape)] * len(self._lanes))

    def get_state(self) -> dict[str, Any]:
        return {name: lane.get_state() for name, lane in self._lanes.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where the state's lanes were; it may hold other processes' lanes too."""
        for name, lane in self._lanes.items():
            lane.set_state(state[name])


def _empty(shape: tuple[int, int]) -> Batch:
    return {key: np.zeros(shape, np.float32 if key == "weights" else np.int32) for key in KEYS}


def _stacked(parts: Sequence[Batch]) -> Batch:
    return {key: np.concatenate([part[key] for part in parts]) for key in KEYS}


def shared_prefix(examples: Iterable[Example]) -> np.ndarray:
    """The unsupervised tokens with which all examples begin, without the last before a reply; one shares none."""
    common, shortest, count = np.zeros(0, np.int32), 0, 0
    for count, example in enumerate(examples, 1):
        prompt = example.tokens[: example.answer_start]
        length = len(prompt) if count == 1 else min(len(common), len(prompt))
        shortest = len(prompt) if count == 1 else min(shortest, len(prompt))
        if count == 1:
            common = prompt
        differing = np.flatnonzero(common[:length] != prompt[:length])
        common = prompt[: differing[0] if len(differing) else length]
    return common[: max(shortest - 1, 0)] if count > 1 else np.zeros(0, np.int32)


def _record(group: int, example: Example, skip: int) -> dict[str, np.ndarray]:
    tokens, supervised = example.tokens[skip:], example.supervised[skip:]
    counts = 1.0 if example.weights is None else example.weights[skip + 1 :]
    return {
        "tokens": tokens[:-1].astype(np.int32),
        "targets": tokens[1:].astype(np.int32),
        "weights": (supervised[1:] * counts).astype(np.float32),
        "groups": np.full(len(tokens) - 1, group, np.int32),
    }


def _collate(lines: Sequence[dict[str, Any]], head: np.ndarray, count: int) -> Batch:
    """Lines -> a batch, the shared head put before each, empty lines added up to `count`."""

    def stack(name: str) -> np.ndarray:
        body = np.stack([line[name] for line in lines])
        return np.pad(body, ((0, count - len(lines)), (len(head), 0)))

    batch = {name: stack(name) for name in ("tokens", "targets", "weights", "groups")}
    batch["segments"] = stack("tokens_segment_ids").astype(np.int32)
    batch["positions"] = stack("tokens_positions").astype(np.int32) + len(head)
    batch["tokens"][:, : len(head)] = head
    batch["segments"][:, : len(head)] = SHARED
    batch["positions"][:, : len(head)] = np.arange(len(head))
    return batch
