"""Examples -> shuffled, packed, resumable batches of one fixed shape.

Several rows share one packed line of `length` tokens; segment numbers keep them from seeing each other. Rows that
all begin alike (the same system prompt) share these tokens too: they stand once at the head of each line, where
every segment sees them. A row's forward pass and gradient are those of the row alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from secvec_jax.batch import SHARED, Batch, common_head
from secvec_jax.data.chat import Example
from secvec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stream:
    """A source of batches: the examples, in how many of which group, and the shape of a batch.

    examples: group name -> examples; all are shuffled together. lines x length: tokens per batch.
    epochs: passes over the examples; None goes on forever.
    """

    examples: dict[str, Sequence[Example]]
    lines: int
    length: int
    seed: int = 0
    epochs: int | None = 1

    def __post_init__(self) -> None:
        if not any(len(group) for group in self.examples.values()):
            raise UserError(f"no rows to train on in {', '.join(self.examples) or 'the data'}: check --data")
        longest = max(len(e.tokens) for group in self.examples.values() for e in group)
        if longest - 1 > self.length:
            raise UserError(f"a row has {longest} tokens, a packed line only {self.length}: raise --length")

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.examples)

    def batches(self) -> grain.IterDataset:
        """The packed batches; their iterator's state can be saved and set, which resumes exactly."""
        head, records = self._records()
        room = self.length - len(head)
        rows = grain.MapDataset.source(records).shuffle(seed=self.seed).repeat(self.epochs).to_iter_dataset()
        packed = grain.experimental.FirstFitPackIterDataset(
            rows, length_struct=dict.fromkeys(records[0], room), num_packing_bins=4 * self.lines, shuffle_bins=False
        )
        return packed.batch(self.lines, batch_fn=lambda lines: _collate(lines, head, self.lines))

    def count(self) -> int:
        """How many batches there are in all epochs."""
        if self.epochs is None:
            raise ValueError("an endless stream has no count")
        return sum(1 for _ in self.batches())

    def _records(self) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        everything = [(index, e) for index, group in enumerate(self.examples.values()) for e in group]
        head = shared_head([example for _, example in everything])
        return head, [_record(example, index, len(head)) for index, example in everything]


def shared_head(examples: Sequence[Example]) -> np.ndarray:
    """The unsupervised tokens with which all examples begin, without the last before a reply; one shares none."""
    prompts = [e.tokens[: int(e.supervised.argmax())] for e in examples]
    return common_head(prompts if len(prompts) > 1 else [np.zeros(0, np.int32)])


def _record(example: Example, group: int, skip: int) -> dict[str, np.ndarray]:
    tokens, supervised = example.tokens[skip:], example.supervised[skip:]
    return {
        "tokens": tokens[:-1].astype(np.int32),
        "targets": tokens[1:].astype(np.int32),
        "weights": supervised[1:].astype(np.float32),
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
