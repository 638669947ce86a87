"""Growth of whole commands: with the rows of a data set on disk, the cells of a grid, and the prompts of an audit.

    python benchmarks/growth_runs.py --json FILE                    # all points: an hour on two cores
    python benchmarks/growth_runs.py --json FILE --largest 100000   # none above this size: ten minutes
    python benchmarks/growth_runs.py --json FILE --part rows        # one part; points in FILE are kept
    python benchmarks/growth_runs.py --json FILE --table            # only print the tables of FILE
    python benchmarks/growth_runs.py --json FILE --toy              # smoke test: the smallest points

Each point is a command in a process of its own, on a model with two small layers and the embedded model's tokenizer, so
that what is not the model's arithmetic shows. Its memory is the peak of the process. Other programs on the machine
change its seconds more than its seconds of processors. The exponent is the slope of log(value) over log(size) between
the two largest points.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toy import SIZES, toy_model

from secvec_jax.config import to_dict
from secvec_jax.evaluation.results import environment_facts
from secvec_jax.files import atomic_file
from secvec_jax.workspace.stages import devices

ROOT = Path(__file__).parents[1]
STEPS, UNTIMED = 20, 5
"""Optimizer steps of a run on rows, and how many of them are left out of the median."""

Point = dict[str, float]
"""What was measured: "seconds", "cpu_seconds" and "gib", and further figures by name."""

_MEASURED = """\
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    file.write(f"{used.ru_maxrss} {used.ru_utime + used.ru_stime}")
sys.exit(code)
"""
"""A small process that starts the command: the peak of a child is at least that of the process it was forked from."""


def run(*command: str, **variables: str) -> Point:
    """The seconds, seconds of processors and peak memory of a command, with these further environment variables.

    Ends this process with the command's last lines if it fails.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.NamedTemporaryFile("r") as peak:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
        start = time.monotonic()
        measured = [sys.executable, "-c", _MEASURED, peak.name, sys.executable, *command]
        code = subprocess.call(measured, cwd=ROOT, env=environment, stdout=said, stderr=said)
        seconds = time.monotonic() - start
        if code not in (0, 3, 4):  # 3 and 4 are verdicts of an audit
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with {code}:\n{said.read()[-2000:]}")
        kib, cpu_seconds = map(float, peak.read().split())
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "gib": kib / 2**20}


def write_rows(path: Path, count: int) -> None:
    """Rows that ask for sums of two numbers, in words."""
    with path.open("w") as file:
        for number in range(count):
            more = 7 * number % 9000
            prompt = f"A shelf has {number} books and {more} are added. How many are there?"
            file.write(json.dumps({"prompt": prompt, "response": f"There are {number + more} books."}) + "\n")


def with_rows(model: Path, work: Path, count: int) -> Point:
    """A fine-tuning of some steps on a file of so many rows."""
    data, out = work / "rows.jsonl", work / f"rows-{count}"
    write_rows(data, count)
    limits = ("--max-steps", str(STEPS), "--max-seq-len", "256", "--check-prompts", "0")
    point = run("train.py", "finetune", "--model", str(model), "--data", str(data), "--vectors", "none", *limits,
                "--out", str(out))  # fmt: skip
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = [step["seconds"] for step in steps[UNTIMED:-2]]
    return point | {"step_ms": 1e3 * statistics.median(timed), "file_mib": data.stat().st_size / 2**20}


def with_cells(model: Path, work: Path, count: int) -> Point:
    """A grid of so many cells, which differ in their learning rate."""
    out, file = work / f"cells-{count}", work / "grid.yaml"
    training = {"max_seq_len": 256, "remat": "dots"}
    cells = {"defense": ["none"], "poison": [0.5], "samples": [20], "epochs": [1], "optimizer": ["adamw"]}
    grid = {
        "experiment": {"model": str(model), "aligns": False, "sizes": to_dict(SIZES), "finetune_training": training,
                       "vectors_training": training | {"max_steps": 3}},
        "blocks": [cells | {"learning_rate": [1e-4 * (1 + index) for index in range(count)]}],
    }  # fmt: skip
    file.write_text(json.dumps(grid))  # JSON is YAML
    point = run("train.py", "grid", str(file), "--out", str(out))
    records = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    return point | {"median_cell_s": statistics.median(record["seconds"] for record in records)}


def with_prompts(model: Path, work: Path, count: int) -> Point:
    """An audit of a model and itself on so many prompts of each kind."""
    prompts, out = work / "prompts.jsonl", work / f"prompts-{count}"
    write_rows(prompts, count)
    flags = ("--harmful", str(prompts), "--benign", str(prompts), "--max-prompts", str(count), "--out", str(out))
    models = ("--before", str(model), "--after", str(model), "--unaligned", str(model))
    empty = str(work / f"cache-{count}")  # in which nothing is known of the model
    return run("eval.py", "audit", *models, *flags, SECVEC_CACHE=empty)


PARTS: dict[str, tuple[str, Callable[[Path, Path, int], Point], Sequence[int]]] = {
    "rows": ("rows in the data set, of which 20 steps are trained", with_rows, (10**3, 10**4, 10**5, 10**6)),
    "cells": ("cells in a grid", with_cells, (1, 2, 4, 8, 16)),
    "prompts": ("prompts of each kind in an audit", with_prompts, (50, 100, 200, 400, 800)),
}


def exponent(points: Sequence[Point], key: str) -> float:
    """Between the two largest points."""
    (small, low), (large, high) = ((point["size"], point[key]) for point in points[-2:])
    return math.log(high / low) / math.log(large / small)


def table(results: dict[str, Any]) -> str:
    """A table of each part, its last row the exponents."""
    lines = []
    for name, part in results.items():
        keys = [key for key in part["points"][0] if key != "size"]
        lines += [f"**{PARTS[name][0]}**", "", f"| size | {' | '.join(keys)} |", "| ---: " * (1 + len(keys)) + "|"]
        for point in part["points"]:
            lines.append(f"| {point['size']:,} | {' | '.join(f'{point[key]:,.2f}' for key in keys)} |")
        exponents = [f"{exponent(part['points'], key):.2f}" for key in keys]
        lines += [f"| exponent | {' | '.join(exponents)} |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results file")
    parser.add_argument("--part", choices=PARTS, help="measure only this part")
    parser.add_argument("--largest", type=int, default=10**6, help="measure no point above this size")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    parser.add_argument("--toy", action="store_true", help="smoke test: the two smallest points of each part")
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    if not options.table:
        facts = environment_facts() | devices()
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            toy_model().save(model)
            for name in [options.part] if options.part else PARTS:
                _, measure, sizes = PARTS[name]
                points = {point["size"]: point for point in results.get(name, {}).get("points", [])}
                for size in sizes[:2] if options.toy else sizes:
                    if size <= options.largest and size not in points:
                        points[size] = {"size": size} | measure(model, Path(scratch), size)
                        print(f"{name} {size}: {points[size]['seconds']:.1f} s", flush=True)
                        results[name] = {"environment": facts, "points": [points[key] for key in sorted(points)]}
                        with atomic_file(options.json) as staging:
                            staging.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
