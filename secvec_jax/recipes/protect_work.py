"""The inputs of `train.py protect`, and what its stages share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from secvec_jax.config import Training
from secvec_jax.data.normalize import as_rows
from secvec_jax.data.rows import Row
from secvec_jax.data.stored import Rows
from secvec_jax.defenses.base import Defense, Need
from secvec_jax.defenses.inputs import Groups
from secvec_jax.defenses.security_vectors import PHASE1
from secvec_jax.defenses.training_settings import PHASE2, PHASE2_LORA
from secvec_jax.defenses.user_inputs import sharing
from secvec_jax.evaluation.audit import Limits
from secvec_jax.evaluation.judge_client import Judge
from secvec_jax.inference import as_model
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import Precision
from secvec_jax.recipes.precision import training_precision
from secvec_jax.recipes.run_inputs import packaged_with_note
from secvec_jax.recipes.training_run import TASK_FOLDER
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.peft import WEIGHTS
from secvec_jax.workspace.packaged_rows import PackagedRows
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import Stages

FINE_TUNE = "fine-tune"
"""The stage of the fine-tuning."""

RECOMMENDED = "guarded vectors"
"""The defense that is used if none is named: the best that docs/results.md shows."""


def default_training(task_lora: LoRA | None) -> Training:
    """The default training; `PHASE2` was tuned for training all weights only."""
    return PHASE2 if task_lora is None else PHASE2_LORA


@dataclasses.dataclass(frozen=True)
class ProtectRequest:
    """What to protect. model, vectors: values or names. rows: loads the user's rows by kind.

    given: {need: function that returns what the user gives for it}. frozen_weights: the precision of frozen weights, of
    a model that is loaded. training: with all settings set. keep_replies: keep whole replies to harmful prompts in the
    audit, as is always done for a judge.
    """

    model: Any
    rows: Callable[[], Groups]
    defense: Defense
    given: Mapping[Need, Callable[[], Any]]
    vectors: Any
    drop: bool
    eval_fraction: float
    task_lora: LoRA | None
    frozen_weights: Precision | None
    training: Training
    system: str | None
    limits: Limits
    max_prompts: int
    reply_tokens: int
    check_prompts: int
    judge: Judge | None = None
    keep_replies: bool = False


class Work:
    """What the stages share: the model, the rows, the notes and facts of the report."""

    def __init__(self, request: ProtectRequest, stages: Stages):
        self.request, self.stages, self.folder = request, stages, stages.folder
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}
        self.task_lora: Literal["saved", "merged"] | None = None
        """Whether the task LoRA is saved by itself or only merged into the model; None: there is none, or not yet."""
        self._noted: list[str] = []
        self._kept: dict[Need, Any] = {}

    def stage(self, name: str, run: Callable[[Stage], Any], **contents: Any) -> Any:
        """The result of a stage (see `Stages.run`), which is stored with its notes."""

        def noted(stage: Stage) -> dict[str, Any]:
            self._noted = []
            result = run(stage)
            return {"result": result, "notes": self._noted}

        done = self.stages.run(name, noted, **contents)
        self.notes += done["notes"]
        return done["result"]

    def note(self, text: str | None) -> None:
        """Print a line and keep it for the report; None: nothing."""
        if text is not None:
            self._noted.append(text)
            self.stages.console.print(text)

    @cached_property
    def model(self) -> Model:
        """The original model."""
        return as_model(self.request.model, self.precision)

    @property
    def precision(self) -> Precision:
        """The precision of the original model's weights."""
        request = self.request
        if isinstance(request.model, Model):
            return request.model.precision
        return training_precision(request.frozen_weights, request.training, request.task_lora, request.defense)

    def forget_model(self) -> None:
        """Release the original model, unless the caller keeps it."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("packaged", None)

    @property
    def model_name(self) -> str:
        return self.request.model.name if isinstance(self.request.model, Model) else str(self.request.model)

    @property
    def vectors_file(self) -> Path:
        return self.folder / "vectors" / "security.safetensors"

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def made(self) -> dict[str, Path]:
        """{kind: path} of the fine-tuned model's files."""
        return {"the model": self.model_folder, "the task LoRA": self.folder / TASK_FOLDER / WEIGHTS}

    @cached_property
    def groups(self) -> dict[str, Rows[Row]]:
        """The user's rows by kind."""
        groups = self.request.rows()
        return {name: as_rows(group, name="data" if name == "all" else name) for name, group in groups.items()}

    @cached_property
    def rows(self) -> Rows[Row]:
        """The user's rows, one kind after the other."""
        places = [(group, index) for group in self.groups.values() for index in range(len(group))]
        return Rows(
            lambda index: places[index][0][places[index][1]],
            len(places),
            lambda index: places[index][0].where(places[index][1]),
            answered=True,
        )

    @cached_property
    def packaged(self) -> PackagedRows:
        """The packaged rows. Their seed is fixed: with other seeds they would contain prompts of the audit."""
        training = dataclasses.replace(self.request.training, seed=0)
        file = self.folder / "own-replies.json"
        return PackagedRows(self.model, training, file, self._show_replies, tell=self.note)

    def needs(self, stage: Stage) -> dict[Need, Callable[[], Any]]:
        """{need: function that returns what is given for it, or what is packaged}."""
        self._stage = stage
        sources: dict[Need, Callable[[], Any]] = {
            need: partial(packaged_with_note, need, make, self.note) for need, make in self.packaged.sources().items()
        }
        sources |= self.request.given
        if "base model" in sources:
            sources["base model"] = lambda: as_model(self.request.given["base model"]())
        return sources

    def rows_for(self, need: Need) -> Sequence[Any]:
        """The rows for a need, given or packaged."""
        if need not in self._kept:
            source = self.request.given.get(need) or self.packaged.sources()[need]
            self._kept[need] = source()
        return self._kept[need]

    @property
    def vectors_training(self) -> Training:
        """How vectors are trained: as in the quickstart, except for the settings of rows and memory."""
        return dataclasses.replace(sharing(PHASE1, self.request.training), seed=PHASE1.seed)

    def checkpoints(self, name: str) -> Checkpoints:
        """The checkpoints of a training. `best` is a metric of the fine-tuning alone."""
        checkpoints = Checkpoints.of(self.folder / "checkpoints" / name, self.request.training)
        return checkpoints if name == FINE_TUNE else dataclasses.replace(checkpoints, best=None)

    def _show_replies(self, count: int) -> Callable[[int], None]:
        self._stage.print(f"generating the model's own replies to {count} benign prompts, for the safe rows")
        return self._stage.replies(count, "its own replies")
