"""What one step of a compiled TPU program costs a chip, read off the program's own schedule.

    mesh = Mesh(get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices, ("fsdp",))
    text = step.lower(*arguments).compile().as_text()
    account(text, CHIPS["TPU v5"], [device.coords for device in mesh.devices.flat])

The compiler's own totals (`cost_analysis`) count the body of a loop once, so they say nothing about a scanned model.
But the text is scheduled: instructions stand in the order in which they run, and most carry the compiler's estimate of
their cycles. One clock is moved along it; a loop runs as often as it says; a collective keeps its links busy from its
start on, and the clock waits for it where the text does. What is assumed:

Compute. `estimated_cycles` are those of a whole chip at a clock that the text does not tell. Taken is the one at which
its matrix units reach the published peak: 8 of 128^2 at 1.05 GHz on v4 and at 1.75 GHz on v5p, 4 at 1.5 GHz on v5e,
four times 256^2 at 1.75 GHz on v6e. Large products then reach 82 to 96% of the published peak on all of them. (The
compiler's own totals take v5p for a chip of 394 TFLOP/s, 1.5 GHz; at that clock its compute would be a sixth slower.)
Nothing is faster than the published peak. What has no estimate costs its bytes at the memory's bandwidth. A Pallas
kernel costs what the caller says, else the roofline of what it declares, the least that it can take.

Interconnect. A link carries 0.9 of its published bandwidth each way. A collective uses the links of every torus axis
that its group spans, as XLA:TPU's strategies do: two along a ring, one where the axis does not close. A permute goes
the shortest way, axis by axis, and the busiest link decides. What shares an axis and a direction takes turns. Latency
is left out, and so is memory traffic of copies that run beside the computation, until something waits for them.
"""

import copy
import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip, in FLOP/s (bf16), bytes, bytes/s and Hz."""

    name: str
    peak: float
    memory: int
    memory_bandwidth: float
    interconnect: float
    """out of the chip, over all of its links"""
    links: int
    """two for each axis of the torus"""
    ring: int
    """an axis closes if its extent is a multiple of this, and in three dimensions only if every axis does"""
    clock: float
    """turns the compiler's cycles into seconds"""

    @property
    def link_bandwidth(self) -> float:
        return 0.9 * self.interconnect / self.links


CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 << 30, 1228e9, 2400e9 / 8, links=6, ring=4, clock=1.05e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 << 30, 819e9, 1600e9 / 8, links=4, ring=16, clock=1.5e9),
    "TPU v5": Chip("v5p", 459e12, 95 << 30, 2765e9, 4800e9 / 8, links=6, ring=4, clock=1.75e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 << 30, 1640e9, 3584e9 / 8, links=4, ring=16, clock=1.75e9),
}
"""By `device_kind`. One device is one chip; a v4 topology has two to a chip without `chip_config_name="megacore"`."""


@dataclasses.dataclass(frozen=True)
class Account:
    """One run of a program on one chip, every loop as often as it runs."""

    seconds: float
    compute_seconds: float
    """all but the next: kernels and waits for memory too"""
    exposed_seconds: float
    """waiting for the interconnect"""
    flops: float
    """two for each product of a dot or a convolution, which dots become, in a fusion or not; none for those with
    padding, for kernels, and for small dots that the compiler turned into multiply and reduce"""
    kernel_flops: float
    """what Pallas kernels declare, or the caller says"""
    kernel_seconds: float
    collectives: dict[str, tuple[int, float]]
    """kind -> (how many, bytes that the chip sends)"""
    seconds_by_op: list[tuple[str, float]]
    """JAX's name for an operation, and what the clock moved under it; dearest first"""
    unknown_loops: list[str]
    """loops whose trip count could not be read; they count as often as the caller says"""
    unestimated: int
    """instructions that compute and have no estimate"""


