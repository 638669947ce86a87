"""Speed and memory of training on one H100- or H200-class GPU, compared with transformers and PEFT.

    python benchmarks/gpu.py --part goals                              # the runs that docs/scale.md sets goals for
    python benchmarks/gpu.py --part attention remat                    # kernels; remat policies, scan vs. unrolled
    python benchmarks/gpu.py --part precision                          # frozen weights in 32, 16, 8 and 4 bits
    python benchmarks/gpu.py --part train-8b-2048 peft-8b-2048         # both sides on the same card in the same run
    python benchmarks/gpu.py --table                                   # the results as Markdown
    python benchmarks/gpu.py --toy --json OUT                          # all parts at toy size, also on a CPU
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --toy --share --json OUT    # the same, in fewer processes

A part ends within 8 minutes: rows for which no time is left are skipped, and measured in the next call. Each row runs
in a separate process, so that nothing else holds GPU memory, and is written to the JSON file (`--json`) immediately. A
row that does not fit is retried with more rematerialization, then with half as many sequences. Every step has 16,384
tokens, if they fit, in packed sequences of random tokens; "real rows" have the lengths of the packaged Alpaca rows.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "gpu.json"

SECONDS, LEAST = 450.0, 20.0
"""The time limit of a part, and the least time that must be left to start another process."""

MODELS, LENGTHS, TOKENS, SEGMENTS = ("1b", "3b", "7b", "8b"), (2048, 4096), 16384, 4
LARGE = ("7b", "8b")
"""Models whose weights, gradients and AdamW states in float32 leave room only for hidden states."""

KERNELS = (
    "as the library", "xla, packed mask", "cudnn, packed mask", "cudnn, rows with lengths", "cudnn, packed offsets",
    "triton, segments", "triton, segments, blocks of 64",
)  # fmt: skip
SECVEC_KINDS = ("full", "under vectors", "vectors", "vectors with KL", "vaccine")
"""All weights; all weights with frozen vectors; vectors with cross-entropy; vectors with a KL on half as many
additional sequences; Vaccine on all weights."""

TASK_LORA = "task LoRA under vectors"
REAL_ROWS = 0
"""Instead of a number of segments per sequence: whole rows of real lengths, as many as fit."""

REMATS = ("dots", "attention", "full")
"""Remat policies that may fit, the fastest first."""

Attempt = tuple[int, str]
"""(sequences per batch, remat policy)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A training step to measure.

    by: "ours" or "peft". segments: per sequence, or `REAL_ROWS`. remats: policies tried in this order, before the batch
    is halved. trained, frozen: what trained and frozen weights of the backbone are held in. clip: clip gradients.
    """

    part: str
    by: str
    kind: str
    model: str
    length: int
    tokens: int
    segments: int = SEGMENTS
    remats: tuple[str, ...] = ("dots", "full")
    optimizer: str = "adamw"
    trained: str = "float32"
    frozen: str = "bfloat16"
    clip: bool = False
    unrolled: bool = False

    @property
    def key(self) -> str:
        special = [f"remat {self.remats[0]}"] if self.part.startswith("remat") else []
        special += [f"{self.by} {self.model}"] if self.part.startswith("goals") else []
        special += [self.frozen] if self.part.startswith("precision") else []
        special += ["sgd"] if self.optimizer == "sgd" else []
        special += ["one segment"] if self.segments == 1 else []
        special += ["unrolled"] if self.unrolled else []
        return ", ".join([f"{self.part} {self.kind}", *special])

    @property
    def attempts(self) -> list[Attempt]:
        lines = max(1, self.tokens // self.length)
        halves = itertools.takewhile(bool, (lines >> i for i in itertools.count(1)))
        return [(lines, remat) for remat in self.remats] + [(half, self.remats[-1]) for half in halves]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """An attention kernel to measure on one layer of each case (model, length)."""

    part: str
    kind: str
    cases: tuple[tuple[str, int], ...]
    tokens: int
    segments: int = SEGMENTS
    by: str = "attention"
    attempts: tuple[Attempt, ...] = ((0, ""),)

    @property
    def key(self) -> str:
        return f"{self.part} {self.kind}"


def all_rows(toy: bool) -> list[Row | Kernels]:
    """Return the rows of all parts, the most important first."""
    models, lengths, tokens = (("toy",), (256,), 1024) if toy else (MODELS, LENGTHS, TOKENS)
    cases = tuple((model, length) for model in models if model != "3b" for length in lengths)
    size = "-toy" if toy else ""
    return [
        *_goal_rows(f"goals{size}", *(models * 2 if toy else ("8b", "7b")), lengths[-1], tokens),
        *(Kernels(f"attention{size}", kind, cases, tokens) for kind in KERNELS),
        *_precision_rows(f"precision{size}", models[-1], lengths[-1], tokens),
        *_remat_rows(f"remat{size}", models[0], lengths[0], tokens),
        *itertools.chain(*(_train_rows(*case, tokens) for case in itertools.product(models, lengths))),
        *itertools.chain(*(_rival_rows(*case, tokens) for case in itertools.product(models, lengths))),
    ]


def _goal_rows(part: str, with_lora: str, full: str, length: int, tokens: int) -> Iterator[Row]:
    real = partial(Row, part, "ours", length=length, tokens=tokens, segments=REAL_ROWS, remats=REMATS, clip=True)
    yield real(TASK_LORA, with_lora)
    yield real("under vectors", full, optimizer="adamw-bf16", trained="bfloat16")
    yield real("vectors with KL", full)
    yield Row(part, "peft", "lora", with_lora, length, tokens, segments=1, remats=("none", "full"), clip=True)


def _precision_rows(part: str, model: str, length: int, tokens: int) -> Iterator[Row]:
    for frozen in ("int8", "nf4", "float32"):  # bfloat16 is the first goal
        yield Row(part, "ours", TASK_LORA, model, length, tokens, REAL_ROWS, REMATS, frozen=frozen, clip=True)


def _remat_rows(part: str, model: str, length: int, tokens: int) -> Iterator[Row]:
    for kind, remat in itertools.product(("full", "vectors"), ("full", "attention", "dots", "none")):
        yield Row(part, "ours", kind, model, length, tokens, remats=(remat,))
    yield Row(part, "ours", "full", model, length, tokens, remats=("dots",), unrolled=True)


def _train_rows(model: str, length: int, tokens: int) -> Iterator[Row]:
    part, large = f"train-{model}-{length}", model in LARGE
    for kind in SECVEC_KINDS:
        needs_full_remat = large and not kind.startswith("vectors")
        yield Row(part, "ours", kind, model, length, tokens, remats=("full",) if needs_full_remat else ("dots", "full"))
    if large:
        for kind in ("full", "under vectors"):
            yield Row(part, "ours", kind, model, length, tokens, remats=("full",), optimizer="sgd")


def _rival_rows(model: str, length: int, tokens: int) -> Iterator[Row]:
    for segments, kind in itertools.product((SEGMENTS, 1), ("full", "lora")):
        remats = ("full",) if kind == "full" and model in LARGE else ("none", "full")
        yield Row(f"peft-{model}-{length}", "peft", kind, model, length, tokens, segments, remats)


# ------------------------------------------------------------------------------------------------- measuring


def started(row: Row | Kernels, attempts: list[Attempt], seconds: float) -> dict[str, Any]:
    """Measure the row in a separate process and return the JSON of its last output line, or how it failed."""
    text = json.dumps(dataclasses.asdict(row) | {"attempts": attempts})
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"XLA_CLIENT_MEM_FRACTION": "0.95"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if row.by == "peft":
        environment["JAX_PLATFORMS"] = "cpu"  # keep JAX from reserving the GPU's memory
    command = [sys.executable, __file__, "--row", text]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not finished in the {seconds:.0f} s that its part had left"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"error": last[0][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_this_process(row: Row | Kernels, attempts: list[Attempt], seconds: float) -> dict[str, Any]:
    """Like `started`, but in this process."""
    try:
        return child(json.loads(json.dumps(dataclasses.asdict(row) | {"attempts": attempts})))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


Start = Callable[[Row | Kernels, list[Attempt], float], dict[str, Any]]


def measured(row: Row | Kernels, deadline: float, start: Start = started) -> dict[str, Any]:
    """Return the row's result.

    Its `status` is "measured", or "failed" or "skipped" with an `error`; `too_large` has the attempts that did not fit.
    """
    left = list(row.attempts)
    too_large: list[Attempt] = []
    while left:
        seconds = deadline - time.monotonic()
        if seconds < LEAST:
            return {"status": "skipped", "error": "its part had no time left", "too_large": too_large}
        result = start(row, left, seconds)
        if "skipped" in result:
            return {"status": "skipped", "error": result["skipped"], "too_large": too_large}
        if "error" in result:
            return {"status": "failed", "error": result["error"], "too_large": too_large}
        begun = result["out_of_memory"] + 1 if "out_of_memory" in result else result["attempt"]
        too_large, left = too_large + left[:begun], left[begun:]
        if "out_of_memory" not in result:
            shapes = result.get("shapes", {}).values()
            if shapes and all("error" in shape for shape in shapes):
                return {"status": "failed", "error": next(iter(shapes))["error"]}
            return {"status": "measured", "too_large": too_large} | result
    return {"status": "failed", "error": "does not fit, even with a single sequence", "too_large": too_large}


def child(row: dict[str, Any]) -> dict[str, Any]:
    """Measure a row in the child process."""
    if row["by"] == "attention":
        from gpu_attention import attention

        return attention(row)
    from gpu_rows import peft, secvec

    return {"ours": secvec, "peft": peft}[row["by"]](row)


def surroundings() -> dict[str, Any]:
    """Return package versions, the GPU, its driver and the commit."""
    from secvec_jax.evaluation.results import environment_facts

    packages = ("torch", "peft", "triton", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13")
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    versions = {package: installed.get(package) for package in packages}
    return environment_facts() | versions | {"gpu": gpu, "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD")}


def _output(*command: str) -> str | None:
    """Return a command's standard output, or None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measure(rows: list[Row | Kernels], file: Path, share: bool = False) -> dict[str, Any]:
    """Measure the rows that are missing in the file, write each result immediately, and return the file's contents.

    share: run only the first row of each part in a separate process.
    """
    from secvec_jax.files import atomic_file

    results = json.loads(file.read_text()) if file.exists() else {"environments": [], "rows": {}}
    around = surroundings()
    if around not in results["environments"]:
        results["environments"].append(around)
    where = {"environment": results["environments"].index(around)}
    for _, part in itertools.groupby(rows, lambda row: row.part):
        deadline = time.monotonic() + SECONDS
        for number, row in enumerate(part):
            if results["rows"].get(row.key, {}).get("status") == "measured":
                continue
            result = measured(row, deadline, in_this_process if share and number else started)
            results["rows"][row.key] = dataclasses.asdict(row) | result | where
            with atomic_file(file) as staging:
                staging.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{row.key}: {result['status']} {result.get('error', '')}", flush=True)
    return results


