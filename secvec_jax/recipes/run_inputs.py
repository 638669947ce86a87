"""The inputs of a defense in a run: rows by flag or packaged, and other trainings as stages of the run."""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from secvec_jax.arguments import check_distinct
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.advice import Advice, default_rate, note_few_steps, only_refusals
from secvec_jax.defenses.base import Need
from secvec_jax.defenses.finetuning import FinetuneOptions
from secvec_jax.defenses.gate import measure_gate
from secvec_jax.defenses.inputs import Groups
from secvec_jax.defenses.registry import listing, usable_defenses
from secvec_jax.defenses.security_vectors import PHASE1, Phase1
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.defenses.user_inputs import UserInputs, argument_of
from secvec_jax.distributed import broadcast_from_first
from secvec_jax.errors import UserError
from secvec_jax.flags import Variants
from secvec_jax.model.hub import Model, load
from secvec_jax.recipes.training_run import TrainingRun
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.kinds import Spec
from secvec_jax.vectors.store import load_vectors, save_vectors, trained_over
from secvec_jax.workspace.packaged_rows import CONTENTS, PackagedRows
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import Stages

GIVEN: tuple[Need, ...] = (
    "safe rows", "harmful rows", "benign rows", "contrast rows", "base model", "eliciting prompt"
)  # fmt: skip
"""The needs that flags give, besides vectors; see `argument_of`."""

DEFENSE_VARIANTS = {"variants": Variants(usable_defenses(), listing)}
"""The metadata of a setting whose values are the defenses, as `flags` reads them."""


class RunInputs(UserInputs):
    """The inputs of a run's defense; each training before the fine-tuning is a stage, whose result is kept."""

    def __init__(
        self, run: TrainingRun, stage: Stage, model: Model, rows: Groups, options: FinetuneOptions, vectors: Any
    ):
        self._run = run
        super().__init__(model, rows, options, _sources(run, stage, model), vectors)

    def train_vectors(self, spec: Spec, phase1: Phase1, on_step: OnStep | None = None) -> Any:
        file = self._run.folder / "vectors" / "security.safetensors"

        def work(stage: Stage) -> None:
            if broadcast_from_first(file.exists()):
                return
            self._run.note(default_rate(self.aligned, self.sharing(PHASE1), PHASE1))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Advice)  # it is noted above
                trained = super(RunInputs, self).train_vectors(spec, phase1, stage.on_step())
            save_vectors(trained, file, self.aligned)

        self._run.stages.run("vectors", work, makes={"the vectors": file})
        return load_vectors(file, self.aligned)

    def align(self, name: str, align: Callable[..., Model], **training: Any) -> Model:
        folder = self._run.folder / "aligned"

        def work(stage: Stage) -> None:
            if broadcast_from_first(folder.exists()):
                return
            on_step = note_few_steps(stage.on_step(), self._run.note)
            trained = self.train_aligned(align, on_step, **training)
            stage.say("saving")
            trained.save(folder)

        self._run.stages.run("align", work, makes={"the aligned model": folder})
        return load(folder)


def _sources(run: TrainingRun, stage: Stage, model: Model) -> dict[Need, Callable[[], Any]]:
    """{need: function that returns what the run's flags give for it, or what is packaged}."""
    settings = run.settings
    prompts = () if run.prompts is None else [prompt for prompt in run.prompts.benign if isinstance(prompt, str)]

    def show_replies(count: int) -> Callable[[int], None]:
        stage.print(f"{stage.name}: generating the model's own replies to {count} benign prompts, for the safe rows")
        return stage.replies(count, "its own replies")

    file = run.folder / "own-replies.json"
    packaged = PackagedRows(model, settings.training, file, show_replies, prompts, run.note)

    def rows_given(need: Need, files: Sequence[str]) -> list[Any]:
        rows = rows_of_files(files, settings.ignore_fields, settings.training.seed)
        run.note(f"{need}: {', '.join(files)} ({len(rows)} rows)")
        if need == "safe rows":
            run.note(only_refusals(model, rows))
        return rows

    sources: dict[Need, Callable[[], Any]] = {}
    for need, make in packaged.sources().items():
        value = getattr(settings, argument_of(need))
        if not value:
            sources[need] = partial(packaged_with_note, need, make, run.note)
        elif need == "eliciting prompt":
            sources[need] = partial(str, value)
        else:
            sources[need] = partial(rows_given, need, value)
    sources["base model"] = lambda: load(settings.base)
    return sources


def check_precision(run: TrainingRun, stage: Stage, model: Model, files: Sequence[str]) -> None:
    """Test vectors that were trained over weights in another precision than the model's on packaged rows.

    Raises UserError if one does not pass the gate."""
    precisions = {file: trained_over(file) for file in files}
    others = {file: precision for file, precision in precisions.items() if precision not in (None, model.precision)}
    if not others:
        return
    stage.say("testing the vectors")
    rows = PackagedRows(model, run.settings.training.over(PHASE2)).held_out()
    for file, precision in others.items():
        gate = measure_gate(model, load_vectors(file, model), rows["harmful"], rows["benign"])
        over = f"{file} was trained over {precision} weights, and these are {model.precision}"
        if gate.failure is not None:
            raise UserError(
                f"{over}: {gate.failure}; train vectors over these weights (train.py vectors --frozen-weights "
                f"{model.precision}), or give the same --frozen-weights here"
            )
        run.note(f"{over}: {gate}")


def rows_of_files(files: Sequence[str], ignore_fields: Sequence[str], seed: int) -> list[Any]:
    """The rows of all files, shuffled: some defenses take the first few, which should be of every file and kind."""
    check_distinct(files)
    rows = [row for file in files for row in load_rows(file, ignore_fields=ignore_fields)]
    return random.Random(seed).sample(rows, len(rows))


def packaged_with_note(need: Need, make: Callable[[], Any], note: Callable[[str], None]) -> Any:
    """What is packaged for a need; notes its content."""
    made = make()
    count = "" if isinstance(made, str) else f"{len(made)} rows, "
    note(f"{need}: packaged ({count}{CONTENTS[need]}); --{argument_of(need).replace('_', '-')} gives your own")
    return made


@contextlib.contextmanager
def trainings(stages: Stages, stage: Stage) -> Iterator[OnStep]:
    """The step callback of a defense: each training after the first is shown and logged as a separate stage."""
    with contextlib.ExitStack() as shown:
        current, last, number = stage.on_step(), (0, 0), 1

        def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
            nonlocal current, last, number
            if last != (0, 0) and (step <= last[0] or steps != last[1]):
                number += 1
                current = shown.enter_context(stages.show(f"{stage.name} {number}")).on_step()
            last = step, steps
            current(step, steps, metrics)

        yield on_step
