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
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from secvec_jax.planning.hlo import Op, Program
from secvec_jax.planning.torus import COLLECTIVES, Chip, Torus


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
    by_op: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
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
        program: Program,
        chip: Chip,
        torus: Torus,
        trips: int,
        kernels: Mapping[str, tuple[float, float]],
    ) -> None:
        self.program, self.chip, self.torus, self.trips, self.kernels = program, chip, torus, trips, kernels
        self.tally = _Tally()

    def computation(self, name: str, times: int) -> None:
        """Move the clock once through a computation, and count what is in it `times`-fold."""
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
        # A collective may be spread over fusions: one starts it, others carry a copy of it along, one ends it.
        elif collective and channel and "AsyncCollectiveStart" in calls:
            self._send(op, collective, channel, times)
        elif channel and "AsyncCollectiveDone" in calls:
            self._wait(op, channel, times)
        elif collective and "async_collective_fusion_config" not in collective.rest:
            self._send(op, collective, op.name, times)
            if not op.opcode.endswith("-start"):
                self._wait(op, op.name, times)
        elif op.opcode.endswith("-start"):
            self._begin(op.name, self._moved(op) / self.chip.memory_bandwidth, _MEMORY, False)
        else:
            self._compute(op, times)

    def _compute(self, op: Op, times: int) -> None:
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

    def _moved(self, op: Op) -> float:
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

    def _spend(self, op: Op, seconds: float, times: int) -> None:
        self.tally.now += seconds
        self.tally.by_op[op.label] += seconds * times

    def _begin(self, key: str, seconds: float, lanes: frozenset, collective: bool) -> None:
        busy = self.tally.busy
        end = max([self.tally.now, *(busy.get(lane, 0.0) for lane in lanes)]) + seconds
        busy.update(dict.fromkeys(lanes, end))
        self.tally.ends[key] = end, collective

    def _send(self, op: Op, collective: Op, key: str, times: int) -> None:
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

    def _started(self, op: Op) -> str:
        """What a done waits for, through updates and tuples."""
        while op.name not in self.tally.ends:
            op = self.program.operands(op)[0]
        return op.name

    def _wait(self, op: Op, key: str, times: int) -> None:
        end, collective = self.tally.ends[key]
        seconds = max(0.0, end - self.tally.now)
        self.tally.exposed += seconds * times * collective
        self._spend(op, seconds, times)

    def _loop(self, op: Op, times: int) -> None:
        """The first pass; then the second, in place of all others."""
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
        tally.busy = {lane: end + seconds for lane, end in tally.busy.items()}
        tally.ends = {key: (end + seconds, collective) for key, (end, collective) in tally.ends.items()}

    def _branches(self, op: Op, times: int) -> None:
        """The dearest one."""
        before, after = self.tally, []
        for name in op.called:
            self.tally = copy.deepcopy(before)
            self.computation(name, times)
            after.append(self.tally)
        self.tally = max(after, key=lambda tally: tally.now)
