"""Seconds per optimizer step on the quickstart's rows, compared with transformers and PEFT.

    python benchmarks/train_speed.py --json OUT [--part full] [--rounds 5] [--toy]

Both sides use the same model, the same rows in each optimizer step, the same optimizer and the same loss, which must
agree to 1e-3 before the first step. We pack the rows, PEFT pads them. Ratios are of seconds, and therefore of useful
tokens per second: tokens of the rows including the chat template, without padding. Each part is written to OUT when it
ends.
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
from secvec_jax.defenses.guarded import guarded
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.defenses.security_vectors import Phase1, phase1_step
from secvec_jax.defenses.vaccine import vaccine
from secvec_jax.evaluation.results import environment_facts
from secvec_jax.files import atomic_file
from secvec_jax.training.objective import KEEP, LEARN, Backbone, Params
from secvec_jax.training.step import make_train_step
from secvec_jax.vectors.lora import LoRA, random_like
from secvec_jax.vectors.peft import load_peft, save_peft
from secvec_jax.workspace.splits import Splits, make_splits
from secvec_jax.workspace.workspace import Experiment

PIECES = 3
"""Optimizer steps per turn, each on a different batch; 1 with --toy."""

EXPERIMENT = Experiment()
TASK = LoRA(rank=8, alpha=16.0)
FULL = dataclasses.replace(EXPERIMENT.finetune_training, learning_rate=1e-6, max_steps=1000)
"""The quickstart's fine-tuning settings, with a learning rate that hardly changes the model."""
PHASE1_TRAINING = dataclasses.replace(EXPERIMENT.vectors_training, learning_rate=1e-6, max_steps=1000)


def training_side(
    folder: str, adapter: str | None, batches: Sequence[dict[str, Batch]], kind: str, training: Training
) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Make a side of `sides.alternate` whose work is an optimizer step on a packed batch.

    kind: "full" or "lora" fine-tuning, "guarded" for full fine-tuning with safe rows, "vectors" for phase 1, "vaccine"
    or "vaccine lora". adapter: a PEFT folder of vectors that are active and frozen, or None.
    """
    model = sv.load(folder)
    task_vectors = TASK.init(model.architecture, jax.random.key(0))
    vectors = load_peft(adapter, model) if adapter else task_vectors if kind == "vectors" else None
    params = Params(Backbone(model.backbone, task_vectors if kind.endswith("lora") else None), vectors)
    if kind == "vectors":
        phase, train_step = phase1_step(params, Phase1("kl" if KEEP in batches[0] else "cross_entropy"), training, 1000)
    else:
        make_step = {"vaccine": vaccine(), "guarded": guarded()}.get(kind.split()[0], make_train_step)
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

    for piece in range(len(batches)):  # with the learning rates of this file the model hardly changes
        step(piece)
    shapes = [list(batch[LEARN]["tokens"].shape) for batch in batches]
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(trained))
    return {"losses": losses[: len(batches)], "shapes": shapes, "trained": num_trained}, step


def packed(examples: Sequence[Example], training: Training, pieces: int, stream: str = LEARN) -> list[dict[str, Batch]]:
    """The first batches that training on the examples takes, so many."""
    share_prefix = training.share_prefix is not False
    source = Stream({"all": examples}, training.batch_size, training.max_seq_len, training.seed, None, share_prefix)
    return [{stream: batch} for batch in itertools.islice(source.batches(), pieces)]


def rows_of(batch: Batch) -> list[rival.Row]:
    """Return the rows of a packed batch, each with the shared prefix of its sequence."""
    rows = []
    for index in range(len(batch["tokens"])):
        sequence = {key: batch[key][index] for key in batch}
        prefix = sequence["tokens"][sequence["segments"] == SHARED].tolist()
        for segment in range(1, sequence["segments"].max() + 1):
            in_row = sequence["segments"] == segment
            targets, weights = sequence["targets"][in_row], sequence["weights"][in_row]
            tokens = [*prefix, *sequence["tokens"][in_row].tolist(), int(targets[-1])]
            labels = [int(target) if weight else -100 for target, weight in zip(targets, weights)]
            rows.append((tokens, [-100] * (len(prefix) + 1) + labels))
    return rows


def windows(examples: Sequence[Example], rows: int, length: int, pieces: int) -> list[dict[str, Batch]]:
    """Return batches `[rows, length]` cut from the examples' text, without padding; every token is supervised."""
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
    """Return the rows of each batch. Raises RuntimeError if a row is not one of the examples in full."""
    known = {tuple(example.tokens.tolist()) for example in examples}
    rows_by_batch = [rows_of(batch[LEARN]) for batch in batches]
    if not all(tuple(tokens) in known for rows in rows_by_batch for tokens, _ in rows):
        raise RuntimeError("a packed batch contains a row that is not one of the examples")
    return rows_by_batch