def account(
    text: str,
    chip: Chip,
    coords: Sequence[Sequence[int]],
    *,
    trips: int = 1,
    kernels: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    top: int = 20,
) -> Account:
    """Simulate `compiled.as_text()`; coords are those of the mesh's devices, in the mesh's order.

    trips: how often a loop runs whose count the program learns from its data. kernels: the beginning of a Pallas
    kernel's name -> its (FLOPs, seconds).
    """
    program = _Program(text)
    run = _Run(program, chip, _Torus(chip, coords), trips, kernels)
    run.computation(program.entry, 1)
    tally = run.tally
    return Account(
        seconds=tally.now,
        compute_seconds=tally.now - tally.exposed,
        exposed_seconds=tally.exposed,
        flops=tally.flops,
        kernel_flops=tally.kernel_flops,
        kernel_seconds=tally.kernel_seconds,
        collectives=tally.collectives,
        seconds_by_op=tally.by_op.most_common(top),
        unknown_loops=sorted(tally.unknown),
        unestimated=len(tally.unestimated),
    )


# ---- The text


@dataclasses.dataclass(frozen=True)
class _Op:
    """The instruction `name = result opcode(inside)rest` of the computation `where`."""

    name: str
    where: str
    opcode: str
    result: str
    inside: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,()]+)", self.inside)

    @functools.cached_property
    def arrays(self) -> list[tuple[float, tuple[int, ...]]]:
        """(bytes, dimensions) of each array in the result."""
        found = re.findall(r"([a-z]+(\d*)\w*)\[([\d,<=]*)\]", self.result)
        shapes = [tuple(int(d.strip("<=")) for d in dims.split(",") if d) for *_, dims in found]
        bits = [8 if kind == "pred" else int(width or 0) for kind, width, _ in found]
        return [(width / 8 * math.prod(shape), shape) for width, shape in zip(bits, shapes)]

    @property
    def bytes(self) -> float:
        return sum(size for size, _ in self.arrays)

    @property
    def label(self) -> str:
        return self.read(r'op_name="([^"]*)"') or self.name

    def read(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    def number(self, key: str) -> float:
        """A number in the backend's configuration, or 0."""
        return float(self.read(rf'"{key}":"?(\d+)') or 0)

    @functools.cached_property
    def called(self) -> list[str]:
        """The computation of a fusion, a call or an asynchronous wrapper; the branches of a conditional."""
        several = self.read(r"branch_computations=\{([^}]*)\}")
        one = r"(?:calls|to_apply|(?:true|false)_computation)=%([^\s,]+)"
        return re.findall(r"%([^\s,]+)", several) if several else re.findall(one, self.rest)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 80]}")


