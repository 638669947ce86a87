"""Estimate the time of a compiled TPU program by simulating the schedule in its HLO text.

    mesh = Mesh(get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices, ("fsdp",))
    text = step.lower(*arguments).compile().as_text()
    account(text, CHIPS["TPU v5"], [device.coords for device in mesh.devices.flat])

The compiler's totals (`cost_analysis`) count the body of a loop only once, so they are useless for a model scanned over
its layers. But the HLO text is scheduled: instructions appear in execution order, and most carry the compiler's
estimate of their cycles. The simulation advances one clock along the schedule. Each loop runs for its trip count; a
collective occupies its links from its start, and the clock waits for it at its done instruction. Assumptions:

Compute. `estimated_cycles` refers to a whole chip, at a clock rate that is not in the text. We use the clock at which
the matrix units reach the published peak: 8 of 128^2 at 1.05 GHz on v4 and at 1.75 GHz on v5p, 4 at 1.5 GHz on v5e,
4 of 256^2 at 1.75 GHz on v6e. Large products then reach 82 to 96% of the published peak on all of them. (The compiler's
totals treat v5p as a chip with 394 TFLOP/s at 1.5 GHz; at that clock its compute would be a sixth slower.) Nothing runs
faster than the published peak. Instructions without an estimate are charged their bytes at memory bandwidth. A Pallas
kernel is charged what the caller specifies, else the roofline time of its declared cost, which is a lower bound.

Interconnect. A link carries 0.9 of its published bandwidth in each direction. A collective uses the links of every
torus axis that its group spans, like XLA:TPU's strategies: two along a ring, one if the axis does not wrap around. A
permute takes the shortest path, axis by axis, and the busiest link determines its time. Transfers on the same axis and
in the same direction are serialized. Latency is ignored, and so is the memory traffic of copies that run concurrently
with computation, until something waits for them.
"""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from secvec_jax.planning.hlo import Op, Program
from secvec_jax.planning.torus import COLLECTIVES, Chip, Torus


@dataclasses.dataclass(frozen=True)
class Account:
    """The simulated cost of one execution of a program on one chip, including all loop iterations."""

    seconds: float
    compute_seconds: float
    """everything except `exposed_seconds`, including kernels and waits for memory"""
    exposed_seconds: float
    """time spent waiting for the interconnect"""
    flops: float
    """two per multiply-add of dots and convolutions (which dots become), inside fusions too; excludes padding, kernels,
    and small dots that the compiler turned into multiply and reduce"""
    kernel_flops: float
    """as declared by Pallas kernels, or specified by the caller"""
    kernel_seconds: float
    collectives: dict[str, tuple[int, float]]
    """kind -> (count, bytes that the chip sends)"""
    seconds_by_op: list[tuple[str, float]]
    """(JAX's name of an operation, its time), most expensive first"""
    unknown_loops: list[str]
    """loops whose trip count could not be determined; the caller's `trips` is used for them"""
    unestimated: int
    """number of compute instructions without an estimate"""


def account(
    text: str,
    chip: Chip,
    coords: Sequence[Sequence[int]],
    *,
    trips: int = 1,
    kernels: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    top: int = 20,
) -> Account:
    """Simulate `compiled.as_text()` on one chip.

    coords: the torus coordinates of the mesh's devices, in mesh order. trips: the trip count of loops whose count
    depends on data. kernels: prefix of a Pallas kernel's name -> its (FLOPs, seconds). top: the length of
    `seconds_by_op`.
    """
    program = Program(text)
    run = _Run(program, chip, Torus(chip, coords), trips, kernels)
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
        seconds_by_op=sorted(tally.by_op.items(), key=lambda item: -item[1])[:top],
        unknown_loops=sorted(tally.unknown),
        unestimated=len(tally.unestimated),
    )


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
"""The resource of asynchronous copies."""
_TRANSCENDENTALS = 8 * 128
"""Transcendental operations per cycle in a kernel: one vector register."""


@dataclasses.dataclass
class _Tally:
    now: float = 0.0
    exposed: float = 0.0
    flops: float = 0.0
    kernel_flops: float = 0.0
    kernel_seconds: float = 0.0
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    by_op: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    unknown: set[str] = dataclasses.field(default_factory=set)
    unestimated: set[str] = dataclasses.field(default_factory=set)
    busy: dict = dataclasses.field(default_factory=dict)
    """resource -> the time at which it becomes free"""
    ends: dict[str, tuple[float, bool]] = dataclasses.field(default_factory=dict)
    """asynchronous operation -> (its end, whether it is a collective)"""


