"""Time several programs against each other in one run, alternating, each in a separate process.

The sides take turns, so that a machine that slows down slows all of them; the reported ratio of two sides is the median
over the rounds. Separate processes give each side its own threads and its own peak memory.
"""

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

Work = Callable[[int], None]
"""Does the piece of work with this index, and returns when it is done."""

Make = Callable[..., tuple[dict[str, Any], Work]]
"""Sets up a side in its process: returns facts about it (JSON) and its work."""

LIBRARIES = ["secvec_jax.workspace.workspace", "transformers.generation.utils", "peft"]
"""Modules that take seconds to import."""


class Side(NamedTuple):
    """One program to be timed, set up by `make(*arguments)`."""

    make: Make
    arguments: tuple


class Times(NamedTuple):
    """Seconds of each round, the facts from `make`, the seconds it took, and the peak memory of the process in GiB."""

    rounds: list[float]
    facts: dict[str, Any]
    setup: float
    peak: float

    def as_dict(self, pieces: int) -> dict[str, Any]:
        """Return JSON with the seconds of one of the `pieces` of work in a round."""
        seconds = [round_ / pieces for round_ in self.rounds]
        return {"seconds": statistics.median(seconds), "rounds": seconds, "peak_gib": self.peak} | self.facts


def alternate(sides: dict[str, Side], rounds: int, pieces: int, fork: bool = False) -> dict[str, Times]:
    """Return every side's times over `rounds` rounds of `pieces` pieces of work each, after one untimed round.

    fork: start the sides from a process that has imported all libraries. That saves minutes in smoke tests; each side's
    peak memory then includes the libraries of the others.

    Raises RuntimeError if a side fails.
    """
    with contextlib.ExitStack() as stack:
        rounds_of: dict[str, list[float]] = {name: [] for name in sides}
        setups = {}
        pipes = {}
        for name, side in sides.items():  # one after the other: concurrent setups would distort the setup times
            pipes[name] = stack.enter_context(_started(side, fork))
            start = time.perf_counter()
            setups[name] = _received(name, pipes[name]), time.perf_counter() - start
        order = list(sides)
        for turn in range(rounds + 1):
            for name in order if turn % 2 else reversed(order):
                pipes[name].send(pieces)
                seconds = _received(name, pipes[name])
                if turn:
                    rounds_of[name].append(seconds)
        for pipe in pipes.values():
            pipe.send(None)
        return {name: Times(rounds_of[name], *setups[name], _received(name, pipe)) for name, pipe in pipes.items()}


def ratio(slow: Times, fast: Times) -> dict[str, Any]:
    """Return the ratio of the first side's seconds to the second's: median, smallest and largest over the rounds."""
    ratios = [a / b for a, b in zip(slow.rounds, fast.rounds)]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios), "n": len(ratios)}


@contextlib.contextmanager
def _started(side: Side, fork: bool) -> Iterator[Connection]:
    context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(LIBRARIES)
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, side), daemon=True)
    process.start()
    child_end.close()
    try:
        yield parent_end
        process.join(30)
    finally:
        process.kill()


def _serve(pipe: Connection, side: Side) -> None:
    try:
        facts, work = side.make(*side.arguments)
        pipe.send(facts)
        while (pieces := pipe.recv()) is not None:
            start = time.perf_counter()
            for piece in range(pieces):
                work(piece)
            pipe.send(time.perf_counter() - start)
        pipe.send(round(peak_bytes() / 2**30, 3))
    except BaseException as error:
        pipe.send(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        raise


def _received(name: str, pipe: Connection) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        answer = RuntimeError("its process ended unexpectedly")
    if isinstance(answer, Exception):
        raise RuntimeError(f"{name}: {answer}") from answer
    return answer


def peak_bytes() -> int:
    """Return the peak memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def machine() -> dict[str, Any]:
    """Return the machine's CPU model and its number of cores."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count()}