class _Program:
    """The computations of a module, and what can be said of them without a clock."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, _Op]] = {}
        self.roots: dict[str, _Op] = {}
        self.loops: dict[str, _Op] = {}
        """body -> the loop that runs it"""
        where = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line):
                where = header[2]
                self.computations[where] = {}
                if header[1]:
                    self.entry = where
            elif found := re.match(r"\s+(ROOT )?%?(\S+) = ", line):
                rest = line[found.end() :]
                end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
                opening = rest.index("(", end)
                closing = _closing(rest, opening)
                inside = rest[opening + 1 : closing]
                op = _Op(found[2], where, rest[end:opening].strip(), rest[:end], inside, rest[closing + 1 :])
                self.computations[where][op.name] = op
                if found[1]:
                    self.roots[where] = op
                if op.opcode == "while":
                    self.loops[op.read(r"body=%([^\s,]+)")] = op
        self.inner = functools.cache(self._inner)

    def operands(self, op: _Op) -> list[_Op]:
        return [self.computations[op.where][name] for name in op.operands]

    def _inner(self, op: _Op) -> list[_Op]:
        """The instruction, and those in it if it is a fusion or an asynchronous wrapper."""
        called = op.called if op.opcode in ("fusion", "async-start") else ()
        return [op, *(x for name in called for below in self.computations[name].values() for x in self.inner(below))]

    def flops(self, op: _Op) -> float:
        return sum(_products(x, *self.operands(x)) for x in self.inner(op) if x.opcode in ("dot", "convolution"))

    def trips(self, loop: _Op) -> int | None:
        """How often the body runs; None if the condition compares no counter with a constant."""
        if known := loop.read(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        test = self.roots[loop.read(r"condition=%([^\s,]+)")]
        if test.opcode != "compare":
            return None
        counter, limit = map(self._value, self.operands(test))
        direction = test.read(r"direction=(\w+)")
        if counter and counter[0] is None:
            counter, limit, direction = limit, counter, direction.translate(str.maketrans("LG", "GL"))
        if not counter or not limit or counter[0] is None:
            return None
        start, step, stop = self._entering(loop, counter), self._step(loop, counter[0]), self._constant(loop, limit)
        if start is None or not step or stop is None:
            return None
        return max(0, math.ceil((stop + {"LE": 1, "GE": -1}.get(direction, 0) - start) / step))

    def _value(self, op: _Op) -> tuple[int | None, int] | None:
        """(i, c): element i of the computation's argument, plus c; (None, c): the constant c; None: neither."""
        below = self.operands(op)
        match op.opcode:
            case "constant":
                return (None, int(op.inside)) if re.fullmatch(r"-?\d+", op.inside) else None
            case "copy" | "copy-start" | "copy-done" | "bitcast" | "convert" | "reshape":
                return self._value(below[0])
            case "get-tuple-element":
                index = int(op.read(r"index=(\d+)"))
                if below[0].opcode == "tuple":
                    return self._value(self.operands(below[0])[index])
                return (index, 0) if below[0].opcode == "parameter" else None
            case "add" | "subtract":
                left, right = map(self._value, below)
                if left and right and right[0] is None:
                    return left[0], left[1] + (right[1] if op.opcode == "add" else -right[1])
                if left and right and left[0] is None and op.opcode == "add":
                    return right[0], right[1] + left[1]
        return None

    def _step(self, loop: _Op, index: int) -> int | None:
        """By how much one pass changes element `index`."""
        root = self.roots[loop.read(r"body=%([^\s,]+)")]
        value = self._value(self.operands(root)[index]) if root.opcode == "tuple" else None
        return value[1] if value and value[0] == index else None

    def _constant(self, loop: _Op, value: tuple[int | None, int]) -> int | None:
        """A value in the loop, if it is the same in every pass."""
        if value[0] is None:
            return value[1]
        return self._entering(loop, value) if self._step(loop, value[0]) == 0 else None

    def _entering(self, loop: _Op, value: tuple[int, int]) -> int | None:
        """A value in the loop in its first pass."""
        (start,) = self.operands(loop)
        outer = self._value(self.operands(start)[value[0]]) if start.opcode == "tuple" else None
        if outer is None or (outer[0] is not None and loop.where not in self.loops):
            return None
        before = outer[1] if outer[0] is None else self._constant(self.loops[loop.where], outer)
        return None if before is None else before + value[1]


def _products(op: _Op, lhs: _Op, rhs: _Op) -> float:
    left, right, out = (x.arrays[0][1] for x in (lhs, rhs, op))
    if op.opcode == "dot":
        contracted = op.read(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
    left_names, right_names, out_names = re.split("_|->", op.read(r"dim_labels=([^\s,]+)"))
    window = dict(part.split("=") for part in (op.read(r"window=\{([^}]*)\}") or "").split())
    total = 2.0 * out[out_names.index("b")] * out[out_names.index("f")] * right[right_names.index("i")]
    for axis in range(len(out) - 2):
        size, stride, dilation, spread, pad = (
            int(window[key].split("x")[axis].split("_")[0]) if key in window else int(key != "pad")
            for key in ("size", "stride", "rhs_dilate", "lhs_dilate", "pad")
        )
        inputs, outputs = left[left_names.index(str(axis))], out[out_names.index(str(axis))]
        total *= _taps(inputs, outputs, size, stride, dilation, spread, pad)
    return total


@functools.cache
def _taps(inputs: int, outputs: int, size: int, stride: int, dilation: int, spread: int, pad: int) -> int:
    """How many pairs of an output position and a window element meet an input, and not padding."""
    at = (np.arange(outputs) * stride - pad + k * dilation for k in range(size))
    return sum(int(((x >= 0) & (x <= (inputs - 1) * spread) & (x % spread == 0)).sum()) for x in at)


# ---- The interconnect

_COLLECTIVES = frozenset(
    "all-gather reduce-scatter all-reduce all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)
_GROUPS = (
    r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\(\S+\))? \{[^}]*\}"  # mesh['a'=4,'b'=2], device_ids=(..) {'a'}
    r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{\{.*?\}\}|\{\})"  # [2,4]<=[4,2]T(1,0); {{0,1},{2,3}}; {}: all
)


