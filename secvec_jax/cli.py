"""The verbs of the command line, in one table: `secvec VERB`, `python train.py VERB`, `python eval.py VERB`."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from secvec_jax import command_line
from secvec_jax.verb_arguments import Verb

DESCRIPTION = """Security vectors: fine-tune a language model on data you do not trust.

Typical order: align (if the model does not refuse yet), protect (which trains vectors, fine-tunes and audits), export.
Step by step: align, vectors, finetune, audit, export."""


def _from(module: str, settings: str, function: str) -> Callable[[], tuple[type, Callable[[Any, str], Any]]]:
    """Imports a verb's settings and function when it is run, so that the other verbs' modules are not."""

    def load() -> tuple[type, Callable[[Any, str], Any]]:
        module_object = import_module(f"secvec_jax.{module}")
        return getattr(module_object, settings), getattr(module_object, function)

    return load


TRAIN: dict[str, Verb] = {
    "quickstart": Verb(
        "align, train vectors, fine-tune with and without them, and compare: one command, one table",
        _from("recipes.quickstart", "Quickstart", "quickstart"),
        ("", "--out runs/seed-1 --seed 1"),
    ),
    "objectives": Verb(
        "compare the three objectives of phase 1 on a finished quickstart",
        _from("recipes.objectives", "Objectives", "objectives"),
        ("--quickstart runs/quickstart",),
    ),
    "align": Verb(
        "teach a model to refuse harmful requests",
        _from("recipes.align", "Align", "align"),
        ("--model MODEL --out runs/aligned", "--model MODEL --data refusals.jsonl benign.jsonl --out runs/aligned"),
    ),
    "vectors": Verb(
        "phase 1: train security vectors on harmful rows, with the model frozen",
        _from("recipes.vectors", "Vectors", "vectors"),
        (
            "--model runs/aligned --data harmful.jsonl --benign benign.jsonl --out runs/vectors",
            "--model runs/aligned --data harmful.jsonl --objective cross_entropy --lora.rank 16 --lora.alpha 32",
        ),
    ),
    "finetune": Verb(
        "phase 2: fine-tune on your data, with the security vectors active and frozen",
        _from("recipes.finetune", "Finetune", "finetune"),
        (
            "--model runs/aligned --data user.jsonl --vectors runs/vectors --out runs/tuned",
            "--model runs/aligned --data user.jsonl --vectors runs/vectors --task-lora.rank 16 --task-lora.alpha 32",
        ),
    ),
    "protect": Verb(
        "fine-tune on your data the recommended way: screen it, defend the training, audit the result",
        _from("recipes.protect", "Protect", "protect_run"),
        (
            "--model runs/aligned --data user.jsonl --out runs/protected",
            "--model runs/aligned --data user.jsonl --drop --task-lora.rank 16 --json",
        ),
    ),
    "grid": Verb(
        "research: fine-tune and evaluate every cell of a grid of defenses and attacks",
        _from("grid.grid", "Grid", "grid"),
        ("configs/grids/quick.yaml", "configs/grids/full.yaml --part 1/2"),
    ),
    "plan": Verb(
        "memory and step time of a run on TPUs or GPUs, without access to them",
        _from("recipes.plan", "PlanRun", "plan"),
        (
            "--model configs/models/llama-2-7b.json --topology v5p:2x2x1 --fit",
            "--preset 7-8b-24gb --phase vectors",
        ),
        on_devices=False,
    ),
}

EVAL: dict[str, Verb] = {
    "score": Verb(
        "refusals, compliance, over-refusal, exact match and losses of a model",
        _from("recipes.score", "ScoreRun", "score"),
        ("--model runs/tuned --questions heldout.jsonl --out runs/score",),
    ),
    "audit": Verb(
        "what changed between two models, with a verdict: refusals, prefilled replies, over-refusal, general ability",
        _from("recipes.audit", "AuditRun", "audit_run"),
        (
            "--before runs/aligned --after runs/tuned --out runs/audit",
            "--before runs/aligned --after runs/tuned --data heldout.jsonl --limits.compliance 0.02",
        ),
    ),
    "judge": Verb(
        "have a model's replies graded by a language model or a classifier",
        _from("recipes.judge", "JudgeRun", "judge"),
        ("--model runs/tuned --judge NAME --judge-url http://127.0.0.1:8000/v1",),
    ),
    "compare": Verb(
        "show the results of several runs side by side",
        _from("recipes.compare", "Compare", "compare"),
        ("--runs runs/score runs/quickstart",),
        on_devices=False,
    ),
    "harness": Verb(
        "run tasks of lm-evaluation-harness",
        _from("recipes.harness", "Harness", "harness"),
        ("--model runs/tuned --tasks mmlu,gsm8k,truthfulqa_mc2",),
    ),
    "screen": Verb(
        "rank rows by how well security vectors explain them, before training on them",
        _from("recipes.screen", "Screen", "screen"),
        (
            "--data user.jsonl --vectors runs/vectors --model runs/aligned",
            "--data user.jsonl --vectors runs/vectors --model runs/aligned --harmful bad.jsonl --benign good.jsonl",
        ),
    ),
    "export": Verb(
        "write a Hugging Face folder with a model card",
        _from("recipes.export", "Export", "export"),
        ("--model runs/tuned --scores runs/score --out exported",),
    ),
}


def main() -> None:
    """The console command `secvec`: every verb."""
    command_line.program(DESCRIPTION, TRAIN | EVAL)
