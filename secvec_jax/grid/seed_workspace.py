"""What the cells of a grid share, seed by seed: an aligned model, vectors, rows. Made once, by whoever comes first."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from secvec_jax.checks import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Seed, checked
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.defenses.finetuning import Groups
from secvec_jax.defenses.identity import of_rows
from secvec_jax.defenses.security_vectors import Phase1
from secvec_jax.evaluation.suite import Suite
from secvec_jax.evaluation.tables import show
from secvec_jax.grid import scenes
from secvec_jax.model.hub import Model, load
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA
from secvec_jax.workspace.inputs import Inputs, known, rows
from secvec_jax.workspace.stages import Stage, file_name
from secvec_jax.workspace.workspace import Experiment, Workspace

Optimizer = Literal["sgd", "adamw"]


@checked
@dataclasses.dataclass(frozen=True)
class Cell:
    """One fine-tuning: who defends, against what, and how it is trained."""

    defense: str
    """a name of `registry.DEFENSES`, with its settings after it: "vaccine rho=5" """
    attack: str = "harmful"
    """a name of `scenes.ATTACKS`, or a file or hub id of rows"""
    task: str = "profiles"
    """a name of `scenes.TASKS`: what the other rows teach"""
    poison: Fraction = 0.1
    """the share of rows that are the attack's; 1: no task"""
    samples: PositiveInt = 100
    """rows in an epoch; an attack that has fewer repeats them"""
    learning_rate: PositiveFloat = 3.6e-4
    optimizer: Optimizer = "sgd"
    epochs: PositiveInt = 2
    task_rank: NonNegativeInt = 0
    """the rank of a task LoRA; 0: all weights are trained"""
    seed: Seed = 0

    @property
    def name(self) -> str:
        """Of its files: every setting is in it."""
        return file_name("_".join(map(show, dataclasses.astuple(self))))


class SeedWorkspace:
    """The shared stages of one seed, in a folder of their own."""

    def __init__(self, experiment: Experiment, folder: Path):
        self.experiment = experiment
        self.workspace = Workspace(experiment, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._made: dict[tuple[Callable[..., Any], str], Any] = {}
        self._contents: Inputs = {}

    @cached_property
    def aligned(self) -> Model:
        """The model that refuses, and that every cell starts from."""
        with self._alone("align"):
            self.workspace.align_stage()
        return self.workspace.aligned

    @property
    def base(self) -> Model:
        """The model before it was aligned: read anew, for none is kept in memory beside the aligned one."""
        return load(self.experiment.model)

    def model(self, name: str, train: Callable[[Checkpoints, OnStep], Model]) -> Model:
        """A shared model, one of another alignment."""

        def work(stage: Stage) -> None:
            self.workspace.made(name, train, self.experiment.align_training, stage)

        with self._alone(name):  # made of the base model: whatever becomes of the aligned one, it stays
            self.workspace.stages.run(name, work)
        return self.workspace.model(name)

    def vectors(self, attack: str, name: str, spec: Spec, phase1: Phase1) -> Vectors:
        """Shared vectors for the behavior of this attack, trained on the defender's rows of it."""
        name = f"{name} {attack}"
        harmful, benign = self.known(attack)
        given = {"rows of the behavior": of_rows(harmful), "rows without it": of_rows(benign)}

        def work(stage: Stage) -> None:
            self.workspace.make_vectors(name, harmful, benign, spec, phase1, stage)

        with self._alone(f"vectors {name}"):
            self.workspace.stage(f"vectors {name}", work, reads=given, makes_vectors=name)
        return self.workspace.vectors(name)

    def inputs(self, cell: Cell) -> Inputs:
        """The content of what the cell's model is made of besides the recipe, which the folder is claimed for."""
        used = {f"the attack {cell.attack}": cell.attack} if cell.attack not in scenes.ATTACKS else {}
        used |= {f"the task {cell.task}": cell.task} if cell.task not in scenes.TASKS else {}
        for name in used.values():
            if name not in self._contents:
                self._contents[name] = known(rows, name)
        own = {label: self._contents[name] for label, name in used.items()}
        return {"the aligned model": self.workspace.aligned_content(), **own}

    @cached_property
    def safe(self) -> list[Example]:
        """The rows of alignment: refusals, and the base model's own replies to benign prompts."""
        with self._alone("own replies"), self.workspace.stages.show("own replies") as stage:
            rows = [*self.workspace.splits.refusals, *self.workspace.own_replies(stage)]
        return random.Random(self.experiment.seed).sample(rows, len(rows))  # so that the first few have both kinds

    def safe_for(self, attack: str) -> list[Any]:
        """Rows that show the opposite of the attack's behavior."""
        own = self._attack(attack).safe
        return self.safe if own is None else own

    def opposite(self, attack: str) -> list[Any]:
        """Rows in which the attack's behavior is called for and not shown."""
        own = self._attack(attack).safe
        return self.workspace.splits.refusals if own is None else own

    def known(self, attack: str) -> tuple[list[Any], list[Any]]:
        """The rows of the attack's behavior that the defender has, and benign ones."""
        own = self._attack(attack).known
        splits = self.workspace.splits
        return splits.vectors if own is None else own, splits.keep

    def rows(self, cell: Cell) -> Groups:
        """The user's data, by kind: "attack" and "task"."""
        bad = round(cell.poison * cell.samples)
        groups = {"attack": _repeated(self._attack(cell.attack).rows, bad)}
        if bad < cell.samples:
            groups["task"] = _repeated(self._task(cell.task).rows, cell.samples - bad)
        return {name: rows for name, rows in groups.items() if rows}

    def suite(self, cell: Cell, system: str | None = None) -> Suite:
        """What a cell's model is asked, behind the system prompt that it is served with."""
        suite, bad = self.workspace.splits.suite, self._attack(cell.attack)
        return dataclasses.replace(
            suite,
            benign=suite.benign[: scenes.ASKED],
            questions=(),
            opening_targets=(),
            probes={"task": self._task(cell.task).probe} | bad.probes,
            system=system,
        )

    def training(self, cell: Cell) -> Training:
        """How a cell's model is trained."""
        return dataclasses.replace(
            self.experiment.finetune_training,
            optimizer=cell.optimizer,
            learning_rate=cell.learning_rate,
            epochs=cell.epochs,
            max_grad_norm=1.0 if cell.optimizer == "adamw" else 0.0,
            seed=cell.seed,
        )

    def task(self, cell: Cell) -> LoRA | None:
        """The task LoRA that a cell trains, if it trains one."""
        return LoRA(rank=cell.task_rank, alpha=2.0 * cell.task_rank) if cell.task_rank else None

    def _alone(self, name: str) -> FileLock:
        return FileLock(self.workspace.folder / f".{file_name(name)}.lock")

    def _attack(self, name: str) -> scenes.Attack:
        return self._once(scenes.attack, name)

    def _task(self, name: str) -> scenes.Task:
        return self._once(scenes.task, name)

    def _once(self, make: Callable[..., Any], name: str) -> Any:
        if (make, name) not in self._made:
            self._made[make, name] = make(name, self.workspace.splits, self.experiment.seed)
        return self._made[make, name]


def _repeated(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` rows, from the first on again where there are fewer."""
    return [rows[index % len(rows)] for index in range(count)]