def parts(splits: Splits, folder: str, adapter: str, pieces: int) -> dict[str, dict[str, Side]]:
    """Return the sides of each part, which are timed against each other."""
    mix = [example for rows in splits.mix.values() for example in rows]
    batches, harmful = packed(mix, FULL, pieces), packed(splits.vectors, PHASE1_TRAINING, pieces)
    half = dataclasses.replace(PHASE1_TRAINING, batch_size=PHASE1_TRAINING.batch_size // 2)
    with_kl = [learn | keep for learn, keep in zip(harmful, packed(splits.keep, half, pieces, KEEP))]
    cut = windows(mix, 8, 64, pieces)
    with_safe = [learn | safe for learn, safe in zip(batches, packed(splits.refusals, FULL, pieces, SAFE))]
    halved = dataclasses.replace(FULL, batch_size=FULL.batch_size // 2)
    with_half = [learn | safe for learn, safe in zip(batches, packed(splits.refusals, halved, pieces, SAFE))]
    twice = packed(mix, dataclasses.replace(FULL, batch_size=2 * FULL.batch_size), pieces)
    unshared = dataclasses.replace(FULL, share_prefix=False)  # Vaccine perturbs each row's own tokens
    unshared_batches = packed(mix, unshared, pieces)

    def secvec_side(batches, kind, training=FULL, under=None) -> Side:
        return Side(training_side, (folder, under, batches, kind, training))

    def peft_side(rows, rank, under=None) -> Side:
        return Side(rival.training, (folder, under, rows, rank, TASK.alpha, 1e-6))

    large = packed(mix, dataclasses.replace(FULL, batch_size=4 * FULL.batch_size), pieces)
    mix_rows, harmful_rows = check_rows(batches, mix), check_rows(harmful, splits.vectors)
    lora = dataclasses.replace(PHASE1_TRAINING, share_prefix=False)
    return {
        "full": {
            "full": secvec_side(batches, "full"),
            "full under vectors": secvec_side(batches, "full", under=adapter),
            "full, PEFT": peft_side(mix_rows, 0),
            "full under vectors, PEFT": peft_side(mix_rows, 0, adapter),
        },
        "large": {
            "full, large batch": secvec_side(large, "full"),
            "full, large batch, PEFT": peft_side(check_rows(large, mix), 0),
        },
        "vectors": {
            "vectors": secvec_side(harmful, "vectors", PHASE1_TRAINING),
            "vectors with KL": secvec_side(with_kl, "vectors", PHASE1_TRAINING),
            "full on their rows": secvec_side(harmful, "full"),
            "vectors, PEFT": peft_side(harmful_rows, TASK.rank),
        },
        "guarded": {
            "full, same rows": secvec_side(batches, "full"),
            "guarded vectors": secvec_side(with_safe, "guarded", under=adapter),
            "guarded vectors, safe_batch 0.5": secvec_side(with_half, "guarded", under=adapter),
            # What user and safe rows in one batch would take at least, were switching the vectors row by row free.
            "full, twice the rows": secvec_side(twice, "full"),
        },
        "raw": {
            "raw full": secvec_side(cut, "full"),
            "raw LoRA": secvec_side(cut, "lora", PHASE1_TRAINING),
            "raw full, PEFT": peft_side([rows_of(batch[LEARN]) for batch in cut], 0),
            "raw LoRA, PEFT": peft_side([rows_of(batch[LEARN]) for batch in cut], TASK.rank),
        },
        "vaccine": {
            "SFT": secvec_side(unshared_batches, "full", unshared),
            "Vaccine": secvec_side(unshared_batches, "vaccine", unshared),
            "SFT, LoRA": secvec_side(unshared_batches, "lora", lora),
            "Vaccine, LoRA": secvec_side(unshared_batches, "vaccine lora", lora),
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
    "guarded_vs_full": ("guarded vectors", "full, same rows"),
    "guarded_half_vs_full": ("guarded vectors, safe_batch 0.5", "full, same rows"),
    "twice_the_rows_vs_full": ("full, twice the rows", "full, same rows"),
    "vaccine_vs_sft": ("Vaccine", "SFT"),
    "vaccine_lora_vs_sft": ("Vaccine, LoRA", "SFT, LoRA"),
}
"""Name of a ratio -> (numerator, denominator), whose seconds are divided."""

SAME_LOSS = [pair for name, pair in RATIOS.items() if name.endswith("_vs_peft")]


def check_losses(side_times: dict[str, Times]) -> float:
    """Return the largest difference between the losses before the first step. Raises RuntimeError above 1e-3."""
    worst = 0.0
    for one, other in SAME_LOSS:
        if one in side_times:
            losses = zip(side_times[one].facts["losses"], side_times[other].facts["losses"])
            worst = max(worst, *(abs(a - b) for a, b in losses))
    if worst > 1e-3:
        raise RuntimeError(f"the sides do not compute the same loss: they differ by {worst:.2g}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="output file")
    parser.add_argument(
        "--part", choices=("full", "large", "vectors", "guarded", "raw", "vaccine"), help="only this comparison"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="smoke test of every part on a model with two small layers")
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
        side_times: dict[str, Times] = {}
        for name in [arguments.part] if arguments.part else chosen:
            side_times |= alternate(chosen[name], arguments.rounds, pieces, fork=arguments.toy)
            results = summary(side_times, chosen, pieces)
            with atomic_file(arguments.json) as staging:
                staging.write_text(json.dumps(results, indent=1))
    for name, side in results["sides"].items():
        print(f"{name:26} {side['seconds']:7.3f} s/step  {side['peak_gib']:5.2f} GiB  {side['shapes'][0]}")
    for name, value in results["ranges"].items():
        print(f"{name:26} {value['median']:6.3f}  [{value['least']:.3f}, {value['largest']:.3f}]  n={value['n']}")


def summary(side_times: dict[str, Times], chosen: dict[str, dict[str, Side]], pieces: int) -> dict[str, Any]:
    """Return the results of the finished parts, as written to the file. Raises RuntimeError if the losses differ."""
    useful = {
        name: sum(len(tokens) for rows in side.arguments[2] for tokens, _ in rows) / pieces
        for sides in chosen.values() for name, side in sides.items() if name.endswith("PEFT")
    }  # fmt: skip
    ratios = {name: ratio(side_times[a], side_times[b]) for name, (a, b) in RATIOS.items() if a in side_times}
    medians = {name: value["median"] for name, value in ratios.items()}
    if "frozen_vectors" in medians:
        medians["frozen_vectors_overhead"] = medians.pop("frozen_vectors") - 1
    return {
        "command": "python benchmarks/train_speed.py",
        "environment": environment_facts() | machine(),
        "ratios": medians,
        "ranges": ratios,
        "largest difference of losses": check_losses(side_times),
        "useful tokens per step": useful,
        "sides": {name: times.as_dict(pieces) for name, times in side_times.items()},
    }


if __name__ == "__main__":
    main()
