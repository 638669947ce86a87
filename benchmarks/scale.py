"""Generate the table of docs/scale.md: which model fits which TPU slice, and how fast, by compile-time estimates.

    python benchmarks/scale.py [--part 0/2]      # compile the rows missing in docs/scale.json, 1 to 2 minutes each
    python benchmarks/scale.py --refresh         # ... and those that another version of JAX has compiled
    python benchmarks/scale.py --table           # write the table from docs/scale.json
    python benchmarks/scale.py --toy             # smoke test: compile one small row and print it

Needs the compiler of `jax[tpu]`, but no TPU. A row is compiled with the number of sequences given here, which is halved
until it fits.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax

from secvec_jax.files import atomic_file
from secvec_jax.model.hub import check_mesh, load_architecture
from secvec_jax.planning.plan import Plan, TooLarge, topology_mesh
from secvec_jax.recipes.plan import PlanRun, compile_plan
from secvec_jax.sharding import num_shards
from secvec_jax.vectors.lora import LoRA

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs" / "scale.json", ROOT / "docs" / "scale.md"
SLICES = {
    "v5e-4": ("v5e:2x2", "fsdp=4"),
    "v5e-16": ("v5e:4x4", "fsdp=16"),
    "v6e-8": ("v6e:2x4", "fsdp=8"),
    "v5p-8": ("v5p:2x2x1", "fsdp=4"),
    "v5p-128": ("v5p:4x4x4", "data=4,fsdp=16"),
}

ROWS = [
    # model, slice, phase, sequences per shard of the batch, length, remat
    ("llama-2-70b", "v5p-8", "vectors", 2, 2048, "full"),
    ("llama-2-13b", "v5e-4", "vectors", 4, 2048, "attention"),
    ("llama-2-7b", "v5e-4", "vectors", 4, 2048, "attention"),
    ("llama-2-7b", "v5p-8", "finetune", 8, 2048, "attention"),
    ("llama-2-13b", "v5p-8", "finetune", 8, 2048, "attention"),
    ("llama-3.1-8b", "v5p-8", "finetune", 8, 2048, "attention"),
    ("qwen3-32b", "v5p-128", "finetune", 4, 2048, "attention"),
    ("llama-2-70b", "v5p-128", "finetune", 1, 4096, "attention"),
    ("llama-2-7b", "v5p-8", "plain", 8, 2048, "attention"),
    ("llama-2-13b", "v5p-8", "plain", 8, 2048, "attention"),
    ("llama-3.1-8b", "v5p-8", "plain", 8, 2048, "attention"),
    ("qwen3-32b", "v5p-128", "plain", 4, 2048, "attention"),
    ("llama-2-70b", "v5p-128", "plain", 1, 4096, "attention"),
    ("llama-2-7b", "v5p-8", "vectors", 8, 2048, "dots"),
    ("llama-2-13b", "v5p-8", "vectors", 8, 2048, "dots"),
    ("llama-3.1-8b", "v5p-8", "vectors", 8, 2048, "dots"),
    ("qwen3-32b", "v5p-128", "vectors", 4, 2048, "attention"),
    ("llama-2-70b", "v5p-128", "vectors", 2, 4096, "attention"),
    ("llama-2-7b", "v5e-16", "finetune", 4, 2048, "attention"),
    ("llama-2-7b", "v6e-8", "finetune", 8, 2048, "attention"),
    ("llama-2-7b", "v5p-128", "finetune", 4, 2048, "attention"),
    ("llama-3.1-8b", "v5e-16", "finetune", 2, 2048, "attention"),
    ("llama-3.1-8b", "v6e-8", "finetune", 4, 2048, "attention"),
    ("llama-3.1-8b", "v5p-128", "finetune", 4, 2048, "attention"),
    ("llama-2-13b", "v5e-16", "finetune", 1, 2048, "full"),
    ("llama-2-13b", "v6e-8", "finetune", 2, 2048, "attention"),
    ("llama-2-13b", "v5p-128", "finetune", 4, 2048, "attention"),
    ("llama-2-7b", "v5e-16", "vectors", 4, 2048, "attention"),
    ("llama-2-7b", "v6e-8", "vectors", 8, 2048, "attention"),
    ("llama-3.1-8b", "v5e-16", "vectors", 4, 2048, "attention"),
    ("llama-3.1-8b", "v6e-8", "vectors", 8, 2048, "attention"),
    ("llama-2-13b", "v5e-16", "vectors", 4, 2048, "attention"),
    ("llama-2-13b", "v6e-8", "vectors", 4, 2048, "attention"),
    ("qwen3-32b", "v6e-8", "vectors", 2, 2048, "attention"),
    ("qwen3-32b", "v5p-8", "vectors", 4, 2048, "attention"),
    ("llama-2-7b", "v5p-128", "vectors", 4, 2048, "attention"),
    ("llama-2-13b", "v5p-128", "vectors", 4, 2048, "attention"),
    ("llama-3.1-8b", "v5p-128", "vectors", 4, 2048, "attention"),
]

TOY_ROW = ("llama-3.2-1b", "v5p-8", "finetune", 1, 128, "full")
REMAT_ROWS = [("llama-2-7b", "v5p-8", "finetune", 2, 2048, remat) for remat in ("none", "dots", "attention", "full")]


def key(row: tuple) -> str:
    return " ".join(map(str, row))


def measured(row: tuple) -> dict:
    """Compile a row and return the plan's figures; halve the batch until it fits."""
    model, slice_name, phase, lines, length, remat = row
    topology, mesh = SLICES[slice_name]
    file = f"configs/models/{model}.json"
    architecture = load_architecture(ROOT / file)
    with jax.set_mesh(topology_mesh(topology, mesh)):
        check_mesh(architecture)
        parts = num_shards("batch")
        while True:
            settings = PlanRun(
                model=file,
                topology=topology,
                mesh=mesh,
                phase="vectors" if phase == "vectors" else "finetune",
                lora=None if phase == "plain" else LoRA(),
            )
            training = dataclasses.replace(settings.training, batch_size=lines * parts, max_seq_len=length, remat=remat)
            try:
                plan = compile_plan(dataclasses.replace(settings, training=training), architecture)
                break
            except TooLarge as error:
                print(f"  {lines} sequences per shard: {error}", flush=True)
                smallest = 2 if phase == "vectors" else 1
                if lines == smallest:
                    return {"fits": False, "jax": jax.__version__}
                lines //= 2
    account = plan.account
    return memory_figures(plan) | {
        "lines": lines * parts,
        "seconds": plan.seconds,
        "exposed_seconds": account.exposed_seconds,
        "kernel_seconds": account.kernel_seconds,
        "mfu": plan.mfu,
        "formula": plan.formula,
        "tokens_per_second": plan.tokens / plan.seconds,
    }


