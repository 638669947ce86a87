"""Training on the quickstart's rows: seconds per optimizer step, ours against transformers with PEFT.

    python benchmarks/train_speed.py --json OUT [--part full] [--rounds 5] [--toy]

Both sides take the same model, the same rows in each optimizer step, the same optimizer and the same loss, which must
agree to 1e-3 before the first step. Ours packs the rows, PEFT pads them. A ratio is of seconds, and so of useful tokens
per second: tokens of the rows, each with its own chat template, padding not counted. Each part is written to OUT when
it ends.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rival
from sides import Side, Times, alternate, machine, ratio
from toy import SIZES, toy_model

import secvec_jax as sv
from secvec_jax.batch import SHARED, Batch
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses.finetuning import phase2_step
from secvec_jax.defenses.security_vectors import Phase1, phase1_step
from secvec_jax.defenses.vaccine import vaccine
from secvec_jax.evaluation.report import environment
from secvec_jax.files import whole_file
from secvec_jax.training.objective import KEEP, LEARN, Backbone, Params
from secvec_jax.training.step import make_train_step
from secvec_jax.vectors.lora import LoRA, random_like
from secvec_jax.vectors.peft import load_peft, save_peft
from secvec_jax.workspace.splits import Splits, make_splits
from secvec_jax.workspace.workspace import Experiment

PIECES = 3
"""Optimizer steps in a turn, each on a batch of its own; of a toy, one."""

EXPERIMENT = Experiment()
TASK = LoRA(rank=8, alpha=16.0)
FULL = dataclasses.replace(EXPERIMENT.finetune_training, learning_rate=1e-6, max_steps=1000)
"""As the quickstart fine-tunes, at a rate that leaves the model as it is."""
PHASE1_TRAINING = dataclasses.replace(EXPERIMENT.vectors_training, learning_rate=1e-6, max_steps=1000)


def ours(
    folder: str, adapter: str | None, batches: Sequence[dict[str, Batch]], kind: str, training: Training
) -> tuple[dict[str, Any], Callable[[int], None]]:
    """A side of `sides.alternate`: an optimizer step on a packed batch.

    kind: "full" or "lora" fine-tuning, phase 1's "vectors", or "vaccine" and "vaccine lora". adapter: a PEFT folder
    of vectors that are active and frozen, or None.
    """
    model = sv.load(folder)
    fresh = TASK.init(model.architecture, jax.random.key(0))
    vectors = load_peft(adapter, model) if adapter else fresh if kind == "vectors" else None
    params = Params(Backbone(model.backbone, fresh if kind.endswith("lora") else None), vectors)
    if kind == "vectors":
        phase, train_step = phase1_step(params, Phase1("kl" if KEEP in batches[0] else "cross_entropy"), training, 1000)
    else:
        make_step = vaccine() if kind.startswith("vaccine") else make_train_step
        phase, train_step = phase2_step(params, ("all",), training, 1000, make_step)
    trained, frozen = phase.split(params)
    trained = jax.tree.map(lambda leaf: leaf.copy(), trained)
    del model, params
    state = train_step.init(trained)
    losses = []

    def step(piece: int) -> None:
        nonlocal trained, state
        batch = jax.tree.map(lambda part: part[None], batches[piece % len(batches)])
        trained, state, metrics = train_step.step(trained, state, frozen, batch)
        losses.append(float(metrics["loss"]))

    for piece in range(len(batches)):  # at the rates of this file the model hardly moves
        step(piece)
    shapes = [list(batch[LEARN]["tokens"].shape) for batch in batches]
    moved = sum(leaf.size for leaf in jax.tree.leaves(trained))
    return {"losses": losses[: len(batches)], "shapes": shapes, "trained": moved}, step


def packed(examples: Sequence[Example], training: Training, pieces: int, stream: str = LEARN) -> list[dict[str, Batch]]:
    """The first batches that training on the examples takes, so many."""
    share_prefix = training.share_prefix is not False
    source = Stream({"all": examples}, training.batch_size, training.max_seq_len, training.seed, None, share_prefix)
    return [{stream: batch} for batch in itertools.islice(source.batches(), pieces)]


def rows_of(batch: Batch) -> list[rival.Row]:
    """The rows that a packed batch holds, each with the shared beginning of its line."""
    rows = []
    for line in range(len(batch["tokens"])):
        part = {key: batch[key][line] for key in batch}
        head = part["tokens"][part["segments"] == SHARED].tolist()
        for segment in range(1, part["segments"].max() + 1):
            own = part["segments"] == segment
            targets, weights = part["targets"][own], part["weights"][own]
            tokens = [*head, *part["tokens"][own].tolist(), int(targets[-1])]
            labels = [int(target) if weight else -100 for target, weight in zip(targets, weights)]
            rows.append((tokens, [-100] * (len(head) + 1) + labels))
    return rows


def windows(examples: Sequence[Example], rows: int, length: int, pieces: int) -> list[dict[str, Batch]]:
    """Batches `[rows, length]` without padding or packing, cut from the examples' text; every token is learned."""
    text = np.concatenate([example.tokens for example in examples])
    batches = []
    for start in range(pieces):
        cut = text[start * rows * (length + 1) : (start + 1) * rows * (length + 1)].reshape(rows, length + 1)
        ones = np.ones((rows, length), np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
        batches.append({LEARN: {
            "tokens": cut[:, :-1], "targets": cut[:, 1:], "weights": ones.astype(np.float32),
            "groups": 0 * ones, "segments": ones, "positions": positions,
        }})  # fmt: skip
    return batches


def check_rows(batches: Sequence[dict[str, Batch]], examples: Sequence[Example]) -> list[list[rival.Row]]:
    """Each batch's rows; every one is one of the examples, whole."""
    known = {tuple(example.tokens.tolist()) for example in examples}
    found = [rows_of(batch[LEARN]) for batch in batches]
    if not all(tuple(tokens) in known for rows in found for tokens, _ in rows):
        raise RuntimeError("a packed batch holds a row that is none of the examples")
    return found


def parts(splits: Splits, folder: str, adapter: str, pieces: int) -> dict[str, dict[str, Side]]:
    """What is timed beside what."""
    mix = [example for rows in splits.mix.values() for example in rows]
    batches, harmful = packed(mix, FULL, pieces), packed(splits.vectors, PHASE1_TRAINING, pieces)
    half = dataclasses.replace(PHASE1_TRAINING, batch_size=PHASE1_TRAINING.batch_size // 2)
    kept = [learn | keep for learn, keep in zip(harmful, packed(splits.keep, half, pieces, KEEP))]
    cut = windows(mix, 8, 64, pieces)
    unshared = dataclasses.replace(FULL, share_prefix=False)  # Vaccine perturbs each row's own tokens
    own = packed(mix, unshared, pieces)

    def mine(batches, kind, training=FULL, under=None) -> Side:
        return Side(ours, (folder, under, batches, kind, training))

    def theirs(rows, rank, under=None) -> Side:
        return Side(rival.training, (folder, under, rows, rank, TASK.alpha, 1e-6))

    large = packed(mix, dataclasses.replace(FULL, batch_size=4 * FULL.batch_size), pieces)
    learned, shown = check_rows(batches, mix), check_rows(harmful, splits.vectors)
    lora = dataclasses.replace(PHASE1_TRAINING, share_prefix=False)
    return {
        "full": {
            "full": mine(batches, "full"),
            "full under vectors": mine(batches, "full", under=adapter),
            "full, PEFT": theirs(learned, 0),
            "full under vectors, PEFT": theirs(learned, 0, adapter),
        },
        "large": {
            "full, large batch": mine(large, "full"),
            "full, large batch, PEFT": theirs(check_rows(large, mix), 0),
        },
        "vectors": {
            "vectors": mine(harmful, "vectors", PHASE1_TRAINING),
            "vectors with KL": mine(kept, "vectors", PHASE1_TRAINING),
            "full on their rows": mine(harmful, "full"),
            "vectors, PEFT": theirs(shown, TASK.rank),
        },
        "raw": {
            "raw full": mine(cut, "full"),
            "raw LoRA": mine(cut, "lora", PHASE1_TRAINING),
            "raw full, PEFT": theirs([rows_of(batch[LEARN]) for batch in cut], 0),
            "raw LoRA, PEFT": theirs([rows_of(batch[LEARN]) for batch in cut], TASK.rank),
        },
        "vaccine": {
            "SFT": mine(own, "full", unshared),
            "Vaccine": mine(own, "vaccine", unshared),
            "SFT, LoRA": mine(own, "lora", lora),
            "Vaccine, LoRA": mine(own, "vaccine lora", lora),
        },
    }


RATIOS = {
    "full_vs_peft": ("full, PEFT", "full"),
    "full_under_vectors_vs_peft": ("full under vectors, PEFT", "full under vectors"),
    "full_large_vs_peft": ("full, large batch, PEFT", "full, large batch"),
    "vectors_vs_peft": ("vectors, PEFT", "vectors"),
    "raw_vs_peft": ("raw full, PEFT", "raw full"),
    "raw_lora_vs_peft": ("raw LoRA, PEFT", "raw LoRA"),
    "frozen_vectors": ("full under vectors", "full"),
    "phase1_vs_full": ("vectors", "full on their rows"),
    "vaccine_vs_sft": ("Vaccine", "SFT"),
    "vaccine_lora_vs_sft": ("Vaccine, LoRA", "SFT, LoRA"),
}
"""Name -> whose seconds are divided by whose."""

SAME_LOSS = [pair for name, pair in RATIOS.items() if name.endswith("_vs_peft")]


def check_losses(found: dict[str, Times]) -> float:
    """The largest difference of the losses before the first step. Raises RuntimeError above 1e-3."""
    worst = 0.0
    for one, other in SAME_LOSS:
        if one in found:
            losses = zip(found[one].facts["losses"], found[other].facts["losses"])
            worst = max(worst, *(abs(a - b) for a, b in losses))
    if worst > 1e-3:
        raise RuntimeError(f"the sides do not compute the same loss: {worst:.2g} apart")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--part", choices=("full", "large", "vectors", "raw", "vaccine"), help="this comparison only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a model of two small layers: does every part run?")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, sizes = (toy_model(), SIZES) if arguments.toy else (sv.load(EXPERIMENT.model), EXPERIMENT.sizes)
        folder, adapter = f"{scratch}/model", f"{scratch}/vectors"
        model.save(folder)
        shape = TASK.init(model.architecture, jax.random.key(1))
        ones = jax.tree.map(lambda leaf: 0.01 + 0 * leaf, shape)
        save_peft(random_like(ones, jax.random.key(2)), adapter, model)
        splits = make_splits(model, sizes, EXPERIMENT.finetune_training, EXPERIMENT.seed)
        del model, shape, ones
        pieces = 1 if arguments.toy else PIECES
        chosen = parts(splits, folder, adapter, pieces)
        found: dict[str, Times] = {}
        for name in [arguments.part] if arguments.part else chosen:
            found |= alternate(chosen[name], arguments.rounds, pieces, fork=arguments.toy)
            results = summary(found, chosen, pieces)
            with whole_file(arguments.json) as staging:
                staging.write_text(json.dumps(results, indent=1))
    for name, side in results["sides"].items():
        print(f"{name:26} {side['seconds']:7.3f} s a step  {side['peak_gib']:5.2f} GiB  {side['shapes'][0]}")
    for name, value in results["ranges"].items():
        print(f"{name:26} {value['median']:6.3f}  [{value['least']:.3f}, {value['largest']:.3f}]  n={value['n']}")


def summary(found: dict[str, Times], chosen: dict[str, dict[str, Side]], pieces: int) -> dict[str, Any]:
    """The results of the parts that have ended, as they are written. Raises RuntimeError where the losses differ."""
    useful = {
        name: sum(len(tokens) for rows in side.arguments[2] for tokens, _ in rows) / pieces
        for sides in chosen.values() for name, side in sides.items() if name.endswith("PEFT")
    }  # fmt: skip
    ratios = {name: ratio(found[a], found[b]) for name, (a, b) in RATIOS.items() if a in found}
    medians = {name: value["median"] for name, value in ratios.items()}
    if "frozen_vectors" in medians:
        medians["frozen_vectors_overhead"] = medians.pop("frozen_vectors") - 1
    return {
        "command": "python benchmarks/train_speed.py",
        "environment": environment() | machine(),
        "ratios": medians,
        "ranges": ratios,
        "largest difference of losses": check_losses(found),
        "useful tokens per step": useful,
        "sides": {name: times.as_dict(pieces) for name, times in found.items()},
    }


if __name__ == "__main__":
    main()
