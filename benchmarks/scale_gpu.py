"""Generate the GPU table of docs/scale.md: which model fits which GPUs, by the compiler's account.

    python benchmarks/scale_gpu.py [--part 0/2]      # compile what is missing in docs/scale_gpu.json
    python benchmarks/scale_gpu.py --refresh         # ... and rows that another version of JAX has compiled
    python benchmarks/scale_gpu.py --table           # write the table from docs/scale_gpu.json
    python benchmarks/scale_gpu.py --toy             # smoke test: compile one small row and print it

Needs the compiler of `secvec_jax[cuda]`, but no GPU. The table has one row for each model, GPUs and kind of training:
that of the most precise weights with which one of `attempts` fits.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from scale import is_current, load, memory_figures, parsed_options, save, write

from secvec_jax.model.attention import Path as AttentionPath
from secvec_jax.model.attention import self_attention
from secvec_jax.model.attention_masks import visible
from secvec_jax.model.hub import check_mesh, load_architecture
from secvec_jax.planning.plan import Plan, TooLarge, topology_mesh
from secvec_jax.planning.roofline import Roofline
from secvec_jax.recipes.plan import PlanRun, compile_plan
from secvec_jax.sharding import num_shards
from secvec_jax.vectors.lora import LoRA

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "scale_gpu.json"
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b", "llama-2-70b")
TRAINED = {"vectors": "vectors (phase 1)", "task_lora": "task LoRA", "full": "all weights"}
SEQUENCES, LENGTH = 4, 2048
ATTENTION_SHAPE = (2, 4096, 32, 128)
"""Sequences, tokens, heads and channels of the attention that is compiled alone."""


class Row(NamedTuple):
    """weights: what the frozen weights, or for "full" the trained ones, are held in. sequences: per GPU, at most.
    remat: "" for the first of `attempts` that fits."""

    model: str
    topology: str
    trained: str
    weights: str
    sequences: int = SEQUENCES
    remat: str = ""

    @property
    def key(self) -> str:
        return " ".join(map(str, self)).strip()

    @classmethod
    def of(cls, key: str) -> "Row":
        """The row of a key of `RESULTS`."""
        model, topology, trained, weights, sequences, *remat = key.split()
        return cls(model, topology, trained, weights, int(sequences), *remat)


GOALS = [
    *(Row("llama-2-7b", "h100:1", "vectors", weights, 2, "attention") for weights in ("bfloat16", "int8", "nf4")),
    *(Row("llama-2-7b", "rtx4090:1", "task_lora", weights) for weights in ("bfloat16", "int8")),
    Row("llama-2-13b", "rtx4090:1", "task_lora", "nf4"),
    Row("llama-2-7b", "h100:1", "full", "bfloat16", remat="attention"),
]
FROZEN = ("bfloat16", "int8", "nf4")
PRECISIONS = {"vectors": FROZEN, "task_lora": FROZEN, "full": ("float32", "bfloat16")}
"""The precisions that the weights can have, from the highest to the lowest."""

CHOICES = [
    [Row(model, f"{gpu}:{count}", trained, weights) for weights in held]
    for gpu, count in (("rtx4090", 1), ("h100", 1), ("h100", 8))
    for model in MODELS
    for trained, held in PRECISIONS.items()
]
"""Rows that differ in precision alone, of which the table has the first that fits."""
TOY_ROW = Row("llama-3.2-1b", "h100:1", "task_lora", "bfloat16", sequences=1)


def attempts(row: Row) -> list[tuple[int, str]]:
    """(sequences per GPU, remat), the fastest first; phase 1 has half as many benign sequences besides."""
    smallest = 2 if row.trained == "vectors" else 1
    if row.remat:
        return [(row.sequences, row.remat)]
    halves = [row.sequences >> i for i in range(row.sequences.bit_length()) if row.sequences >> i >= smallest]
    return [(row.sequences, "dots")] + [(half, remat) for half in halves for remat in ("attention", "full")]


def measured(row: Row, length: int = LENGTH) -> dict:
    """Compile a row and return the plan's figures for the first attempt that fits."""
    file = f"configs/models/{row.model}.json"
    architecture = load_architecture(ROOT / file)
    full = row.trained == "full"
    settings = PlanRun(
        file,
        row.topology,
        phase="vectors" if row.trained == "vectors" else "finetune",
        task_lora=LoRA(16) if row.trained == "task_lora" else None,
        frozen_weights=None if full else row.weights,
    )
    if full and row.weights == "bfloat16":
        fewest_bytes = dataclasses.replace(settings.training, trained_weights="bfloat16", optimizer="adamw-bf16")
        settings = dataclasses.replace(settings, training=fewest_bytes)
    reason = ""
    with jax.set_mesh(topology_mesh(row.topology, "")):
        check_mesh(architecture)
        parts = num_shards("batch")
        for local, remat in attempts(row):
            training = dataclasses.replace(settings.training, batch_size=local * parts, max_seq_len=length, remat=remat)
            try:
                plan = compile_plan(dataclasses.replace(settings, training=training), architecture)
                return figures(plan, local * parts, length, remat)
            except TooLarge as error:
                reason = str(error)
                print(f"  {local} sequences per GPU, remat {remat}: {reason}", flush=True)
                if "alone" in reason:
                    break
    return {"fits": False, "reason": reason, "jax": jax.__version__}


