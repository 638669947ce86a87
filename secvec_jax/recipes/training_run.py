"""The run directory of one training, for align, vectors and finetune: rows, notes, measured refusals, results."""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from secvec_jax.data.columns import without_columns
from secvec_jax.data.rows import Row
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.card import system_section
from secvec_jax.evaluation.refusal_sample import RefusalSample, measure, sample_prompts
from secvec_jax.evaluation.suite import Suite
from secvec_jax.files import expanded, resolved
from secvec_jax.model.hub import Model, load
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.profiling import profiled
from secvec_jax.vectors.lora import LoRAVectors
from secvec_jax.vectors.peft import save_peft
from secvec_jax.workspace.inputs import Inputs
from secvec_jax.workspace.runs import Run
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import write

SYSTEM_FILE = "system_prompt.txt"
"""In a run directory: the system prompt that its model must be served with."""

TASK_FOLDER = "task"
"""In a run directory: the task LoRA that was trained, as a PEFT adapter."""


class TrainingRun(Run):
    """The run directory of a verb whose settings have `training`, `check_prompts` and `profile`."""

    def __init__(self, settings: Any, command: str, more: Callable[[], Inputs] = dict):
        super().__init__(settings, command, more)
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

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """Trace the requested steps of the trainings in the block, and note where the trace is."""
        folder = self.folder / "profile"
        with profiled(self.settings.profile, folder) as profile:
            yield
        if profile is not None and profile.trainings == 0:
            self.note(f"no step was profiled: the run did not reach step {profile.first}, or had already passed it")
        elif profile is not None:
            self.note(f"the profile of steps {profile.first} to {profile.last} is in {folder}, for XProf")

    def note(self, text: str | None) -> None:
        """Print a line and keep it for the report; None: nothing."""
        if text is not None:
            self.notes.append(text)
            self.console.print(text)

    def measure_refusals(self, model: Model, stage: Stage, when: str) -> RefusalSample | None:
        """Measure and report how often the model refuses; None if there are no prompts."""
        sample = self.sample(model, stage)
        if sample is not None:
            self.note(f"{when}{sample}")
        return sample

    def sample(self, model: Model, stage: Stage, system: str | None = None) -> RefusalSample | None:
        """Measure how often the model refuses, served with the system prompt; None if there are no prompts."""
        if self.prompts is None:
            return None
        stage.say("measuring refusals")
        return measure(model, dataclasses.replace(self.prompts, system=system))

    def save(self, trained: Model, start: Model, stage: Stage, system: str | None = None) -> None:
        """Save the trained model, and its task LoRA, if it has one, as an adapter of the model it started from.

        system: the system prompt that the model must be served with, which is stored as well.
        """
        stage.say("saving")
        card = None if system is None else f"# {self.folder.name}\n\n{system_section(system)}\n"
        self.note(save_trained(self.folder, trained, start, system, card=card))

    @property
    def system_file(self) -> Path:
        """The file with the system prompt that the model must be served with."""
        return self.folder / SYSTEM_FILE

    def finish(self, values: dict[str, Any], where: str) -> None:
        """Write the results of the training and print where its files are.

        values: metrics; and, by these names, the notes of the report and further facts of the results' row.
        """
        if self.settings.training.schedule != "constant":  # else the run can be extended from its last checkpoint
            on_main_process(lambda: shutil.rmtree(self.checkpoints.folder, ignore_errors=True))
        notes, facts = values.pop("notes", []), values.pop("facts", {})
        metrics = {
            name: value if isinstance(value, dict) else {"value": value, "n": 1, "ci95": [value, value]}
            for name, value in values.items()
        }
        self.report([{"name": Path(self.settings.out).name, "metrics": metrics} | facts], notes)
        self.console.print(where)


def save_trained(
    folder: Path, trained: Model, start: Model, system: str | None, *, card: str | None = None, dtype: Any = None
) -> str | None:
    """Save a trained model in a run directory, its task LoRA, if it has one, as an adapter of the model that it was
    trained on, and its system prompt, if it needs one. card, dtype: as in `Model.save`.

    Returns what to tell the user if the task LoRA cannot be saved by itself.
    """
    note, adapter = None, trained.adapter
    if trained is not start and isinstance(adapter, LoRAVectors):
        base = _base_of(adapter, start)
        if base is None:
            note = (
                "the task LoRA is merged into the model and not saved by itself: it was trained on a model that the "
                "defense aligned again, which is not kept"
            )
        else:
            save_peft(adapter, folder / TASK_FOLDER, base, holds="a task")
    trained.save(folder / "model", card, dtype=dtype)
    if system is not None:
        on_main_process(lambda: write(folder / SYSTEM_FILE, f"{system}\n"))
    return note


def _base_of(adapter: LoRAVectors, start: Model) -> Model | None:
    """The model that a task LoRA was trained on: `start`, or one that a defense aligned again and saved; else None."""
    origin = adapter.origin
    if origin is None or origin.backbone == start.fingerprint:
        return start
    if not Path(origin.name).is_dir():
        return None
    saved = load(origin.name)
    return saved if saved.fingerprint == origin.backbone else None


def rows_by_source(sources: Sequence[str], ignore_fields: Sequence[str]) -> dict[str, Sequence[Row]]:
    """The rows of each source by its name, so that their losses are reported separately; "all" for a single source.

    Raises UserError for a source that is named twice or cannot be read.
    """
    if len(sources) == 1:
        return {"all": load_rows(sources[0], ignore_fields=ignore_fields)}
    files = [without_columns(source) for source in sources]
    # Of one file, other columns are other rows.
    read = [(resolved(expanded(file)), source[len(file) :]) for file, source in zip(files, sources)]
    if repeated := [source for number, source in enumerate(sources) if read[number] in read[:number]]:
        raise UserError(f"--data names {repeated[0]} twice: name each source once")
    short = [Path(file).stem if Path(file).is_file() else source for file, source in zip(files, sources)]
    names = short if len({*short, SAFE}) == len(short) + 1 else sources
    return {name: load_rows(source, ignore_fields=ignore_fields) for name, source in zip(names, sources)}
