"""Bound the time of a program compiled for GPUs from below, by a roofline over the HLO text.

    roofline(compiled.as_text(), GPUS["h100"], devices=8)

XLA's GPU compiler gives no time for an operation, so there is no schedule to simulate as for TPUs. Three times bound
the step: its products at the published peak, the bytes that its operations read and write at the memory's bandwidth,
and the bytes that a GPU sends at the interconnect's. Loops count as often as they run. The bound is the largest of the
three, as if the others were hidden behind it: a real step takes longer. Caches, which save memory traffic, are ignored.
"""

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping

from secvec_jax.planning.gpus import Gpu
from secvec_jax.planning.hlo import Op, Program
from secvec_jax.planning.torus import COLLECTIVES, GROUPS, replica_groups

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency partition-id replica-id opt-barrier "
    "domain".split()
)
_ATTENTION = {
    "packed_attention_forward": 2,
    "packed_attention_query_gradient": 3,
    "packed_attention_key_gradient": 4,
}
"""Kernels of `model.attention_triton` -> how many products of queries and keys, or of such size, each computes."""

_SLICES = frozenset(("dynamic-slice", "slice", "gather"))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The work of one execution of a program on one GPU, including all loop iterations, and the least time it takes."""

    flops: float
    """two per multiply-add of products and of the attention kernels"""
    bytes: float
    """read and written by operations, caches ignored"""
    flops_seconds: float
    bytes_seconds: float
    interconnect_seconds: float
    collectives: dict[str, tuple[int, float]]
    """kind -> (count, bytes that the GPU sends)"""
    kernels: dict[str, int]
    """name of a library's or Triton's kernel -> how many times the program's text has it"""
    unknown_loops: list[str]
    """loops whose trip count could not be determined; the caller's `trips` is used for them"""

    @property
    def seconds(self) -> float:
        return max(self.flops_seconds, self.bytes_seconds, self.interconnect_seconds)

    @property
    def limited_by(self) -> str:
        """What the bound comes from: "products", "memory" or "interconnect"."""
        times = {
            "products": self.flops_seconds,
            "memory": self.bytes_seconds,
            "interconnect": self.interconnect_seconds,
        }
        return max(times, key=lambda name: times[name])


def roofline(text: str, gpu: Gpu, devices: int, *, trips: int = 1) -> Roofline:
    """The roofline of `compiled.as_text()`.

    devices: in the program's mesh. trips: the trip count of loops whose count depends on data.
    """
    count = _Count(Program(text), devices, trips)
    count.computation(count.program.entry, 1)
    sent = sum(size for _, size in count.collectives.values())
    return Roofline(
        flops=count.flops,
        bytes=count.bytes,
        flops_seconds=count.flops / gpu.peak,
        bytes_seconds=count.bytes / gpu.memory_bandwidth,
        interconnect_seconds=sent / gpu.interconnect,
        collectives=dict(count.collectives),
        kernels=dict(count.kernels.most_common()),
        unknown_loops=sorted(count.unknown),
    )


