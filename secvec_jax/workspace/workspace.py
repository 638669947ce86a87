"""What quickstart, objectives and grid share: the aligned model, rows, vectors, and evaluated fine-tuned models.

Each is made once and stored in the run directory, so a run that is restarted reuses what it finished.
"""

import dataclasses
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.text import Text

from secvec_jax import config
from secvec_jax.checks import Seed, checked
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.defenses.security_vectors import (
    ALIGN,
    ALIGN_TASK,
    PHASE1,
    PHASE2,
    Phase1,
    align,
    finetune,
    train_vectors,
)
from secvec_jax.distributed import broadcast_from_first, is_main_process, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation import report
from secvec_jax.evaluation.results import Results, environment_facts
from secvec_jax.evaluation.suite import Outcomes, outcomes, scores
from secvec_jax.model.embedded import ALIGNED, UNALIGNED, is_base, unaligned
from secvec_jax.model.hub import Model, load
from secvec_jax.terminal import Console
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.trees import distance
from secvec_jax.vectors.kinds import Spec, Vectors
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.store import load_vectors, save_vectors
from secvec_jax.workspace.inputs import known, of_path
from secvec_jax.workspace.own_replies import greedy_openings, stored_examples
from secvec_jax.workspace.run_directory import settings_of_run
from secvec_jax.workspace.splits import PACKAGED_SEED, EvalSplit, Sizes, Splits, make_splits
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import Stages, devices, file_name, release, screen


@checked
@dataclasses.dataclass(frozen=True)
class Experiment:
    """How a model is aligned, gets its vectors, and is fine-tuned and evaluated."""

    model: str = "smollm2"
    """embedded name (smollm2, smollm2-aligned, gemma3-270m), Hugging Face folder, hub id or .gguf file"""
    seed: Seed = 0
    """seed of the data splits, the order of the rows and the initial vectors"""
    aligns: bool | None = None
    """align the model first, which a chat model that refuses already does not need; by default, every model but
    smollm2-aligned is"""
    eval_split: EvalSplit = "held-out"
    """prompts that models are scored on; tune settings on development only"""
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    phase1: Phase1 = dataclasses.field(default_factory=Phase1)
    align_task: LoRA = ALIGN_TASK
    """the LoRA that alignment trains and merges"""
    align_training: Training = dataclasses.replace(ALIGN, remat="dots", max_seq_len=256)
    vectors_training: Training = dataclasses.replace(PHASE1, remat="dots", max_seq_len=256)
    finetune_training: Training = dataclasses.replace(PHASE2, remat="dots", max_seq_len=256)

    def __post_init__(self) -> None:
        """Raises UserError for a base model, whose own replies are not worth keeping, and for an aligned one."""
        if self.aligns and self.model == ALIGNED:
            raise UserError(f"{self.model} is aligned already: leave out --aligns, or align {UNALIGNED}")
        if self.aligns_first and is_base(self.model):
            raise UserError(
                f"{self.model} is a base model, which follows no instructions yet: train it with train.py align on "
                "refusals and answers (docs/install.md), and give its --out as the model with --no-aligns"
            )

    @property
    def aligns_first(self) -> bool:
        """Whether the model is aligned."""
        return self.model != ALIGNED if self.aligns is None else self.aligns


