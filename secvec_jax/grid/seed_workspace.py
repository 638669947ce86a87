"""What the cells of one seed share: an aligned model, vectors, rows, each made by the first process that needs it."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock

from secvec_jax import digests
from secvec_jax.checks import Bounds, checked
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.data.rows import Message
from secvec_jax.defenses.base import ATTACK
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.defenses.identity import of_rows
from secvec_jax.defenses.inputs import Groups
from secvec_jax.defenses.security_vectors import Phase1
from secvec_jax.evaluation.audit_measures import enough_beginnings
from secvec_jax.evaluation.prefill import GIVEN, Beginning, begun_reply, compliant_beginnings
from secvec_jax.evaluation.suite import Suite
from secvec_jax.grid.attacks import ATTACKS, Attack, AttackInputs, make_attack
from secvec_jax.grid.cells import Cell
from secvec_jax.grid.tasks import TASKS, Task, make_task
from secvec_jax.inference import ask
from secvec_jax.model.embedded import unaligned
from secvec_jax.model.hub import Model, load
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA
from secvec_jax.workspace.inputs import Inputs, known, rows
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import file_name
from secvec_jax.workspace.workspace import Experiment, Workspace


@checked
@dataclasses.dataclass(frozen=True)
class GridExperiment(Experiment):
    """The model, rows and trainings that the cells of a grid share."""

    probed: Annotated[int, Bounds(2)] = 40
    """held-out prompts for each further measurement: over-refusal and KL (at most `sizes.judged_benign`), the task, and
    the attack's behavior"""


