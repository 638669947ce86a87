"""The run directory of one training, for align, vectors and finetune: rows, notes, measured refusals, results."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secvec_jax.data.rows import Row
from secvec_jax.data.sources import load_rows
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.refusal_sample import RefusalSample, measure, sample_prompts
from secvec_jax.evaluation.suite import Suite
from secvec_jax.model.hub import Model
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.vectors.lora import LoRAVectors
from secvec_jax.vectors.peft import save_peft
from secvec_jax.workspace.runs import Run
from secvec_jax.workspace.stages import Stage


class TrainingRun(Run):
    """The run directory of a verb whose settings have `training` and `check_prompts`."""

    def __init__(self, settings: Any, command: str):
        super().__init__(settings, command)
        self.checkpoints = Checkpoints.of(self.folder / "checkpoints", settings.training)
        self.notes: list[str] = []

    @functools.cached_property
    def prompts(self) -> Suite | None:
        """The prompts that measure refusals; None if `check_prompts` is 0 or they cannot be loaded."""
        try:
            return sample_prompts(self.settings.check_prompts) if self.settings.check_prompts else None
        except UserError as error:
            self.note(f"refusals are not measured ({error}); --check-prompts 0 skips this")
            return None

    def note(self, text: str | None) -> None:
        """Print a line and keep it for the report; None: nothing."""
        if text is not None:
            self.notes.append(text)
            self.console.print(text)

    def measure_refusals(self, model: Model, stage: Stage, when: str) -> RefusalSample | None:
        """Measure and report how often the model refuses; None if there are no prompts."""
        if self.prompts is None:
            return None
        stage.say("measuring refusals")
        sample = measure(model, self.prompts)
        self.note(f"{when}{sample}")
        return sample

    def save(self, trained: Model, start: Model, stage: Stage) -> None:
        """Save the trained model, and its task LoRA, if it has one, as an adapter of the model it started from."""
        stage.say("saving")
        if isinstance(trained.adapter, LoRAVectors):
            save_peft(trained.adapter, self.folder / "task", start, holds="a task")
        trained.save(self.folder / "model")

    def finish(self, values: dict[str, Any], where: str) -> None:
        """Write the results of the training and print where its files are."""
        if self.settings.training.schedule != "constant":  # else the run can be extended from its last checkpoint
            on_main_process(lambda: shutil.rmtree(self.checkpoints.folder, ignore_errors=True))
        notes = values.pop("notes", [])
        metrics = {
            name: value if isinstance(value, dict) else {"value": value, "n": 1, "ci95": [value, value]}
            for name, value in values.items()
        }
        self.report([{"name": Path(self.settings.out).name, "metrics": metrics}], notes)
        self.console.print(where)


def rows_by_source(sources: Sequence[str], ignore_fields: Sequence[str]) -> dict[str, Sequence[Row]]:
    """The rows of each source by its name, so that their losses are reported separately; "all" for a single source.

    Raises UserError for a source that is named twice or cannot be read.
    """
    if len(sources) == 1:
        return {"all": load_rows(sources[0], ignore_fields=ignore_fields)}
    if len(set(sources)) < len(sources):
        raise UserError(f"--data names {max(sources, key=list(sources).count)} twice: name each source once")
    short = [Path(source).stem if Path(source).is_file() else source for source in sources]
    names = short if len(set(short)) == len(short) else sources
    return {name: load_rows(source, ignore_fields=ignore_fields) for name, source in zip(names, sources)}
