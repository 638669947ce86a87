"""Parse the HLO text of a compiled program: its computations, the FLOPs of its products, and loop trip counts."""

import dataclasses
import functools
import math
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Op:
    """The HLO instruction `name = result opcode(inside)rest` in the computation `where`."""

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
        matches = re.findall(r"([a-z]+(\d*)\w*)\[([\d,<=]*)\]", self.result)
        shapes = [tuple(int(d.strip("<=")) for d in dims.split(",") if d) for *_, dims in matches]
        bits = [8 if kind == "pred" else int(width or 0) for kind, width, _ in matches]
        return [(width / 8 * math.prod(shape), shape) for width, shape in zip(bits, shapes)]

    @property
    def bytes(self) -> float:
        return sum(size for size, _ in self.arrays)

    @property
    def label(self) -> str:
        return self.read(r'op_name="([^"]*)"') or self.name

    def read(self, pattern: str) -> str | None:
        """Return the first group of the pattern's match in the attributes, or None."""
        match = re.search(pattern, self.rest)
        return match[1] if match else None

    def need(self, pattern: str) -> str:
        """Return a required attribute. Raises ValueError if it is missing."""
        value = self.read(pattern)
        if value is None:
            raise ValueError(f"{self.name} has no {pattern}: {self.rest[:80]}")
        return value

    def number(self, key: str) -> float:
        """Return a number from the backend config, or 0 if it is missing."""
        return float(self.read(rf'"{key}":"?(\d+)') or 0)

    @functools.cached_property
    def called(self) -> list[str]:
        """The computation of a fusion, a call or an asynchronous wrapper; the branches of a conditional."""
        branches = self.read(r"branch_computations=\{([^}]*)\}")
        single = r"(?:calls|to_apply|(?:true|false)_computation)=%([^\s,]+)"
        return re.findall(r"%([^\s,]+)", branches) if branches else re.findall(single, self.rest)


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`. Raises ValueError if there is none."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(text, start):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return parenthesis.start()
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]}")


class Program:
    """The computations of an HLO module, with static facts about them: operands, FLOPs and trip counts."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Op]] = {}
        self.roots: dict[str, Op] = {}
        self.loops: dict[str, Op] = {}
        """loop body -> its while instruction"""
        where = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line):
                where = header[2]
                self.computations[where] = {}
                if header[1]:
                    self.entry = where
            elif instruction := re.match(r"\s+(ROOT )?%?(\S+) = ", line):
                rest = line[instruction.end() :]
                end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
                opening = rest.index("(", end)
                closing = _closing(rest, opening)
                inside = rest[opening + 1 : closing]
                opcode = rest[end:opening].strip()
                op = Op(instruction[2], where, opcode, rest[:end], inside, rest[closing + 1 :])
                self.computations[where][op.name] = op
                if instruction[1]:
                    self.roots[where] = op
                if op.opcode == "while":
                    self.loops[op.need(r"body=%([^\s,]+)")] = op
        self.inner = functools.cache(self._inner)

    def operands(self, op: Op) -> list[Op]:
        return [self.computations[op.where][name] for name in op.operands]

    def _inner(self, op: Op) -> list[Op]:
        """Return the instruction, with those inside it if it is a fusion or an asynchronous wrapper."""
        called = op.called if op.opcode in ("fusion", "fusion-start", "async-start") else ()
        return [op, *(x for name in called for below in self.computations[name].values() for x in self.inner(below))]

    def flops(self, op: Op) -> float:
        return sum(_products(x, *self.operands(x)) for x in self.inner(op) if x.opcode in ("dot", "convolution"))

    def trips(self, loop: Op) -> int | None:
        """Return how many times the body runs; None unless the condition compares a counter with a constant."""
        if known := loop.read(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        test = self.roots[loop.need(r"condition=%([^\s,]+)")]
        if test.opcode != "compare":
            return None
        counter, limit = map(self._value, self.operands(test))
        direction = test.need(r"direction=(\w+)")
        if counter and counter[0] is None:
            counter, limit, direction = limit, counter, direction.translate(str.maketrans("LG", "GL"))
        if not counter or not limit or counter[0] is None:
            return None
        start, step = self._entering(loop, counter[0], counter[1]), self._step(loop, counter[0])
        stop = self._constant(loop, limit)
        if start is None or not step or stop is None:
            return None
        return max(0, math.ceil((stop + {"LE": 1, "GE": -1}.get(direction, 0) - start) / step))

    def _value(self, op: Op) -> tuple[int | None, int] | None:
        """Return (i, c) for element i of the computation's argument plus c, (None, c) for the constant c, else None."""
        below = self.operands(op)
        match op.opcode:
            case "constant":
                return (None, int(op.inside)) if re.fullmatch(r"-?\d+", op.inside) else None
            case "copy" | "copy-start" | "copy-done" | "bitcast" | "convert" | "reshape":
                return self._value(below[0])
            case "get-tuple-element":
                index = int(op.need(r"index=(\d+)"))
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

    def _step(self, loop: Op, index: int) -> int | None:
        """Return the change of element `index` per iteration; None if it is not constant."""
        root = self.roots[loop.need(r"body=%([^\s,]+)")]
        value = self._value(self.operands(root)[index]) if root.opcode == "tuple" else None
        return value[1] if value and value[0] == index else None

    def _constant(self, loop: Op, value: tuple[int | None, int]) -> int | None:
        """Return a value of the loop if it is the same in every iteration, else None."""
        if value[0] is None:
            return value[1]
        return self._entering(loop, value[0], value[1]) if self._step(loop, value[0]) == 0 else None

    def _entering(self, loop: Op, index: int, plus: int) -> int | None:
        """Return element `index` of the loop's argument in the first iteration, plus a constant; None if unknown."""
        (start,) = self.operands(loop)
        outer = self._value(self.operands(start)[index]) if start.opcode == "tuple" else None
        if outer is None or (outer[0] is not None and loop.where not in self.loops):
            return None
        before = outer[1] if outer[0] is None else self._constant(self.loops[loop.where], outer)
        return None if before is None else before + plus


def _products(op: Op, lhs: Op, rhs: Op) -> float:
    left, right, out = (x.arrays[0][1] for x in (lhs, rhs, op))
    if op.opcode == "dot":
        contracted = op.read(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
    left_names, right_names, out_names = re.split("_|->", op.need(r"dim_labels=([^\s,]+)"))
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
    """Return the number of (output position, window element) pairs that read an input element, not padding."""
    at = (np.arange(outputs) * stride - pad + k * dilation for k in range(size))
    return sum(int(((x >= 0) & (x <= (inputs - 1) * spread) & (x % spread == 0)).sum()) for x in at)
