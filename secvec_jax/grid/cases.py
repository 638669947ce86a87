"""What a defense of a grid is given, and what it hands over."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from secvec_jax.defenses.finetuning import FinetuneOptions, Groups, train_model
from secvec_jax.defenses.security_vectors import ObjectiveName
from secvec_jax.evaluation.statistics import auroc, precision_recall_f1
from secvec_jax.grid.seed_workspace import Cell, SeedWorkspace
from secvec_jax.model.hub import Model
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering

Kind = Literal["lora", "steering", "prompt"]

KINDS: dict[Kind, Spec] = {"lora": LoRA(), "steering": Steering(scale=8.0), "prompt": SoftPrompt(scale=8.0)}
"""The shapes of each kind's vectors. The scales of 8 were not tuned: with them a learning rate that suits LoRA does."""


class Defended(NamedTuple):
    """What a defense hands over. notes: numbers of its own, such as how well a filter told rows apart."""

    model: Model
    system: str | None = None
    notes: Mapping[str, float] = MappingProxyType({})


class Case(NamedTuple):
    """What a defense is given."""

    seed_workspace: SeedWorkspace
    cell: Cell
    rows: Groups
    options: FinetuneOptions

    @property
    def aligned(self) -> Model:
        """The model to be fine-tuned."""
        return self.seed_workspace.aligned

    @property
    def safe(self) -> list[Any]:
        """Rows to be safe by."""
        return self.seed_workspace.safe_for(self.cell.attack)

    @property
    def opposite(self) -> list[Any]:
        """As many rows that do not show the behavior as are known to show it."""
        return self.seed_workspace.opposite(self.cell.attack)[:100]

    @property
    def known(self) -> tuple[list[Any], list[Any]]:
        """The defender's rows of the behavior, and benign ones."""
        return self.seed_workspace.known(self.cell.attack)

    def train(self, model: Model | None = None, rows: Groups | None = None, **options: Any) -> Model:
        """The aligned model, or another, fine-tuned on the user's rows, or on others; options as in `train_model`."""
        return train_model(
            self.aligned if model is None else model, self.rows if rows is None else rows, **options, **self.options
        )

    def vectors(
        self,
        kind: Kind = "lora",
        objective: ObjectiveName = "kl",
        rank: int = 8,
        attack: str | None = None,
        inner: bool = False,
    ) -> Vectors:
        """Shared vectors for the behavior of the cell's attack, or of another.

        inner: min-min's throw-away backbone moves as the cell's fine-tuning does, by its optimizer and learning rate.
        """
        spec = LoRA(rank=rank, alpha=2.0 * rank) if kind == "lora" else KINDS[kind]
        phase1 = dataclasses.replace(self.seed_workspace.experiment.phase1, objective=objective)
        name = f"{kind} {rank} {objective}" if kind == "lora" else f"{kind} {objective}"
        if inner:
            optimizer, rate = self.cell.optimizer, self.cell.learning_rate
            phase1 = dataclasses.replace(phase1, inner_optimizer=optimizer, inner_learning_rate=rate)
            name = f"{name} {optimizer} {rate:g}"
        return self.seed_workspace.vectors(attack or self.cell.attack, name, spec, phase1)

    def aligned_by(self, name: str, align: Callable[..., Model], **changes: Any) -> Model:
        """The base model as `align(model, rows, **options)` aligns it, shared by its name. changes: to its training."""
        experiment = self.seed_workspace.experiment
        training = dataclasses.replace(experiment.align_training, seed=self.cell.seed, **changes)

        def train(checkpoints: Checkpoints, on_step: OnStep) -> Model:
            options = FinetuneOptions(
                task=experiment.align_task, training=training, checkpoints=checkpoints, on_step=on_step
            )
            return align(self.seed_workspace.base, self.seed_workspace.safe, **options)

        return self.seed_workspace.model(name, train)


def separation(scores: dict[str, list[float]], threshold: float) -> dict[str, float]:
    """How well scores by kind, high for what is to be dropped, tell the attack's rows from the others."""
    labels = [name == "attack" for name, some in scores.items() for _ in some]
    flat = [score for some in scores.values() for score in some]
    notes = {f"dropped_{name}": sum(s > threshold for s in some) / len(some) for name, some in scores.items()}
    if len(set(labels)) == 2:
        _, _, f1 = precision_recall_f1([score > threshold for score in flat], labels)
        notes |= {"auroc": auroc(flat, labels), "f1": f1}
    return notes