class _Torus:
    """Where the mesh's devices are: how long a collective takes, and on which lanes.

    A lane is an axis of the torus and a direction along it.
    """

    def __init__(self, chip: Chip, coords: Sequence[Sequence[int]]) -> None:
        self.chip = chip
        self.coords = np.array(coords) - np.min(coords, 0)
        self.extent = (self.coords.max(0) + 1).tolist()
        closed = [extent % chip.ring == 0 for extent in self.extent]
        self.closed = closed if chip.links == 4 or all(closed) else [False] * len(closed)
        self.share = functools.cache(self._share)
        self.route = functools.cache(self._route)

    def transfer(self, kind: str, op: _Op, size: float) -> tuple[float, float, frozenset]:
        """(bytes that a chip sends, seconds, lanes) for operands of `size` bytes on each chip."""
        if kind == "collective-permute":
            load, lanes = self.route(op.read(r"source_target_pairs=\{(.*?\})\}"))
            return size, size * load / self.chip.link_bandwidth, lanes
        members, links, lanes = self.share(op.read(_GROUPS))
        sent = size * (members - 1) / members * {"all-gather": members, "all-reduce": 2}.get(kind, 1)
        # What is sent to one chip alone crosses a quarter of a ring on average, and more where it does not close.
        hops = max(1.0, members / 4) if "all-to-all" in kind else 1.0
        return sent, sent * hops / (links * self.chip.link_bandwidth), lanes

    def _share(self, text: str) -> tuple[int, int, frozenset]:
        """(members of a group, links that each has for it, lanes)."""
        groups = self._groups(text)
        links, lanes = [], set()
        for group in groups:
            spanned = [len(set(axis)) for axis in self.coords[group].T.tolist()]
            used = [axis for axis, count in enumerate(spanned) if count > 1]
            links.append(sum(1 + (self.closed[axis] and spanned[axis] == self.extent[axis]) for axis in used))
            lanes |= {(axis, way) for axis in used for way in (1, -1)}
        return groups.shape[1], max(1, min(links)), frozenset(lanes)

    def _groups(self, text: str) -> np.ndarray:
        """Places in the mesh, `[groups, members]`."""
        if text.startswith("{"):
            groups = [_integers(group) for group in re.findall(r"\d[\d,]*", text)]
            return np.array(groups or [range(len(self.coords))])
        if text.startswith("["):
            shape, source = text.split("<=")
            return _permutation(source).reshape(_integers(shape))
        sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", text)}
        given = re.search(r"device_ids=\((\S+)\)", text)
        devices = _permutation(given[1]) if given else np.arange(math.prod(sizes.values()))
        group, members = np.arange(len(devices)), 1
        # 'a':(pre)size is a part of axis 'a': `size` steps, in each of `pre` stretches.
        for name, pre, size in re.findall(r"('[^']*')(?::\((\d+)\)(\d+))?", text[text.rindex("{") :]):
            length, names = int(size or sizes[name]), list(sizes)
            after = math.prod(sizes[x] for x in names[names.index(name) + 1 :])
            stride = after * sizes[name] // (int(pre or 1) * length)
            group -= np.arange(len(devices)) // stride % length * stride
            members *= length
        return devices[np.argsort(group, kind="stable")].reshape(-1, members)

    def _route(self, text: str) -> tuple[int, frozenset]:
        """(messages over the busiest link, lanes)."""
        load = Counter()
        for source, target in re.findall(r"(\d+),(\d+)", text):
            at, goal = self.coords[int(source)].tolist(), self.coords[int(target)].tolist()
            for axis, (extent, closed) in enumerate(zip(self.extent, self.closed)):
                steps = goal[axis] - at[axis]
                if closed and abs(steps) > extent / 2:
                    steps -= int(math.copysign(extent, steps))
                way = 1 if steps > 0 else -1
                for _ in range(abs(steps)):
                    load[*at, axis, way] += 1
                    at[axis] = (at[axis] + way) % extent
        return max(load.values(), default=0), frozenset((axis, way) for *_, axis, way in load)