def figures(plan: Plan, sequences: int, length: int, remat: str) -> dict:
    assert isinstance(plan.account, Roofline)
    return memory_figures(plan) | {
        "sequences": sequences,
        "length": length,
        "remat": remat,
        "bound_seconds": plan.seconds,
        "limited_by": plan.account.limited_by,
        "bound_tokens_per_second": plan.tokens / plan.seconds,
        "kernels": plan.account.kernels,
    }


# ------------------------------------------------------------------------------------------ attention alone


def ours(path: AttentionPath, segments, positions, query, key, value):
    attend = self_attention(segments, positions, path=path, window=None, shared_prefix=False)
    return attend(query, (key.transpose(0, 2, 3, 1),), (value.swapaxes(1, 2),))


def of_jax(implementation: str, segments, positions, query, key, value):
    mask = visible(segments, segments, positions, positions)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def triton_of_jax(segments, positions, query, key, value):
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(query, key, value, segments, query.shape[-1] ** -0.5, True)


ATTENTION: dict[str, Callable] = {
    "this library: Triton": partial(ours, "triton"),
    "this library: blockwise": partial(ours, "blockwise"),
    "JAX's Triton `mha` with segments": triton_of_jax,
    "`jax.nn.dot_product_attention`, cuDNN, the mask as a bias": partial(of_jax, "cudnn"),
    "`jax.nn.dot_product_attention`, XLA, with a mask": partial(of_jax, "xla"),
}


def attention_program(attend: Callable, shape: tuple[int, int, int, int] = ATTENTION_SHAPE) -> jax.stages.Compiled:
    """Attention and its gradients, compiled for an H100."""

    def both_passes(segments, positions, query, key, value, slope):
        out, pull = jax.vjp(partial(attend, segments, positions), query, key, value)
        return out, *pull(slope)

    mesh = topology_mesh("h100", "")
    with jax.set_mesh(mesh):
        everywhere = jax.NamedSharding(mesh, jax.P())
        marks = [jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=everywhere)] * 2
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere)] * 4
        return jax.jit(both_passes).lower(*marks, *arrays).compile()


def attention_table() -> str:
    lines = ["| attention | temporary memory |", "| --- | ---: |"]
    for name, attend in ATTENTION.items():
        size = attention_program(attend).memory_analysis().temp_size_in_bytes
        lines.append(f"| {name} | {size / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def compile_choice(choice: list[Row], refresh: bool) -> None:
    """Compile rows that differ in precision alone, from the highest on, until one fits."""
    for row in choice:
        if not is_current(row.key, refresh, RESULTS):
            print(row.key, flush=True)
            save(row.key, measured(row), RESULTS)
        if load(RESULTS)[row.key]["fits"]:
            return


def shown(results: dict[str, dict]) -> list[Row]:
    """Return the rows of the table: the goals, and of each choice the first that fits, or the last if none does.

    Where a choice is not compiled yet, rows of earlier versions take its place.
    """
    rows = [row for row in GOALS if row.key in results]
    for choice in CHOICES:
        for row in choice:
            if row.key not in results:
                rows += [old for old in map(Row.of, results) if old[:3] == row[:3]]
                break
            if results[row.key]["fits"] or row == choice[-1]:
                rows.append(row)
                break
    return list(dict.fromkeys(rows))


def table(results: dict[str, dict], rows: list[Row]) -> str:
    """Return one Markdown table per model."""
    head = [
        "| GPUs | trained | weights | batch, remat | memory per GPU | step, at least | tokens/s, at most |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    lines: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: (MODELS.index(row.model), row.topology, list(TRAINED).index(row.trained))):
        result = results[row.key]
        model_lines = lines.setdefault(row.model, [f"**{row.model}**", "", *head])
        gpu, _, count = row.topology.partition(":")
        start = f"| {count} x {gpu} | {TRAINED[row.trained]} | {row.weights} |"
        if not result["fits"]:
            model_lines.append(f"{start} does not fit | | | |")
            continue
        limit = "" if result["limited_by"] == "products" else f" ({result['limited_by']})"
        model_lines.append(
            f"{start} {result['sequences']} x {result['length']}, {result['remat']} | "
            f"{result['total_gib']:.1f} of {result['memory_gib']:.1f} GiB | {result['bound_seconds']:.2f} s{limit} | "
            f"{result['bound_tokens_per_second']:,.0f} |"
        )
    return "\n\n".join("\n".join(model_lines) for model_lines in lines.values())


def main() -> None:
    options = parsed_options(__doc__)
    jax.config.update("jax_platforms", "cpu")
    if options.toy:
        print(table({TOY_ROW.key: measured(TOY_ROW, 128)}, [TOY_ROW]))
        return
    if not options.table:
        part, parts = map(int, options.part.split("/"))
        for choice in ([[goal] for goal in GOALS] + CHOICES)[part::parts]:
            compile_choice(choice, options.refresh)
        write("gpu attention", attention_table())
    results = load(RESULTS)
    write("gpus", table(results, shown(results)))


if __name__ == "__main__":
    main()
