"""The inputs of a cell's defense, taken from what all cells of a seed share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from secvec_jax.defenses.base import DefenseInputs, changed_settings
from secvec_jax.defenses.finetuning import FinetuneOptions
from secvec_jax.defenses.inputs import Groups
from secvec_jax.grid import attacks
from secvec_jax.grid.cells import Cell
from secvec_jax.grid.seed_workspace import SeedWorkspace
from secvec_jax.model.hub import Model
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.kinds import KINDS, Spec, Vectors
from secvec_jax.vectors.lora import LoRA


class CellInputs(DefenseInputs):
    """The inputs of a cell's defense; vectors and alignments are trained once per seed."""

    def __init__(self, workspace: SeedWorkspace, cell: Cell, options: FinetuneOptions):
        self._workspace, self._cell, self._options = workspace, cell, options

    @property
    def aligned(self) -> Model:
        return self._workspace.aligned

    @property
    def base(self) -> Model:
        return self._workspace.base

    @property
    def rows(self) -> Groups:
        return self._workspace.rows(self._cell)

    @property
    def safe(self) -> Sequence[Any]:
        return self._workspace.safe_rows(self._cell.attack)

    @property
    def harmful(self) -> Sequence[Any]:
        return self._workspace.harmful_rows(self._cell.attack)

    @property
    def benign(self) -> Sequence[Any]:
        return self._workspace.benign_rows

    @property
    def contrast(self) -> Sequence[Any]:
        return self._workspace.contrast_rows(self._cell.attack)[: attacks.NUM_KNOWN]

    @property
    def eliciting_prompt(self) -> str:
        return self._workspace.attack(self._cell.attack).eliciting_prompt

    @property
    def options(self) -> FinetuneOptions:
        return self._options

    def vectors(self, spec: Spec = LoRA(), behavior: str | None = None, **phase1: Any) -> Vectors:
        """Vectors for the cell's attack, or for another attack of this name."""
        settings = dataclasses.replace(self._workspace.experiment.phase1, **phase1)
        kind = next(name for name, classes in KINDS.items() if isinstance(spec, classes.spec))
        attack = behavior or self._cell.attack
        if self._workspace.attack(attack).known is None:
            attack = "harmful"  # the same rows, so the same vectors
        name = " ".join([kind, *changed_settings(spec), *changed_settings(settings), attack])
        return self._workspace.vectors(name, attack, spec, settings)

    def align(self, name: str, align: Callable[..., Model], **training: Any) -> Model:
        """The base model aligned on the rows of alignment, whatever the attack."""
        experiment = self._workspace.experiment
        settings = dataclasses.replace(experiment.align_training, seed=self._cell.seed, **training)

        def train(checkpoints: Checkpoints, on_step: OnStep) -> Model:
            options = FinetuneOptions(
                task=experiment.align_task, training=settings, checkpoints=checkpoints, on_step=on_step
            )
            return align(self._workspace.base, self._workspace.alignment_rows, **options)

        return self._workspace.aligned_model(name, train)