def _integers(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]


def _permutation(text: str) -> np.ndarray:
    """`[4,2]T(1,0)` is 0 to 7 as `[4, 2]`, transposed, read in order; `0,2,1` is itself."""
    shape, _, order = text.partition("T")
    if not shape.startswith("["):
        return np.array(_integers(shape))
    return np.arange(math.prod(_integers(shape))).reshape(_integers(shape)).transpose(_integers(order) or None).ravel()


# ---- The clock

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency partition-id replica-id opt-barrier "
    "domain".split()
)
_FREE_CALLS = frozenset(("AllocateBuffer", "ConcatBitcast", "Sharding"))
_MOVES = frozenset(
    "copy slice dynamic-slice dynamic-update-slice concatenate pad transpose reshape broadcast iota reverse "
    "gather".split()
)
_MEMORY = frozenset({"memory"})
"""The lane of copies that run beside the computation."""
_TRANSCENDENTALS = 8 * 128
"""in a kernel: one vector register each cycle"""


@dataclasses.dataclass
class _Tally:
    now: float = 0.0
    exposed: float = 0.0
    flops: float = 0.0
    kernel_flops: float = 0.0
    kernel_seconds: float = 0.0
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    by_op: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown: set[str] = dataclasses.field(default_factory=set)
    unestimated: set[str] = dataclasses.field(default_factory=set)
    busy: dict = dataclasses.field(default_factory=dict)
    """lane -> until when"""
    ends: dict[str, tuple[float, bool]] = dataclasses.field(default_factory=dict)
    """what was started -> (its end, whether it is a collective)"""


