"""TPU chips and the torus that connects them, for estimating how long collectives take.

The assumptions are documented in `schedule`.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from secvec_jax.model.flops import PEAK_FLOPS
from secvec_jax.planning.hlo import Op


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip, in FLOP/s (bf16), bytes, bytes/s and Hz."""

    name: str
    peak: float
    memory: int
    memory_bandwidth: float
    interconnect: float
    """outgoing bandwidth of the chip, over all links"""
    links: int
    """two per axis of the torus"""
    ring: int
    """an axis wraps around if its extent is a multiple of this; in three dimensions, only if every axis does"""
    clock: float
    """converts the compiler's cycles into seconds"""

    @property
    def link_bandwidth(self) -> float:
        return 0.9 * self.interconnect / self.links


CHIPS = {
    "TPU v4": Chip("v4", PEAK_FLOPS["TPU v4"], 32 << 30, 1228e9, 2400e9 / 8, links=6, ring=4, clock=1.05e9),
    "TPU v5 lite": Chip("v5e", PEAK_FLOPS["TPU v5 lite"], 16 << 30, 819e9, 1600e9 / 8, links=4, ring=16, clock=1.5e9),
    "TPU v5": Chip("v5p", PEAK_FLOPS["TPU v5"], 95 << 30, 2765e9, 4800e9 / 8, links=6, ring=4, clock=1.75e9),
    "TPU v6 lite": Chip("v6e", PEAK_FLOPS["TPU v6 lite"], 32 << 30, 1640e9, 3584e9 / 8, links=4, ring=16, clock=1.75e9),
}
"""device_kind -> chip. One device is one chip; v4 has two devices per chip without `chip_config_name="megacore"`."""


COLLECTIVES = frozenset(
    "all-gather reduce-scatter all-reduce all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)
GROUPS = (
    r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\(\S+\))? \{[^}]*\}"  # mesh['a'=4,'b'=2], device_ids=(..) {'a'}
    r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{\{.*?\}\}|\{\})"  # [2,4]<=[4,2]T(1,0); {{0,1},{2,3}}; {}: all
)


class Torus:
    """The torus coordinates of the mesh's devices: how long a collective takes, and which resources it occupies.

    A resource is an axis of the torus with a direction along it.
    """

    def __init__(self, chip: Chip, coords: Sequence[Sequence[int]]) -> None:
        self.chip = chip
        self.coords = np.array(coords) - np.min(coords, 0)
        self.extent = (self.coords.max(0) + 1).tolist()
        closed = [extent % chip.ring == 0 for extent in self.extent]
        self.closed = closed if chip.links == 4 or all(closed) else [False] * len(closed)
        self.share = functools.cache(self._share)
        self.route = functools.cache(self._route)

    def transfer(self, kind: str, op: Op, size: float) -> tuple[float, float, frozenset]:
        """Return (bytes that a chip sends, seconds, resources) for operands of `size` bytes per chip."""
        if kind == "collective-permute":
            load, resources = self.route(op.read(r"source_target_pairs=\{(.*?\})\}"))
            return size, size * load / self.chip.link_bandwidth, resources
        members, links, resources = self.share(op.read(GROUPS))
        sent = size * (members - 1) / members * {"all-gather": members, "all-reduce": 2}.get(kind, 1)
        # A point-to-point message crosses a quarter of the ring on average, more if the axis does not wrap around.
        hops = max(1.0, members / 4) if "all-to-all" in kind else 1.0
        return sent, sent * hops / (links * self.chip.link_bandwidth), resources

    def _share(self, text: str) -> tuple[int, int, frozenset]:
        """Return (members of a group, links that each member uses, resources)."""
        groups = replica_groups(text, len(self.coords))
        links, resources = [], set()
        for group in groups:
            spanned = [len(set(axis)) for axis in self.coords[group].T.tolist()]
            used = [axis for axis, count in enumerate(spanned) if count > 1]
            links.append(sum(1 + (self.closed[axis] and spanned[axis] == self.extent[axis]) for axis in used))
            resources |= {(axis, direction) for axis in used for direction in (1, -1)}
        return groups.shape[1], max(1, min(links)), frozenset(resources)

    def _route(self, text: str) -> tuple[int, frozenset]:
        """Return (messages over the busiest link, resources)."""
        load: Counter[tuple] = Counter()
        for source, target in re.findall(r"(\d+),(\d+)", text):
            position, goal = self.coords[int(source)].tolist(), self.coords[int(target)].tolist()
            for axis, (extent, closed) in enumerate(zip(self.extent, self.closed)):
                steps = goal[axis] - position[axis]
                if closed and abs(steps) > extent / 2:
                    steps -= int(math.copysign(extent, steps))
                direction = 1 if steps > 0 else -1
                for _ in range(abs(steps)):
                    load[*position, axis, direction] += 1
                    position[axis] = (position[axis] + direction) % extent
        return max(load.values(), default=0), frozenset((axis, direction) for *_, axis, direction in load)


def replica_groups(text: str, devices: int) -> np.ndarray:
    """Parse the `GROUPS` of a collective over this many devices: their indices in the mesh, `[groups, members]`."""
    if text.startswith("{"):
        groups = [_integers(group) for group in re.findall(r"\d[\d,]*", text)]
        return np.array(groups or [list(range(devices))])
    if text.startswith("["):
        shape, source = text.split("<=")
        return _permutation(source).reshape(_integers(shape))
    sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", text)}
    given = re.search(r"device_ids=\((\S+)\)", text)
    order = _permutation(given[1]) if given else np.arange(math.prod(sizes.values()))
    group, members = np.arange(len(order)), 1
    # 'a':(pre)size is part of axis 'a': `size` steps in each of `pre` segments.
    for name, pre, size in re.findall(r"('[^']*')(?::\((\d+)\)(\d+))?", text[text.rindex("{") :]):
        length, names = int(size or sizes[name]), list(sizes)
        after = math.prod(sizes[x] for x in names[names.index(name) + 1 :])
        stride = after * sizes[name] // (int(pre or 1) * length)
        group -= np.arange(len(order)) // stride % length * stride
        members *= length
    return order[np.argsort(group, kind="stable")].reshape(-1, members)


def _integers(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]


def _permutation(text: str) -> np.ndarray:
    """Parse a device order: `[4,2]T(1,0)` is 0..7 as `[4, 2]`, transposed and flattened; `0,2,1` is literal."""
    shape, _, order = text.partition("T")
    if not shape.startswith("["):
        return np.array(_integers(shape))
    return np.arange(math.prod(_integers(shape))).reshape(_integers(shape)).transpose(_integers(order) or None).ravel()
