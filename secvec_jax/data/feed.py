"""Batches on the ambient mesh: each process reads the lanes of its own devices and no others."""

from typing import Any

import jax
import numpy as np

from secvec_jax.batch import Batch
from secvec_jax.data.pipeline import Stream
from secvec_jax.distributed import all_gather_json
from secvec_jax.sharding import named_sharding


class Feed:
    """A stream at work. Its state is that of all lanes, whoever reads them: any other mesh can go on from it."""

    def __init__(self, stream: Stream):
        lanes = stream.own_lanes()
        self._height = stream.height
        self._lines = stream.lines
        # Where each of the lanes' lines stands in what this process reads.
        self._own = {lane * self._height: index * self._height for index, lane in enumerate(lanes)}
        self._batches = iter(stream.batches(lanes))

    def take(self, count: int) -> Batch:
        """The next `count` batches, `[count, B, T]`, B spread over the mesh; empty ones after the stream's end."""
        read = [next(self._batches, None) for _ in range(count)]
        parts = [self._batches.empty() if batch is None else batch for batch in read]
        local = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        where = named_sharding(None, "batch")
        return local if where is None else {key: self._global(array, where) for key, array in local.items()}

    def _global(self, local: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            lines = range(*index[1].indices(self._lines))
            own = [self._own[line - line % self._height] + line % self._height for line in lines]
            return local[:, own][(index[0], slice(None), *index[2:])]

        shape = (local.shape[0], self._lines, *local.shape[2:])
        return jax.make_array_from_callback(shape, where, part)

    def get_state(self) -> dict[str, Any]:
        """{lane: state} of all lanes; every process must ask."""
        return {lane: state for part in all_gather_json(self._batches.get_state()) for lane, state in part.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` returned."""
        self._batches.set_state(state)