class SeedWorkspace:
    """The shared stages of one seed, in one folder."""

    def __init__(self, experiment: GridExperiment, folder: Path):
        self.experiment = experiment
        self.workspace = Workspace(experiment, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._attacks: dict[str, Attack] = {}
        self._tasks: dict[str, Task] = {}
        self._contents: Inputs = {}

    # Models and vectors

    @cached_property
    def aligned(self) -> Model:
        """The model that refuses, from which every cell starts."""
        with self._locked("align"):
            self.workspace.align_stage()
        return self.workspace.aligned

    @property
    def base(self) -> Model:
        """The model before it was aligned; loaded each time, so that two models are in memory only while needed."""
        return load(unaligned(self.experiment.model))

    def aligned_model(self, name: str, train: Callable[[Checkpoints, OnStep], Model]) -> Model:
        """The model of another alignment, shared under this name."""

        def work(stage: Stage) -> None:
            self.workspace.train_or_load(name, train, self.experiment.align_training, stage)

        with self._locked(name):  # made of the base model, so it stays valid if the aligned one changes
            self.workspace.stages.run(name, work)
        return self.workspace.model(name)

    def vectors(self, name: str, attack: str, spec: Spec, phase1: Phase1) -> Vectors:
        """Vectors for the behavior of this attack, trained on the defender's rows of it and shared under this name."""
        harmful, benign = self.harmful_rows(attack), self.benign_rows
        contents = {"rows of the behavior": of_rows(harmful), "rows without it": of_rows(benign)}

        def work(stage: Stage) -> None:
            self.workspace.make_vectors(name, harmful, benign, spec, phase1, stage)

        with self._locked(f"vectors {name}"):
            self.workspace.stage(f"vectors {name}", work, reads=contents, makes_vectors=name)
        return self.workspace.vectors(name)

    # Rows

    def rows(self, cell: Cell) -> Groups:
        """The user's rows, by kind: "attack" and "task"."""
        num_attack = round(cell.poison * cell.samples)
        num_task = cell.samples - num_attack
        groups: Groups = {}
        if num_attack:
            groups[ATTACK] = _repeated(self.attack(cell.attack).rows, num_attack)
        if num_task:
            groups["task"] = _repeated(self.task(cell.task).rows, num_task)
        return groups

    @cached_property
    def alignment_rows(self) -> list[Example]:
        """Refusals, and the base model's own replies to benign prompts, shuffled so that the first few are of both."""
        with self._locked("own replies"), self.workspace.stages.show("own replies") as stage:
            rows = [*self.workspace.splits.refusals, *self.workspace.base_replies(stage)]
        return random.Random(self.experiment.seed).sample(rows, len(rows))

    @cached_property
    def beginnings(self) -> list[Beginning | None]:
        """Prefills for the harmful prompts: the first tokens of compliant replies of the model before it was aligned.

        "Sure, here is" for all prompts if that model complies with too few. Kept in the seed's folder.
        """
        return enough_beginnings(self._compliant_beginnings)

    def comply(self, prompts: Sequence[str]) -> list[Example]:
        """The prompts that the base model complies with, each with the first 25 tokens of its reply.

        Generated once and kept in the seed's folder.
        """
        name = f"compliant replies {digests.of_values([list(prompts)])[7:15]}"
        return self._begun(prompts, self._compliant(name, prompts))

    @cached_property
    def unseen_replies(self) -> list[Example]:
        """The same for the harmful prompts of the evaluation: nothing is trained on them."""
        return self._begun(self.workspace.splits.suite.harmful, self._compliant_beginnings)

    @cached_property
    def _compliant_beginnings(self) -> list[Beginning | None]:
        return self._compliant("beginnings", self.workspace.splits.suite.harmful)

    def _compliant(self, name: str, prompts: Sequence[str | list[Message]]) -> list[Beginning | None]:
        """The beginnings of the base model's compliant replies, generated once and kept under this name."""

        def work(stage: Stage) -> list[Beginning | None]:
            progress = stage.replies(len(prompts), "compliant replies")
            return compliant_beginnings(self.base, prompts, self.workspace.splits.suite.refusals, progress)

        with self._locked(name):
            prefills: list[Beginning | None] = self.workspace.stages.run(name, work)
        return prefills

    def _begun(self, prompts: Sequence[str | list[Message]], beginnings: list[Beginning | None]) -> list[Example]:
        longest, model = str(max(GIVEN)), self.aligned
        return [
            begun_reply(model, prompt, beginning[longest], model.architecture.max_length)
            for prompt, beginning in zip(prompts, beginnings)
            if beginning is not None and longest in beginning
        ]

    @cached_property
    def aligned_replies(self) -> list[str]:
        """The aligned model's own replies to the benign prompts, on which the KL from it is measured."""
        suite = self.workspace.splits.suite
        prompts = suite.benign[: self.experiment.probed]

        def work(stage: Stage) -> list[str]:
            return ask(
                self.aligned,
                prompts,
                max_new_tokens=suite.reply_tokens,
                batch_size=suite.batch_size,
                progress=stage.replies(len(prompts), "the aligned model's replies"),
            )

        with self._locked("aligned replies"):
            replies: list[str] = self.workspace.stage("aligned replies", work)
        return replies

    def safe_rows(self, attack: str) -> list[Any]:
        """The defender's rows that teach the opposite of the attack."""
        safe = self.attack(attack).safe
        return self.alignment_rows if safe is None else safe

    def contrast_rows(self, attack: str) -> list[Any]:
        """The defender's rows that call for the behavior of the attack and do not show it."""
        safe = self.attack(attack).safe
        return self.workspace.splits.refusals if safe is None else safe

    def harmful_rows(self, attack: str) -> list[Any]:
        """The defender's rows of the attack's behavior."""
        known = self.attack(attack).known
        return self.workspace.splits.vectors if known is None else known

    @property
    def benign_rows(self) -> list[Any]:
        """The defender's rows that are unrelated to any attack."""
        return self.workspace.splits.keep

    # Cells

    def suite(self, cell: Cell, system: str | None = None) -> Suite:
        """The evaluation suite of the cell's model, with the system prompt that it is served with."""
        suite = self.workspace.splits.suite
        return dataclasses.replace(
            suite,
            benign=suite.benign[: self.experiment.probed],
            questions=(),
            opening_targets=(),
            probes={"task": self.task(cell.task).probe} | self.attack(cell.attack).probes,
            system=system,
        )

    def training(self, cell: Cell) -> Training:
        """How the cell's model is trained."""
        return dataclasses.replace(
            self.experiment.finetune_training,
            optimizer=cell.optimizer,
            learning_rate=cell.learning_rate,
            epochs=cell.epochs,
            max_grad_norm=1.0 if cell.optimizer == "adamw" else 0.0,
            seed=cell.seed,
        )

    def task_lora(self, cell: Cell) -> LoRA | None:
        """The task LoRA that the cell trains; None: all weights."""
        return LoRA(rank=cell.lora_rank, alpha=2.0 * cell.lora_rank) if cell.lora_rank else None

    def contents(self, cell: Cell) -> Inputs:
        """Digests of the inputs of the cell's model, except the experiment, for which the folder is claimed."""
        external = {f"the attack {cell.attack}": cell.attack} if cell.attack not in ATTACKS else {}
        external |= {f"the task {cell.task}": cell.task} if cell.task not in TASKS else {}
        for name in external.values():
            if name not in self._contents:
                self._contents[name] = known(rows, name)
        digests = {label: self._contents[name] for label, name in external.items()}
        return {"the aligned model": self.workspace.aligned_content(), **digests}

    def attack(self, name: str) -> Attack:
        """The attack of this name, made once."""
        if name not in self._attacks:
            experiment = self.experiment
            inputs = AttackInputs(
                self.workspace.splits,
                experiment.seed,
                experiment.probed,
                comply=self.comply,
                encode=lambda rows: examples_of(self.aligned, rows),
            )
            self._attacks[name] = make_attack(name, inputs)
        return self._attacks[name]

    def task(self, name: str) -> Task:
        """The task of this name, made once."""
        if name not in self._tasks:
            self._tasks[name] = make_task(name, self.workspace.splits, self.experiment.seed, self.experiment.probed)
        return self._tasks[name]

    def _locked(self, name: str) -> FileLock:
        """A lock, so that only one process at a time makes the artifact of this name."""
        return FileLock(self.workspace.folder / f".{file_name(name)}.lock")


def _repeated(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` rows, starting over where there are fewer."""
    return [rows[index % len(rows)] for index in range(count)]