class _Run:
    """The simulation: one clock that advances along the schedule."""

    def __init__(
        self,
        program: Program,
        chip: Chip,
        torus: Torus,
        trips: int,
        kernels: Mapping[str, tuple[float, float]],
    ) -> None:
        self.program, self.chip, self.torus, self.trips, self.kernels = program, chip, torus, trips, kernels
        self.tally = _Tally()

    def computation(self, name: str, times: int) -> None:
        """Advance the clock once through a computation, and count its operations `times` times."""
        for op in self.program.computations[name].values():
            self._instruction(op, times)

    def _instruction(self, op: Op, times: int) -> None:
        inner = self.program.inner(op)
        calls = {x.read(r'custom_call_target="([^"]*)"') for x in inner if x.opcode == "custom-call"}
        collective = next((x for x in inner if x.opcode.removesuffix("-start") in COLLECTIVES), None)
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
        # A collective may span several fusions: one starts it, others contain a copy of it, one finishes it.
        elif collective and channel and "AsyncCollectiveStart" in calls:
            self._send(op, collective, channel, times)
        elif channel and "AsyncCollectiveDone" in calls:
            self._wait(op, channel, times)
        elif collective and "async_collective_fusion_config" not in collective.rest:
            self._send(op, collective, op.name, times)
            if not op.opcode.endswith("-start"):
                self._wait(op, op.name, times)
        elif op.opcode.endswith("-start"):
            self._begin(op.name, self._bytes_moved(op) / self.chip.memory_bandwidth, _MEMORY, False)
        else:
            self._compute(op, times)

    def _compute(self, op: Op, times: int) -> None:
        tally, chip, flops = self.tally, self.chip, self.program.flops(op)
        cycles = op.number("estimated_cycles")
        seconds = max(cycles / chip.clock, flops / chip.peak)
        tally.flops += flops * times
        given_cost = next((cost for name, cost in self.kernels.items() if op.name.startswith(name)), None)
        if given_cost is not None and op.opcode == "custom-call":
            kernel_flops, seconds = given_cost
            tally.kernel_flops += kernel_flops * times
            tally.kernel_seconds += seconds * times
        elif '"cost_estimate"' in op.rest:
            slow = op.number("transcendentals") / _TRANSCENDENTALS / chip.clock
            seconds = max(op.number("flops") / chip.peak, op.number("bytes_accessed") / chip.memory_bandwidth, slow)
            tally.kernel_flops += op.number("flops") * times
            tally.kernel_seconds += seconds * times
        elif not cycles:
            seconds = max(seconds, self._bytes_moved(op) / chip.memory_bandwidth)
            if op.opcode not in _MOVES and any(math.prod(shape) > 1 for _, shape in op.arrays):
                tally.unestimated.add(op.name)
        self._spend(op, seconds, times)

    def _bytes_moved(self, op: Op) -> float:
        """Return the bytes read and written."""
        if op.opcode.endswith("-start"):
            # Source, target and flags: the smaller array is moved; it crosses memory only once if one is in VMEM, S(1).
            return min(size for size, shape in op.arrays if shape) * (1 if "S(1)" in op.result else 2)
        operands = self.program.operands(op)
        if op.opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        if op.opcode in ("slice", "dynamic-slice", "gather"):
            return 2 * op.bytes
        return op.bytes + sum(x.bytes for x in operands)

    def _spend(self, op: Op, seconds: float, times: int) -> None:
        self.tally.now += seconds
        self.tally.by_op[op.label] += seconds * times

    def _begin(self, key: str, seconds: float, resources: frozenset, collective: bool) -> None:
        busy = self.tally.busy
        end = max([self.tally.now, *(busy.get(resource, 0.0) for resource in resources)]) + seconds
        busy.update(dict.fromkeys(resources, end))
        self.tally.ends[key] = end, collective

    def _send(self, op: Op, collective: Op, key: str, times: int) -> None:
        operands = self.program.operands(collective)
        kind = collective.opcode.removesuffix("-start")
        size = operands[0].bytes if kind == "collective-permute" else sum(x.bytes for x in operands)
        # XLA:TPU expresses a reduce-scatter as a fusion of an all-reduce and a slice.
        if kind == "all-reduce" and op.opcode == "fusion" and op.bytes < size:
            kind = "reduce-scatter"
        sent, seconds, resources = self.torus.transfer(kind, collective, size)
        self._begin(key, seconds, resources, True)
        count, total = self.tally.collectives.get(kind, (0, 0.0))
        self.tally.collectives[kind] = count + times, total + sent * times

    def _started(self, op: Op) -> str:
        """Return what a done instruction waits for, traced through updates and tuples."""
        while op.name not in self.tally.ends:
            op = self.program.operands(op)[0]
        return op.name

    def _wait(self, op: Op, key: str, times: int) -> None:
        end, collective = self.tally.ends[key]
        seconds = max(0.0, end - self.tally.now)
        self.tally.exposed += seconds * times * collective
        self._spend(op, seconds, times)

    def _loop(self, op: Op, times: int) -> None:
        """Simulate the first two iterations; the second represents all later ones."""
        trips, body, tally = self.program.trips(op), op.need(r"body=%([^\s,]+)"), self.tally
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
        tally.busy = {resource: end + seconds for resource, end in tally.busy.items()}
        tally.ends = {key: (end + seconds, collective) for key, (end, collective) in tally.ends.items()}

    def _branches(self, op: Op, times: int) -> None:
        """Take the slowest branch."""
        before, after = self.tally, []
        for name in op.called:
            self.tally = copy.deepcopy(before)
            self.computation(name, times)
            after.append(self.tally)
        self.tally = max(after, key=lambda tally: tally.now)