class _Count:
    """The running totals of a walk through a program."""

    def __init__(self, program: Program, devices: int, trips: int) -> None:
        self.program, self.devices, self.trips = program, devices, trips
        self.flops = self.bytes = 0.0
        self.collectives: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        self.kernels: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def computation(self, name: str, times: int) -> None:
        """Count the operations of a computation `times` times."""
        for op in self.program.computations[name].values():
            self._operation(op, times)

    def _operation(self, op: Op, times: int) -> None:
        if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
            return
        if op.opcode == "while":
            trips = self.program.trips(op)
            if trips is None:
                self.unknown.add(f"{op.name} {op.label}")
                trips = self.trips
            self.computation(op.need(r"body=%([^\s,]+)"), times * trips)
        elif op.opcode == "call":
            self.computation(op.called[0], times)
        elif op.opcode == "conditional":
            self._most_expensive_branch(op, times)
        else:
            self._compute(op, times)

    def _compute(self, op: Op, times: int) -> None:
        inner = self.program.inner(op)
        collective = next((x for x in inner if x.opcode.removesuffix("-start") in COLLECTIVES), None)
        if collective is not None:
            self._send(collective, times)
            return
        self.flops += times * self.program.flops(op)
        for call in inner:
            if call.opcode == "custom-call":
                self._call(call, times)
            elif call.opcode in ("fusion", "fusion-start"):
                kind = call.read(r'"fusion_backend_config":\{"kind":"([^"]*)"') or ""
                if kind.startswith("__"):
                    self.kernels[kind.strip("_")] += 1
        self.bytes += times * self._bytes_moved(op)

    def _call(self, op: Op, times: int) -> None:
        target = op.read(r'custom_call_target="([^"]*)"') or ""
        if target in ("Sharding", "AllocateBuffer"):
            return
        attention = next((name for name in _ATTENTION if name in op.rest), None)
        self.kernels[target.strip("_") if attention is None else attention] += 1
        if attention is not None:
            self.flops += times * _ATTENTION[attention] * self._attention_product(op)
        elif "gemm" in target or "matmul" in target:
            self.flops += times * self._gemm_flops(op)

    def _attention_product(self, op: Op) -> float:
        """The FLOPs of one product over all scores of an attention kernel, of which causality leaves half."""
        queries = self.program.operands(op)[0].arrays[0][1]  # [B, T, heads, H] or [B, T, K, G, H]
        return float(math.prod(queries) * queries[1])

    def _gemm_flops(self, op: Op) -> float:
        """Two per multiply-add of a product by cuBLAS, whose result may come with a workspace."""
        contracted = json.loads(op.read(r'"lhs_contracting_dimensions":(\[[^\]]*\])') or "[]")
        left, result = self.program.operands(op)[0].arrays[0][1], op.arrays[0][1]
        return 2.0 * math.prod(result) * math.prod(left[int(dimension)] for dimension in contracted)

    def _send(self, op: Op, times: int) -> None:
        kind = op.opcode.removesuffix("-start")
        size = sum(operand.bytes for operand in self.program.operands(op))
        if kind == "collective-permute":
            sent = size
        else:
            members = replica_groups(op.read(GROUPS) or "{}", self.devices).shape[1]
            sent = size * (members - 1) / members * {"all-gather": members, "all-reduce": 2}.get(kind, 1)
        count, total = self.collectives[kind]
        self.collectives[kind] = count + times, total + times * sent

    def _most_expensive_branch(self, op: Op, times: int) -> None:
        """Branches are alternatives: the one with the most bytes counts."""
        outcomes = []
        for name in op.called:
            branch = _Count(self.program, self.devices, self.trips)
            branch.computation(name, times)
            outcomes.append(branch)
            self.kernels += branch.kernels
            self.unknown |= branch.unknown
        most = max(outcomes, key=lambda branch: branch.bytes)
        self.flops += most.flops
        self.bytes += most.bytes
        for kind, (count, size) in most.collectives.items():
            before = self.collectives[kind]
            self.collectives[kind] = before[0] + count, before[1] + size

    def _bytes_moved(self, op: Op) -> float:
        """The bytes read and written; of arrays that are sliced or updated in place only the part that is touched."""
        operands = self.program.operands(op)
        opcode, written = op.opcode, op.bytes
        if opcode.endswith("-start"):
            opcode = opcode.removesuffix("-start")
            # The start of an asynchronous operation returns its operands together with its result.
            written = max(written - sum(operand.bytes for operand in operands), 0.0)
        if opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        if opcode in _SLICES:
            return 2 * written
        if opcode != "fusion":
            return written + sum(operand.bytes for operand in operands)
        inside = self.program.computations[op.called[0]]
        read = sum(self._bytes_read(parameter, inside) for parameter in inside.values() if _is_parameter(parameter))
        root = self.program.roots[op.called[0]]
        results = self.program.operands(root) if root.opcode == "tuple" else [root]
        return read + sum(self._bytes_written(result) for result in results)

    def _bytes_read(self, parameter: Op, inside: Mapping[str, Op]) -> float:
        users = [op for op in inside.values() if parameter.name in op.operands]
        total = 0.0
        for user in users:
            if user.opcode in _SLICES:
                total += user.bytes
            elif user.opcode == "bitcast":
                total += self._bytes_read(user, inside)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
                return parameter.bytes
        return min(total, parameter.bytes)

    def _bytes_written(self, result: Op) -> float:
        while result.opcode in ("bitcast", "convert", "copy") and result.operands:
            below = self.program.operands(result)[0]
            if below.opcode not in ("bitcast", "convert", "copy", "dynamic-update-slice"):
                break
            result = below
        if result.opcode == "dynamic-update-slice":
            return self.program.operands(result)[1].bytes
        return result.bytes


def _is_parameter(op: Op) -> bool:
    return op.opcode == "parameter"