class Workspace:
    """The artifacts of an experiment in its run directory, made on first use."""

    def __init__(self, experiment: Experiment, folder: Path, aligned: Path | None = None):
        """aligned: the path or name of an aligned model; None: the experiment aligns one."""
        self.experiment, self.folder = experiment, folder
        self.console = Console(quiet=not is_main_process(), soft_wrap=True)
        self.stages = Stages(folder, self.console)
        source = aligned if experiment.aligns_first else experiment.model
        self._aligned, self._is_given = source or self._model_folder("aligned"), source is not None

    @cached_property
    def base(self) -> Model:
        """The model before alignment."""
        return load(unaligned(self.experiment.model))

    @cached_property
    def aligned(self) -> Model:
        """The model that was taught to refuse."""
        self.__dict__.pop("base", None)  # both and a training do not fit in a small machine's memory
        return load(self._aligned)

    @cached_property
    def splits(self) -> Splits:
        """All rows and prompts."""
        model = self.aligned if self._is_given or broadcast_from_first(Path(self._aligned).exists()) else self.base
        experiment = self.experiment
        return make_splits(
            model,
            experiment.sizes,
            experiment.finetune_training,
            experiment.seed,
            experiment.eval_split,
            alignment=(Sizes(), PACKAGED_SEED) if str(self._aligned) == ALIGNED else None,
        )

    def stage(
        self,
        name: str,
        work: Callable[[Stage], Any],
        *,
        vectors: Sequence[str] = (),
        reads: Mapping[str, str] | None = None,
        makes_vectors: str | None = None,
        makes_model: bool = False,
    ) -> Any:
        """A stage that reads the aligned model and the vectors of these names (see `Stages.run`).

        reads: digests of other inputs. makes_vectors: the name of the vectors that it writes. makes_model: whether it
        writes a model under its name.
        """
        made = {} if makes_vectors is None else {f"the vectors {makes_vectors!r}": self._vectors_file(makes_vectors)}
        if makes_model:
            made[f"the model {name!r}"] = self._model_folder(name)

        def forget() -> None:
            shutil.rmtree(self._model_folder(name), ignore_errors=True)
            shutil.rmtree(self._checkpoint_folder(name), ignore_errors=True)
            if makes_vectors is not None:
                self._vectors_file(makes_vectors).unlink(missing_ok=True)
                shutil.rmtree(self._checkpoint_folder(f"vectors {makes_vectors}"), ignore_errors=True)

        sources: dict[str, Path | str] = {"the aligned model": Path(self._aligned)}
        sources |= {f"the vectors {label!r}": self._vectors_file(label) for label in vectors}
        return self.stages.run(name, work, reads=sources | dict(reads or {}), makes=made, forget=forget)

    def aligned_content(self) -> str | None:
        """The digest of the aligned model's files; None where there are none."""
        return known(of_path, Path(self._aligned))

    def align_stage(self, name: str = "align") -> Outcomes:
        """Make and evaluate the aligned model, or evaluate it again if its files were replaced."""
        return self.stages.run(name, self.align, makes={"the aligned model": Path(self._aligned)})

    def align(self, stage: Stage) -> Outcomes:
        """Teach the base model to refuse harmful prompts and to answer benign ones as before, then evaluate it."""
        experiment, splits = self.experiment, self.splits
        if self._is_given:
            return self.evaluate(self.aligned, stage)

        def train(checkpoints: Checkpoints, on_step: OnStep) -> Model:
            return align(
                self.base,
                {"harmful": splits.refusals, "benign": self.base_replies(stage)},
                task=experiment.align_task,
                training=self._seeded(experiment.align_training),
                checkpoints=checkpoints,
                on_step=on_step,
            )

        return self.evaluate(self.train_or_load("aligned", train, experiment.align_training, stage), stage)

    def base_replies(self, stage: Stage) -> list[Example]:
        """The base model's replies to the benign prompts of alignment; generated once and stored in a file."""
        splits = self.splits

        def generate() -> list[Example]:
            show = stage.replies(len(splits.align_benign), "the base model's replies")
            return greedy_openings(self.base, splits.align_benign, splits.suite.refusals, show)

        return stored_examples(self.folder / "own-replies.json", generate)

    def vectors(self, name: str) -> Vectors:
        """The vectors that were stored under this name."""
        return load_vectors(self._vectors_file(name), self.aligned)

    def phase1(self, name: str, phase1: Phase1, stage: Stage) -> Outcomes:
        """Train vectors for the aligned model and evaluate it with them active."""
        self.make_vectors(name, self.splits.vectors, self.splits.keep, self.experiment.lora, phase1, stage)
        return self.evaluate(self.aligned, stage, self.vectors(name))

    def make_vectors(self, name: str, harmful: Any, benign: Any, spec: Spec, phase1: Phase1, stage: Stage) -> None:
        """Train vectors for the aligned model and store them under this name."""
        if not broadcast_from_first(self._vectors_file(name).exists()):
            vectors = train_vectors(
                self.aligned,
                harmful,
                spec,
                benign=None if phase1.objective == "cross_entropy" else benign,
                phase1=phase1,
                training=self._seeded(self.experiment.vectors_training),
                checkpoints=self._checkpoints(f"vectors {name}", self.experiment.vectors_training),
                on_step=stage.on_step(),
            )
            save_vectors(vectors, self._vectors_file(name), self.aligned)
            self._forget_checkpoints(f"vectors {name}")

    def phase2(
        self,
        name: str,
        rows: dict[str, list[Example]],
        vectors: Vectors | None,
        stage: Stage,
        keep_model: bool = False,
    ) -> Outcomes:
        """Fine-tune the aligned model with the vectors active, drop them, and evaluate it."""

        def train(checkpoints: Checkpoints, on_step: OnStep) -> Model:
            return finetune(
                self.aligned,
                rows,
                vectors=vectors,
                training=self._seeded(self.experiment.finetune_training),
                checkpoints=checkpoints,
                on_step=on_step,
            )

        model = self.train_or_load(name, train, self.experiment.finetune_training, stage)
        results = self.evaluate(model, stage)
        results["drift"] = [float(distance(model.backbone, self.aligned.backbone))]
        if not keep_model:
            on_main_process(lambda: shutil.rmtree(self._model_folder(name)))
        return results

    def evaluate(self, model: Model, stage: Stage, vectors: Vectors | None = None) -> Outcomes:
        """The model's outcomes on the suite."""
        suite = self.splits.suite
        return outcomes(model, suite, vectors, stage.replies(suite.size, "evaluating"))

    def evaluate_base(self, stage: Stage) -> Outcomes:
        """Evaluate the model before alignment; it is not kept, since the next training needs its memory."""
        base_outcomes = self.evaluate(self.base, stage)
        self.__dict__.pop("base", None)
        return base_outcomes

    def show(self, outcomes_by_row: Mapping[str, Outcomes], note: str) -> None:
        """Show the table of what has been evaluated so far, with a note below it."""
        console = screen()
        console.print(report.table(Results("", rows=_rows(outcomes_by_row))))
        console.print(note)

    def report(
        self,
        command: str,
        settings: object,
        outcomes_by_row: dict[str, Outcomes],
        verdicts: Sequence[report.Verdict],
        curves: report.Curves,
        notes: Sequence[str],
    ) -> Results:
        """Write results.json, report.md and the plots, and show the table."""
        rows = _rows(outcomes_by_row)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
        environment = environment_facts() | devices() | {"peak memory of this process, GiB": round(peak, 2)}
        results = Results(command, config.to_dict(settings_of_run(settings)), environment, self.stages.seconds, rows)

        def write() -> None:
            results.save(self.folder)
            report.write(self.folder, results, verdicts, curves, notes)

        on_main_process(write)
        console = screen()
        console.print(report.table(results))
        for claim, holds, detail in verdicts:
            verdict = Text("yes", "green") if holds else Text("NO ", "red")
            console.print(verdict.append(f"  {claim}: {detail}", "default"))
        total = sum(self.stages.seconds.values())
        console.print(f"{total:.0f} s in total, peak memory {peak:.2f} GiB; report: {self.folder / 'report.md'}")
        release(self.folder)
        return results

    def model(self, name: str) -> Model:
        """The model that was stored under this name."""
        return load(self._model_folder(name))

    def train_or_load(
        self, name: str, train: Callable[[Checkpoints, OnStep], Model], training: Training, stage: Stage
    ) -> Model:
        """Load the model of this name if it was saved, else train and save it."""
        folder = self._model_folder(name)
        if broadcast_from_first(folder.exists()):
            return self.model(name)
        model = train(self._checkpoints(name, training), stage.on_step())
        stage.say("saving")
        model.save(folder)
        self._forget_checkpoints(name)
        return model

    def _vectors_file(self, name: str) -> Path:
        return self.folder / "vectors" / f"{file_name(name)}.safetensors"

    def _model_folder(self, name: str) -> Path:
        return self.folder / "model" / file_name(name)

    def _checkpoints(self, name: str, training: Training) -> Checkpoints:
        return Checkpoints.of(self._checkpoint_folder(name), training)

    def _forget_checkpoints(self, name: str) -> None:
        on_main_process(lambda: shutil.rmtree(self._checkpoint_folder(name), ignore_errors=True))

    def _checkpoint_folder(self, name: str) -> Path:
        return self.folder / "checkpoints" / file_name(name)

    def _seeded(self, training: Training) -> Training:
        return dataclasses.replace(training, seed=self.experiment.seed)


def _rows(outcomes_by_row: Mapping[str, Outcomes]) -> list[dict]:
    """The rows of a results.json."""
    return [
        {"name": name, "metrics": {metric: score.as_dict() for metric, score in scores(outcome).items()}}
        for name, outcome in outcomes_by_row.items()
    ]
