"""Several programs timed against each other in one run: each in a process of its own, turn by turn.

A turn of one follows a turn of the other, so that a machine that slows down slows both; what is reported of two sides
is the median of the rounds' ratios. A process of its own gives each side its own threads and its own peak memory.
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
"""Does the piece of work with this number, and returns when it is done."""

Make = Callable[..., tuple[dict[str, Any], Work]]
"""Sets a side up: what there is to say of it, JSON, and its work. Called in the side's own process."""

LIBRARIES = ["secvec_jax.workspace.workspace", "transformers.generation.utils", "peft"]
"""What takes seconds to import."""


class Side(NamedTuple):
    """One program: `make(*arguments)`."""

    make: Make
    arguments: tuple


class Times(NamedTuple):
    """Seconds of each round, what `make` said, the seconds it took, and the peak memory of the process in GiB."""

    rounds: list[float]
    facts: dict[str, Any]
    setup: float
    peak: float

    def as_dict(self, pieces: int) -> dict[str, Any]:
        """JSON; seconds are those of one of the `pieces` of a round."""
        seconds = [round_ / pieces for round_ in self.rounds]
        return {"seconds": statistics.median(seconds), "rounds": seconds, "peak_gib": self.peak} | self.facts


def alternate(sides: dict[str, Side], rounds: int, pieces: int, fork: bool = False) -> dict[str, Times]:
    """Every side's times over `rounds` rounds of `pieces` pieces of work each; a round more is run before, unmeasured.

    fork: start the sides from a process that has imported the libraries of all. That saves minutes where a script is
    only seen to run; each side's peak memory then holds the libraries of the others.
    Raises RuntimeError if a side fails.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, list[float]] = {name: [] for name in sides}
        said = {}
        pipes = {}
        for name, side in sides.items():  # one after the other: two that compile at once measure nothing
            pipes[name] = stack.enter_context(_started(side, fork))
            start = time.perf_counter()
            said[name] = _received(name, pipes[name]), time.perf_counter() - start
        order = list(sides)
        for turn in range(rounds + 1):
            for name in order if turn % 2 else reversed(order):
                pipes[name].send(pieces)
                seconds = _received(name, pipes[name])
                if turn:
                    found[name].append(seconds)
        for pipe in pipes.values():
            pipe.send(None)
        return {name: Times(found[name], *said[name], _received(name, pipe)) for name, pipe in pipes.items()}


def ratio(slow: Times, fast: Times) -> dict[str, Any]:
    """How many times as long the first took: the median of the rounds, and the least and the largest."""
    ratios = [a / b for a, b in zip(slow.rounds, fast.rounds)]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios), "n": len(ratios)}


@contextlib.contextmanager
def _started(side: Side, fork: bool) -> Iterator[Connection]:
    context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(LIBRARIES)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, side), daemon=True)
    process.start()
    there.close()
    try:
        yield here
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
        answer = RuntimeError("its process is gone")
    if isinstance(answer, Exception):
        raise RuntimeError(f"{name}: {answer}") from answer
    return answer


def peak_bytes() -> int:
    """The most memory that this process has had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def machine() -> dict[str, Any]:
    """What the machine is."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count()}