class _Run:
    """One clock that is moved along the schedule."""

    def __init__(
        self,
        program: _Program,
        chip: Chip,
        torus: _Torus,
        trips: int,
        kernels: Mapping[str, tuple[float, float]],
    ) -> None:
        self.program, self.chip, self.torus, self.trips, self.kernels = program, chip, torus, trips, kernels
        self.tally = _Tally()

    def computation(self, name: str, times: int) -> None:
        """Move the clock once through a computation, and count what is in it `times`-fold."""
        for op in self.program.computations[name].values():
            self._instruction(op, times)

    def _instruction(self, op: _Op, times: int) -> None:
        inner = self.program.inner(op)
        calls = {x.read(r'custom_call_target="([^"]*)"') for x in inner if x.opcode == "custom-call"}
        collective = next((x for x in inner if x.opcode.removesuffix("-start") in _COLLECTIVES), None)
        channel = collective.read(r"channel_id=(\d+)") if collective else None
        if op.opcode in _FREE or op.opcode.endswith("-update") or (op.opcode == "custom-call" and calls & _FREE_CALLS):
            return
        if op.opcode == "while":
            self._loop(op, times)
        elif op.opcode == "conditional":
            self._branches(op, times)
        elif op.opcode == "call":
            self.computation(op.called[0], times)
        elif op.opcode.endswith("-done"):
            self._wait(op, self._started(op), times)
        # A collective may be spread over fusions: one starts it, others carry a copy of it along, one ends it.
        elif "AsyncCollectiveStart" in calls:
            self._send(op, collective, channel, times)
        elif "AsyncCollectiveDone" in calls:
            self._wait(op, channel, times)
        elif collective and "async_collective_fusion_config" not in collective.rest:
            self._send(op, collective, op.name, times)
            if not op.opcode.endswith("-start"):
                self._wait(op, op.name, times)
        elif op.opcode.endswith("-start"):
            self._begin(op.name, self._moved(op) / self.chip.memory_bandwidth, _MEMORY, False)
        else:
            self._compute(op, times)

    def _compute(self, op: _Op, times: int) -> None:
        tally, chip, flops = self.tally, self.chip, self.program.flops(op)
        cycles = op.number("estimated_cycles")
        seconds = max(cycles / chip.clock, flops / chip.peak)
        tally.flops += flops * times
        said = next((cost for name, cost in self.kernels.items() if op.name.startswith(name)), None)
        if said is not None and op.opcode == "custom-call":
            tally.kernel_flops += said[0] * times
            seconds = said[1]
            tally.kernel_seconds += seconds * times
        elif '"cost_estimate"' in op.rest:
            slow = op.number("transcendentals") / _TRANSCENDENTALS / chip.clock
            seconds = max(op.number("flops") / chip.peak, op.number("bytes_accessed") / chip.memory_bandwidth, slow)
            tally.kernel_flops += op.number("flops") * times
            tally.kernel_seconds += seconds * times
        elif not cycles:
            seconds = max(seconds, self._moved(op) / chip.memory_bandwidth)
            if op.opcode not in _MOVES and any(math.prod(shape) > 1 for _, shape in op.arrays):
                tally.unestimated.add(op.name)
        self._spend(op, seconds, times)

    def _moved(self, op: _Op) -> float:
        """Bytes read and written."""
        if op.opcode.endswith("-start"):
            # Source, target and flags: the smaller end moves, and only once through the memory if one is in VMEM, S(1).
            return min(size for size, shape in op.arrays if shape) * (1 if "S(1)" in op.result else 2)
        operands = self.program.operands(op)
        if op.opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        if op.opcode in ("slice", "dynamic-slice", "gather"):
            return 2 * op.bytes
        return op.bytes + sum(x.bytes for x in operands)

    def _spend(self, op: _Op, seconds: float, times: int) -> None:
        self.tally.now += seconds
        self.tally.by_op[op.label] += seconds * times

    def _begin(self, key: str, seconds: float, lanes: frozenset, collective: bool) -> None:
        busy = self.tally.busy
        end = max([self.tally.now, *(busy.get(lane, 0.0) for lane in lanes)]) + seconds
        busy.update(dict.fromkeys(lanes, end))
        self.tally.ends[key] = end, collective

    def _send(self, op: _Op, collective: _Op, key: str, times: int) -> None:
        operands = self.program.operands(collective)
        kind = collective.opcode.removesuffix("-start")
        size = operands[0].bytes if kind == "collective-permute" else sum(x.bytes for x in operands)
        # XLA:TPU writes a reduce-scatter as a fusion of an all-reduce and a slice.
        if kind == "all-reduce" and op.opcode == "fusion" and op.bytes < size:
            kind = "reduce-scatter"
        sent, seconds, lanes = self.torus.transfer(kind, collective, size)
        self._begin(key, seconds, lanes, True)
        count, total = self.tally.collectives.get(kind, (0, 0.0))
        self.tally.collectives[kind] = count + times, total + sent * times

    def _started(self, op: _Op) -> str:
        """What a done waits for, through updates and tuples."""
        while op.name not in self.tally.ends:
            op = self.program.operands(op)[0]
        return op.name

    def _wait(self, op: _Op, key: str, times: int) -> None:
        end, collective = self.tally.ends[key]
        seconds = max(0.0, end - self.tally.now)
        self.tally.exposed += seconds * times * collective
        self._spend(op, seconds, times)

    def _loop(self, op: _Op, times: int) -> None:
        """The first pass; then the second, in place of all others."""
        trips, body, tally = self.program.trips(op), op.read(r"body=%([^\s,]+)"), self.tally
        if trips is None:
            tally.unknown.add(f"{op.name} {op.label}")
            trips = self.trips
        if trips:
            self.computation(body, times)
        if trips > 1:
            before = self.tally.now
            self.computation(body, times * (trips - 1))
            self._skip((self.tally.now - before) * (trips - 2))

    def _skip(self, seconds: float) -> None:
        tally = self.tally
        tally.now += seconds
        tally.busy = {lane: end + seconds for lane, end in tally.busy.items()}
        tally.ends = {key: (end + seconds, collective) for key, (end, collective) in tally.ends.items()}

    def _branches(self, op: _Op, times: int) -> None:
        """The dearest one."""
        before, after = self.tally, []
        for name in op.called:
            self.tally = copy.deepcopy(before)
            self.computation(name, times)
            after.append(self.tally)
        self.tally = max(after, key=lambda tally: tally.now)
