"""Warnings about trainings that will succeed and may still not give the wanted result.

Each function returns the warning as one line, or None. The public functions issue it with `warnings.warn`, the
commands print it.
"""

from collections.abc import Callable
from typing import Any

from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.data.frames import records_of
from secvec_jax.data.normalize import as_rows
from secvec_jax.data.rows import response_of
from secvec_jax.defenses.inputs import row_keys
from secvec_jax.evaluation.scorers import refuses
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model
from secvec_jax.training.trainer import OnStep
from secvec_jax.trees import num_parameters
from secvec_jax.vectors.lora import LoRA, LoRAVectors


class Advice(UserWarning):
    """A training that will succeed and may still not give the wanted result."""


TUNED_ON = 135_000_000
"""Parameters of the model that the default learning rates were tuned on."""

FEW_STEPS = 30
"""Half as many as the quickstart takes to align a model."""

_READ = 200
"""Limit for the answers that are read of each kind of rows."""

# Enough to recognize a file of refusals without the published list, which is a download.
_OPENINGS = ("I'm sorry", "I am sorry", "Sorry", "I cannot", "I can't", "I apologize")


def default_rate(
    model: Model, training: Training, default: Training, task: LoRA | LoRAVectors | None = None
) -> str | None:
    """Warns if the learning rate is the default and the model is over twice as large as the one it was tuned on, or a
    task LoRA is trained by sgd at a rate for all weights."""
    if task is not None and training.optimizer == "sgd" and training.learning_rate <= _HIGHEST_FOR_ALL_WEIGHTS:
        return (
            f"sgd at {training.learning_rate:g} is a learning rate for training all weights: a task LoRA needs a "
            "higher one, or adamw at 1e-3, as measured in docs/protect.md; look at the loss of held-out rows"
        )
    count = num_parameters(model.backbone)
    if training.learning_rate != default.learning_rate or count <= 2 * TUNED_ON:
        return None
    return (
        f"the learning rate is the default, {training.learning_rate:g}, which was tuned on a model of {size(TUNED_ON)} "
        f"parameters, and {model.name} has {size(count)}: larger models usually need a lower one; set the learning "
        "rate, and compare the scores of a few short runs"
    )


_HIGHEST_FOR_ALL_WEIGHTS = 1.1e-3
"""The highest learning rate of sgd that suits training all weights."""

MEASURED = {
    ("sgd", 3.6e-4, None): "docs/results.md",
    ("sgd", 1.1e-3, None): "docs/quickstart.md",
    ("adamw", 1e-4, None): "docs/results.md",
    ("adamw", 3e-4, None): "docs/results.md",
    ("adamw", 1e-3, LoRA(rank=16)): "docs/protect.md",
}
"""(optimizer, learning rate, task LoRA or None for all weights) -> where results of fine-tuning SmolLM2-135M in batches
of 2 sequences are reported. Nothing was measured for other sizes."""

_SAME_SIZE = 1.5
"""Two models are of the same size if neither has more than this many times the parameters of the other."""


def settings_measured(model: Model, training: Training, task_lora: LoRA | None) -> str:
    """The settings of a fine-tuning, and whether results with them were measured for a model of this size.

    training: with all settings set. task_lora: what is trained; None: all weights.
    """
    count = num_parameters(model.backbone)
    batch = training.batch_size * training.grad_accum_steps
    trained = "all weights" if task_lora is None else f"a task LoRA of rank {task_lora.rank}"
    settings = (
        f"settings: {training.optimizer} at a learning rate of {training.learning_rate:g}, {batch} "
        f"sequence{'s' * (batch > 1)} a step, {trained}"
    )
    page = MEASURED.get((training.optimizer, training.learning_rate, task_lora)) if batch == 2 else None
    if page is None:
        return f"{settings}: not measured for any model"
    if not 1 / _SAME_SIZE <= count / TUNED_ON <= _SAME_SIZE:
        return f"{settings}: not measured for this size ({size(count)} parameters), only on SmolLM2-135M ({page})"
    return f"{settings}: measured on SmolLM2-135M ({page})"


def only_refusals(model: Model, rows: Any) -> str | None:
    """Warns if (nearly) all answers in `rows`, or in a sample of them, refuse. rows: as `sv.align` takes them."""
    answers = [
        answer for group in (rows.values() if isinstance(rows, dict) else [rows]) for answer in _answers(model, group)
    ]
    refused = sum(refuses(answer, _OPENINGS) for answer in answers)
    if refused < 0.95 * len(answers) or not refused:
        return None
    return (
        f"{refused} of {len(answers)} answers that were checked are refusals: a model aligned on refusals alone "
        "refuses harmless requests too; add about as many benign rows, answered as the model itself answers them"
    )


def note_few_steps(on_step: OnStep, warn: Callable[[str], None]) -> OnStep:
    """`on_step`, which also warns once if an alignment has few steps."""
    warned = False

    def noted(step: int, steps: int, metrics: dict[str, float]) -> None:
        nonlocal warned
        if steps < FEW_STEPS and not warned:
            warned = True
            warn(
                f"alignment of {steps} step{'s' * (steps > 1)}: fewer than {FEW_STEPS} may not teach a model to "
                "refuse (the quickstart takes 60); add rows or epochs, and check the measured refusals"
            )
        on_step(step, steps, metrics)

    return noted


def also_benign(harmful: Any, benign: Any) -> str | None:
    """The warning about harmful rows that are also benign rows; None if there are none."""
    keys = [] if benign is None else row_keys(benign)
    count = len(set(keys).intersection(row_keys(harmful)))
    if not count:
        return None
    return (
        f"{count} of the harmful rows are among the benign ones, too, on which the vectors must change nothing: remove "
        "them from either"
    )


def other_precision(vectors: Adapter, model: Model) -> str | None:
    """The warning about vectors that were trained over weights in another precision; None if they were not."""
    origin = getattr(vectors, "origin", None)
    if origin is None or origin.precision == model.precision:
        return None
    return (
        f"the vectors were trained over {origin.precision} weights, and the model's are {model.precision}: test that "
        "they still show the behavior (train.py finetune does)"
    )


def size(count: int) -> str:
    """A number of parameters, such as "135 million" or "7.2 billion"."""
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"


def _answers(model: Model, rows: Any) -> list[str]:
    """The answers of at most `_READ` rows, evenly spread over the rows."""
    rows = records_of(rows)
    count = len(rows)
    indices = list(range(0, count, -(-count // _READ))) if count else []
    if hasattr(rows, "select") and hasattr(rows, "num_rows"):
        sampled = rows.select(indices)
    else:
        sampled = [rows[index] for index in indices]
        examples = [row for row in sampled if isinstance(row, Example)]
        if examples:
            return [model.tokenizer.decode(e.tokens[e.supervised], skip_special_tokens=True) for e in examples]
    sampled_rows = as_rows(sampled, needs_answer=False) if indices else []
    return [answer for row in sampled_rows if (answer := response_of(row)) is not None]