# ---------------------------------------------------------------------------------------------------- tables


def table(results: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    rows = results["rows"]
    measured_rows = [row for row in rows.values() if row["status"] == "measured"]
    devices = sorted({row["device"] for row in measured_rows})
    steps = sorted((row for row in measured_rows if "formula" in row), key=lambda row: (row["model"], row["length"]))
    remat = [row for row in steps if row["part"].startswith("remat")]
    texts = [
        _kernel_table([row for row in measured_rows if "shapes" in row]),
        _step_table(remat, steps),
        _step_table([row for row in steps if row not in remat], steps),
        "\n".join(f"- {key}: {reason}" for key, row in rows.items() for reason in _reasons(row)),
        f"Measured on {', '.join(devices)}. MFU: the formula's FLOPs per second over the published dense bf16 peak; "
        "N: parameters in matrix multiplications, a = 2 T d L with T the length of whole sequences, or of real rows on "
        "average over their tokens; rematerialization, vectors and padding are not counted.",
    ]
    return "\n\n".join(filter(None, texts))


def _reasons(row: dict[str, Any]) -> list[str]:
    """Return why the row, or shapes of it, were not measured."""
    if row["status"] != "measured":
        return [f"{row['status']}: {row['error']}"]
    return [f"{name}: {shape['error']}" for name, shape in row.get("shapes", {}).items() if "error" in shape]


def _kernel_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of kernels: forward and backward pass of one layer, and the largest difference of any shape."""
    shapes = list(dict.fromkeys(shape for row in rows for shape in row["shapes"]))
    lines = [f"| kernel | {' | '.join(shapes)} | difference |", f"| --- | {'---: | ' * len(shapes)}---: |"]
    for row in rows:
        cases = [row["shapes"].get(shape, {}) for shape in shapes]
        cells = [f"{1e3 * x['seconds']:.2f} ms, {x['tflops']:.0f} TFLOP/s" if "seconds" in x else "-" for x in cases]
        differences = [x["difference"] for x in cases if x.get("difference") is not None]
        lines.append(f"| {row['kind']} | {' | '.join(cells)} | {f'{max(differences):.1e}' if differences else '-'} |")
    return "\n".join(lines) if rows else ""


def _step_table(rows: list[dict[str, Any]], everything: list[dict[str, Any]]) -> str:
    lines = [
        "| model | trained, by | batch, remat | tokens/s | against PEFT | MFU, formula | memory (planned) | step |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        trained = [row["kind"], *(["unrolled"] * row["unrolled"])]
        trained += [row["optimizer"]] if row["optimizer"] != "adamw" else []
        trained += ["weights in bfloat16"] if row["trained"] == "bfloat16" else []
        trained += [f"frozen weights in {row['frozen']}"] if row["frozen"] != "bfloat16" else []
        trained += {1: ["one segment per sequence"], REAL_ROWS: ["real rows"]}.get(row["segments"], [])
        mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
        cells = [
            row["model"], ", ".join([*trained, row["by"]]), f"{row['lines']} x {row['length']}, {row['remat']}",
            f"{row['tokens_per_second']:,.0f}", _against(row, everything),
            f"{mfu}, {row['formula'].replace(' per token', '')}", _memory(row), f"{row['seconds']:.3f} s",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if rows else ""


def _memory(row: dict[str, Any]) -> str:
    """Return the measured peak, and for our rows the memory that the compiler reports for the step."""
    planned = f" ({row['program_bytes'] / 2**30:.1f})" if "program_bytes" in row else ""
    return f"{row['peak_bytes'] / 2**30:.1f}{planned} GiB"


def _against(row: dict[str, Any], everything: list[dict[str, Any]]) -> str:
    """Return the throughput relative to PEFT with the same trained weights, optimizer and number of segments.

    Real rows are compared with one segment per sequence, which PEFT's fastest kernel takes.
    """
    same = {"full": "full", "under vectors": "full", "vectors": "lora", TASK_LORA: "lora"}.get(row["kind"])
    if row["by"] == "ours" and not row["part"].startswith("remat"):
        for other in everything:
            alike = all(other[name] == row[name] for name in ("model", "length", "optimizer", "trained"))
            alike = alike and other["segments"] == (row["segments"] or 1)
            if other["by"] == "peft" and other["kind"] == same and alike:
                return f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}x"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {toy: all_rows(toy) for toy in (False, True)}
    parts = list(dict.fromkeys(row.part for rows in known.values() for row in rows))
    parser.add_argument("--part", nargs="+", choices=parts, metavar="PART", help=f"only these: {', '.join(parts)}")
    parser.add_argument("--toy", action="store_true", help="smoke test on a model with 2 layers")
    parser.add_argument(
        "--share", action="store_true", help="faster --toy on a CPU: only the first row of a part gets its own process"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--row-lengths", action="store_true", help="only write the lengths of real rows")
    parser.add_argument("--row", help="measure this row (JSON) in this process; for internal use")
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(child(json.loads(options.row))))
        return 0
    if options.row_lengths:
        from gpu_rows import write_row_lengths

        write_row_lengths()
        return 0
    if options.table:
        print(table(json.loads(options.json.read_text())))
        return 0
    chosen = options.part or {row.part for row in known[options.toy]}
    if options.share and not (options.toy and os.environ.get("JAX_PLATFORMS") == "cpu"):
        parser.error("--share is for --toy under JAX_PLATFORMS=cpu: rows on a GPU must not hold each other's memory")
    rows = [row for tier_rows in known.values() for row in tier_rows if row.part in chosen]
    row_results = measure(rows, options.json, options.share)["rows"]
    return 0 if any(row_results[row.key]["status"] == "measured" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
