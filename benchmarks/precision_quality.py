"""What frozen weights held in bfloat16, int8 or nf4 cost: vectors and a task LoRA on the quickstart's rows, scored.

    python benchmarks/precision_quality.py --json FILE --model ALIGNED    # half an hour on two cores
    python benchmarks/precision_quality.py --json FILE --table            # only print the table
    python benchmarks/precision_quality.py --json FILE --toy              # smoke test

Over weights of each precision, vectors are trained as in the quickstart; then a task LoRA is trained under them on its
mix of rows, and merged into the weights in full; the model is scored on the quickstart's held-out prompts. The first
row is the same fine-tuning over float32 without vectors. One seed.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from toy import SIZES, toy_model

import secvec_jax as sv
from secvec_jax.evaluation.metrics import percent
from secvec_jax.evaluation.results import environment_facts
from secvec_jax.evaluation.suite import outcomes, scores
from secvec_jax.evaluation.tables import markdown_table
from secvec_jax.files import atomic_file
from secvec_jax.model.quantized import PRECISIONS
from secvec_jax.workspace.splits import Sizes, make_splits
from secvec_jax.workspace.stages import devices
from secvec_jax.workspace.workspace import Experiment

EXPERIMENT = Experiment()
TASK = sv.LoRA(rank=16, alpha=32.0)
FINETUNE = dataclasses.replace(EXPERIMENT.finetune_training, optimizer="adamw", learning_rate=1e-3, max_grad_norm=1.0)
METRICS = ("refusal", "compliance", "over_refusal", "exact_match", "harmful_loss")


def trained(name: str, folder: str, sizes: Sizes, steps: int | None) -> dict[str, Any]:
    """The scores of the model that is fine-tuned over weights of the precision `name`; "plain": without vectors.

    It is saved and loaded again, with the weights of `folder` in full and the task LoRA merged into them.
    """
    model = sv.load(folder, "float32" if name == "plain" else name)
    splits = make_splits(model, sizes, FINETUNE, EXPERIMENT.seed)
    vectors = None
    if name != "plain":
        vectors = sv.train_vectors(
            model,
            splits.vectors,
            EXPERIMENT.lora,
            benign=splits.keep,
            phase1=EXPERIMENT.phase1,
            training=dataclasses.replace(EXPERIMENT.vectors_training, max_steps=steps),
        )
    training = dataclasses.replace(FINETUNE, max_steps=steps)
    tuned = sv.finetune(model, splits.mix, vectors=vectors, task=TASK, training=training)
    with tempfile.TemporaryDirectory() as saved:
        tuned.save(saved)
        del model, tuned
        in_full = sv.load(saved)
    found = {metric: score.as_dict() for metric, score in scores(outcomes(in_full, splits.suite)).items()}
    return {metric: found[metric] for metric in METRICS}


def table(results: dict[str, Any]) -> str:
    """A row of each precision."""

    def cell(metric: str, entry: dict[str, Any]) -> str:
        numbers = [entry["value"], *entry["ci95"]]
        value, low, high = (f"{n:.2f}" if metric == "harmful_loss" else percent(n) for n in numbers)
        return f"{value} [{low}, {high}]"

    names = {"plain": "float32, without vectors"}
    body = [[names.get(name, name), *(cell(metric, row[metric]) for metric in METRICS)] for name, row in
            results["rows"].items()]  # fmt: skip
    return markdown_table(["weights", *METRICS], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results file; rows in it are kept")
    parser.add_argument("--model", default="smollm2-aligned", help="an aligned model")
    parser.add_argument("--table", action="store_true", help="only print the table of the results file")
    parser.add_argument(
        "--toy", action="store_true", help="smoke test: two steps each on a model with two small layers"
    )
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json.exists() else {"rows": {}}
    if not options.table:
        results["environment"] = environment_facts() | devices()
        with tempfile.TemporaryDirectory() as scratch:
            folder, sizes, steps = options.model, EXPERIMENT.sizes, None
            if options.toy:
                toy_model().save(scratch)
                folder, sizes, steps = scratch, SIZES, 2
            full, *smaller = PRECISIONS
            for name in ["plain", full, *reversed(smaller)]:
                if name not in results["rows"]:
                    results["rows"][name] = trained(name, folder, sizes, steps)
                    with atomic_file(options.json) as staging:
                        staging.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
