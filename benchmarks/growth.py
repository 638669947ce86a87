"""Growth of step time and memory with sequence length, layers, vector rank, active vectors and batch, on the CPU.

    python benchmarks/growth.py --json FILE                 # all parts, under ten minutes on two cores
    python benchmarks/growth.py --json FILE --part layers   # one part; other parts in FILE are kept
    python benchmarks/growth.py --json FILE --table         # only print the tables of FILE
    python benchmarks/growth.py --json FILE --toy           # smoke test: the smallest points of a narrow model

A point is the actual train step on a small Llama with random weights, fed by the actual data pipeline. Its time is the
median of several steps after a first one; compilation is reported separately. Its memory is the compiler's figure:
arguments, results and temporaries, with reused buffers counted once. For both, a part ends with two fits: the slope of
log(value) over log(size) in the larger half of the points, and a straight line through all of them. Linear growth has
slope 1 at most; attention over whole sequences is quadratic by design, and nothing else should be.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from secvec_jax.data.chat import Example
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.finetuning import phase2_step
from secvec_jax.defenses.security_vectors import PHASE1, Phase1, phase1_step
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.evaluation.results import environment_facts
from secvec_jax.files import atomic_file
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder
from secvec_jax.planning.plan import program_bytes
from secvec_jax.training.objective import LEARN, Backbone, Params
from secvec_jax.vectors.lora import LoRA
from secvec_jax.workspace.stages import devices

MODEL = Architecture(
    "llama",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=128,
    max_length=8192,
)
TOY = dataclasses.replace(MODEL, vocab_size=512, hidden_size=32, intermediate_size=64, head_dim=16)
ROW = (64, 128)
"""The shortest and the longest row of a packed sequence, in tokens; the reply is its second half."""
SECONDS, LEAST, MOST = 2.0, 3, 9
"""Steps are timed for this many seconds, within these minimum and maximum numbers of steps."""


@dataclasses.dataclass(frozen=True)
class Point:
    """The configuration of a measured step.

    whole: one row fills a sequence, instead of several rows of `ROW` tokens. trained: train the vectors (phase 1)
    instead of all weights with this number of frozen `vectors` (phase 2).
    """

    lines: int = 8
    length: int = 256
    layers: int = 4
    rank: int = 8
    vectors: int = 1
    trained: bool = False
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A growing quantity and the points at which it is measured."""

    title: str
    size: str
    sizes: tuple[int, ...]
    point: Callable[[int], Point]


LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
PARTS = {
    "length": Part(
        "length, 8192 tokens per step in rows of 64 to 128: flat except for attention, whose sequences grow",
        "tokens per sequence",
        LENGTHS,
        lambda n: Point(lines=8192 // n, length=n, layers=2),
    ),
    "length-whole": Part(
        "length, 8192 tokens per step, one row per sequence: flat except for attention, which is linear here by design",
        "tokens per sequence",
        LENGTHS,
        lambda n: Point(lines=8192 // n, length=n, layers=2, whole=True),
    ),
    "line": Part(
        "one sequence, with rows of 64 to 128 tokens: linear except for attention",
        "tokens per sequence",
        LENGTHS,
        lambda n: Point(lines=1, length=n, layers=2),
    ),
    "layers": Part("layers, 8 sequences of 256", "layers", (2, 4, 6, 8, 12, 16), lambda n: Point(layers=n)),
    "rank": Part(
        "rank of the trained vectors (phase 1, cross-entropy), 8 sequences of 256",
        "rank",
        (1, 2, 4, 8, 16, 32, 64),
        lambda n: Point(rank=n, trained=True),
    ),
    "vectors": Part(
        "active frozen vectors of rank 8 in full fine-tuning, 8 sequences of 256",
        "vectors",
        (0, 1, 2, 3, 4),
        lambda n: Point(vectors=n),
    ),
    "batch": Part("batch, sequences of 256", "sequences", (1, 2, 4, 8, 16), lambda n: Point(lines=n)),
}


def random_parameters(point: Point, model: Architecture) -> Params:
    """Return a decoder and vectors with random weights; both factors are nonzero, so that no work is optimized away."""
    architecture = dataclasses.replace(model, num_layers=point.layers)
    decoder = jax.jit(lambda: Decoder(architecture, nnx.Rngs(0)))()
    keys = jax.random.split(jax.random.key(0), max(point.vectors, 1))
    fresh = [LoRA(rank=point.rank).init(architecture, key) for key in keys[: point.vectors]]
    filled = tuple(jax.tree.map(lambda leaf: leaf + 1e-3, vectors) for vectors in fresh)
    vectors = filled or None
    return Params(Backbone(decoder), vectors)


def random_batch(point: Point, vocabulary: int) -> dict:
    """Return a batch from the pipeline, made from enough rows to fill it twice."""
    rng = np.random.default_rng(0)
    shortest, longest = (point.length, point.length) if point.whole else ROW
    rows = []
    for size in rng.integers(shortest, longest + 1, 4 + 2 * point.lines * point.length // shortest):
        tokens = rng.integers(1, vocabulary, size + 1).astype(np.int32)
        rows.append(Example(tokens, np.arange(size + 1) > size // 2))
    return Stream({"all": rows}, point.lines, point.length, epochs=None).local_batches().take(1)


def measured(point: Point, model: Architecture = MODEL, clock: float = SECONDS) -> dict:
    """Return seconds and bytes of a point's step, and the tokens in its batch. clock: replaces `SECONDS`."""
    params = random_parameters(point, model)
    default = PHASE1 if point.trained else PHASE2
    training = dataclasses.replace(default, batch_size=point.lines, max_seq_len=point.length)
    if point.trained:
        phase, train_step = phase1_step(params, Phase1("cross_entropy"), training, 100)
    else:
        phase, train_step = phase2_step(params, ("all",), training, 100)
    trained, frozen = phase.split(params)
    state, batch = train_step.init(trained), {LEARN: random_batch(point, model.vocab_size)}
    start = time.monotonic()
    step = train_step.step.lower(trained, state, frozen, batch).compile()
    compiling = time.monotonic() - start
    seconds: list[float] = []
    while len(seconds) <= LEAST or (len(seconds) <= MOST and sum(seconds) < clock):
        start = time.monotonic()
        trained, state, metrics = step(trained, state, frozen, batch)
        jax.block_until_ready((trained, state, metrics))
        seconds.append(time.monotonic() - start)
    return {
        "seconds": statistics.median(seconds[1:]),  # the first step also faults in the memory
        "fastest_seconds": min(seconds[1:]),
        "compile_seconds": compiling,
        "bytes": program_bytes(step),
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "tokens": int((batch[LEARN]["segments"] != 0).sum()),
    }


def fits(sizes: list[int], values: list[float]) -> dict[str, float]:
    """Fit a power law and a straight line.

    Returns the exponent of the power law over the larger half of the points (at least two), the line
    `each * size + start` over all points, and the largest deviation from it relative to the value. Only the smallest
    size may be 0, and only if there are three or more.
    """
    upper = list(zip(sizes, values))[min(len(sizes) // 2, len(sizes) - 2) :]
    exponent = np.polyfit(*np.log(np.array(upper).T), 1)[0]
    each, start = np.polyfit(sizes, values, 1)
    deviation = max(abs(value - each * size - start) / value for size, value in zip(sizes, values))
    return {"exponent": exponent, "each": each, "start": start, "deviation": deviation}


def smallest(part: Part) -> Part:
    """Return the part with only its first points, two of them above 0 as the power law requires."""
    return dataclasses.replace(part, sizes=part.sizes[: 2 if part.sizes[0] else 3])


def run_part(part: Part, measure: Callable[[Point], dict]) -> dict:
    """Measure all points of a part, printing each, and compute the fits."""
    points = []
    for size in part.sizes:
        points.append({"size": size} | measure(part.point(size)))
        print(f"{part.size} {size}: {points[-1]['seconds']:.3f} s", flush=True)
    results = {name: fits(list(part.sizes), [point[name] for point in points]) for name in ("seconds", "bytes")}
    return {"environment": environment_facts() | devices(), "title": part.title, "points": points, "fits": results}


def tables(results: dict[str, dict]) -> str:
    """Return one table of points per part, and one of all fits."""
    lines = []
    for name, part in results.items():
        lines += [f"**{name}**: {part['title']}", ""]
        lines += [f"| {PARTS[name].size} | step | memory | temporary memory | compilation |", "| ---: " * 5 + "|"]
        for point in part["points"]:
            memory, temporary = (f"{point[key] / 2**20:,.0f} MiB" for key in ("bytes", "temporary_bytes"))
            lines.append(
                f"| {point['size']} | {1e3 * point['seconds']:,.0f} ms | {memory} | {temporary} | "
                f"{point['compile_seconds']:.1f} s |"
            )
        lines.append("")
    lines += ["| part | time exponent | linear fit of time | max error | memory exponent | linear fit | max error |"]
    lines += ["| --- " + "| ---: " * 6 + "|"]
    for name, part in results.items():
        cells = []
        for key, scale, unit in (("seconds", 1e3, "ms"), ("bytes", 2**-20, "MiB")):
            fit = part["fits"][key]
            line = f"{_short(scale * fit['start'])} + {_short(scale * fit['each'])} n {unit}"
            cells += [f"{fit['exponent']:.2f}", line, f"{100 * fit['deviation']:.0f}%"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results file")
    parser.add_argument("--part", choices=PARTS, help="measure only this part")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    parser.add_argument("--toy", action="store_true", help="smoke test: the smallest points of a narrow model")
    options = parser.parse_args()
    known = {name: smallest(part) if options.toy else part for name, part in PARTS.items()}
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    if not options.table:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
        chosen = {"model": TOY, "clock": 0.0} if options.toy else {}
        measure = functools.cache(functools.partial(measured, **chosen))  # parts share points
        for name in [options.part] if options.part else PARTS:
            print(f"{name}: {known[name].title}", flush=True)
            results = {key: results.get(key) for key in PARTS} | {name: run_part(known[name], measure)}
            results = {key: part for key, part in results.items() if part is not None}
            with atomic_file(options.json) as staging:
                staging.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