def memory_figures(plan: Plan) -> dict:
    """What the tables of TPUs and of GPUs both have of a plan."""
    return {
        "fits": True,
        "total_gib": plan.total / 2**30,
        "memory_gib": plan.chip.memory / 2**30,
        "parameters_gib": plan.parameters / 2**30,
        "optimizer_gib": plan.optimizer / 2**30,
        "activations_gib": plan.activations / 2**30,
        "compile_seconds": plan.compile_seconds,
        "jax": jax.__version__,
    }


def load(file: Path = RESULTS) -> dict[str, dict]:
    return json.loads(file.read_text()) if file.exists() else {}


def is_current(name: str, refresh: bool, file: Path = RESULTS) -> bool:
    """Whether a row need not be compiled. refresh: rows of other versions of JAX do."""
    results = load(file)
    return name in results and not (refresh and results[name].get("jax") != jax.__version__)


def save(name: str, result: dict, file: Path = RESULTS) -> None:
    everything = load(file) | {name: result}
    with atomic_file(file) as staging:
        staging.write_text(json.dumps(everything, indent=1) + "\n")


def table(results: dict[str, dict], rows: list[tuple] = ROWS) -> str:
    """Return one Markdown table per model, so that none has more than eight columns."""
    head = [
        "| slice | phase | batch, remat | HBM per chip | step (vs. plain) | waiting | MFU | tokens/s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    phases = {"finetune": "2, all weights", "plain": "plain, all weights", "vectors": "1, vectors"}
    lines: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: (row[0], list(SLICES).index(row[1]), list(phases).index(row[2]))):
        result = results.get(key(row))
        if result is None:
            continue
        model, slice_name, phase, _, length, remat = row
        model_lines = lines.setdefault(model, [f"**{model}**", "", *head])
        if not result["fits"]:
            model_lines.append(f"| {slice_name} | {phases[phase]} | {remat} | does not fit | | | | |")
            continue
        plain = results.get(key((model, slice_name, "plain", *row[3:])))
        step = f"{result['seconds']:.2f} s"
        if phase == "finetune" and plain is not None and plain.get("lines") == result["lines"]:
            step += f" ({100 * (result['seconds'] / plain['seconds'] - 1):+.1f}%)"
        model_lines.append(
            f"| {slice_name} | {phases[phase]} | {result['lines']} x {length}, {remat} | "
            f"{result['total_gib']:.1f} of {result['memory_gib']:.0f} GiB | {step} | "
            f"{100 * result['exposed_seconds'] / result['seconds']:.0f}% | {100 * result['mfu']:.1f}% | "
            f"{result['tokens_per_second']:,.0f} |"
        )
    return "\n\n".join("\n".join(model_lines) for model_lines in lines.values())


def remat_table(results: dict[str, dict]) -> str:
    lines = [
        "| remat | HBM per chip | activations | step | MFU |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in REMAT_ROWS:
        result = results.get(key(row))
        if result is not None:
            lines.append(
                f"| `{row[-1]}` | {result['total_gib']:.1f} GiB | {result['activations_gib']:.1f} GiB | "
                f"{result['seconds']:.3f} s | {100 * result['mfu']:.1f}% |"
            )
    return "\n".join(lines)


def write(name: str, text: str) -> None:
    """Replace the text between this name's markers in the page."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = PAGE.read_text().partition(start)
    with atomic_file(PAGE) as staging:
        staging.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}")


def parsed_options(description: str | None) -> argparse.Namespace:
    """The command line that both tables have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th row, starting with row i")
    parser.add_argument("--refresh", action="store_true", help="also compile rows that another version of JAX compiled")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--toy", action="store_true", help="smoke test: compile one small row and print it")
    return parser.parse_args()


def main() -> None:
    options = parsed_options(__doc__)
    if options.toy:
        jax.config.update("jax_platforms", "cpu")
        print(table({key(TOY_ROW): measured(TOY_ROW)}, [TOY_ROW]))
        return
    if not options.table:
        jax.config.update("jax_platforms", "cpu")
        part, parts = map(int, options.part.split("/"))
        for row in (ROWS + REMAT_ROWS)[part::parts]:
            if not is_current(key(row), options.refresh):
                print(key(row), flush=True)
                result = measured(row)
                save(key(row), result)
                print(f"  {result}", flush=True)
    write("table", table(load()))
    write("remat", remat_table(load()))


if __name__ == "__main__":
    main()
