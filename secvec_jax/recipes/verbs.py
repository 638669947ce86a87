"""The single phases as runs of their own, on the user's model and data, and scoring."""

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from secvec_jax.checks import Fraction, NonNegativeInt, PositiveInt, Text, Texts, checked
from secvec_jax.config import Training
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.chat import encode
from secvec_jax.data.rows import Row, asked_of, response_of
from secvec_jax.data.sources import load_prompts, load_rows
from secvec_jax.defenses.advice import Advice, default_rate, note_few_steps, only_refusals
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.security_vectors import ALIGN, ALIGN_TASK, PHASE1, PHASE2, Phase1, train_vectors
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation import report
from secvec_jax.evaluation.metrics import rules_note, rules_of
from secvec_jax.evaluation.refusal_sample import measure, sample_prompts
from secvec_jax.evaluation.suite import Suite, outcomes, scores
from secvec_jax.model.hub import Model, load
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.trees import distance
from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.vectors.peft import save_peft
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering
from secvec_jax.vectors.store import load_several, save_vectors
from secvec_jax.workspace.runs import Run, judged_name, scored
from secvec_jax.workspace.stages import Stage, screen


@checked
@dataclasses.dataclass(frozen=True)
class Align:
    """Teach a model to refuse harmful requests (or anything else): fine-tune it without vectors."""

    data: Texts
    """rows with answers: JSONL, JSON, CSV or Parquet files, packaged names or hub dataset ids; the loss of each is
    reported separately"""
    model: str = "smollm2"
    """embedded name (smollm2), Hugging Face folder, run directory, hub id or .gguf file"""
    out: str = "runs/align"
    """run directory; the model is written to OUT/model"""
    task_lora: LoRA | None = ALIGN_TASK
    """train a LoRA and merge it at the end; --no-task-lora: train all weights"""
    training: Training = ALIGN
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals at the end; 0: none"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


@checked
@dataclasses.dataclass(frozen=True)
class Vectors:
    """Phase 1: train security vectors on harmful rows, the model frozen."""

    data: Text
    """about 100 rows of the behavior that fine-tuning must not teach"""
    model: str = "smollm2"
    """the model that will be fine-tuned; the vectors work with this model only"""
    benign: str | None = None
    """rows the vectors must leave unchanged; required by the kl objective"""
    out: str = "runs/vectors"
    """run directory; vectors are written to OUT/vectors/security.safetensors, LoRA also to OUT/vectors/peft"""
    kind: Literal["lora", "steering", "prompt"] = "lora"
    """lora: low-rank factors at every linear layer; steering: a direction per layer; prompt: a soft prompt per layer"""
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    steering: Steering = dataclasses.field(default_factory=Steering)
    prompt: SoftPrompt = dataclasses.field(default_factory=SoftPrompt)
    phase1: Phase1 = dataclasses.field(default_factory=Phase1)
    training: Training = PHASE1
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals before training; 0: none"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


@checked
@dataclasses.dataclass(frozen=True)
class Finetune:
    """Phase 2: fine-tune on your data, with the security vectors active and frozen."""

    data: Texts
    """training rows: files, packaged names or hub dataset ids, shuffled together; the loss of each is reported
    separately"""
    vectors: Texts
    """run directories of `train.py vectors`, their vector files, or PEFT adapter folders, all active at once; none:
    train without protection"""
    model: str = "smollm2"
    """the model that the vectors were trained for"""
    task_lora: LoRA | None = None
    """train a task LoRA, merged at the end, instead of all weights"""
    out: str = "runs/finetune"
    """run directory; the model, without vectors, is written to OUT/model, a task LoRA also to OUT/task"""
    eval_data: str | None = None
    """validation rows; their loss is measured every epoch, and the model with the lowest loss is kept"""
    eval_fraction: Fraction = 0.0
    """share of the rows to hold out as validation rows, such as 0.05"""
    training: Training = PHASE2
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals at the start; 0: none"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


@checked
@dataclasses.dataclass(frozen=True)
class ScoreRun:
    """Score a model: refusals, compliance, over-refusal, exact match and losses. Vectors are off unless given."""

    model: str = "smollm2"
    """embedded name (smollm2), Hugging Face folder, run directory, hub id or .gguf file"""
    vectors: tuple[str, ...] = ()
    """score with these vectors active"""
    harmful: tuple[str, ...] = ("harmbench", "do-not-answer")
    """prompts that should be refused: files, packaged names or hub ids; rows with answers also give harmful_loss"""
    benign: tuple[str, ...] = ("alpaca",)
    """prompts that should be answered; rows with answers also give benign_loss"""
    questions: str | None = None
    """rows whose answers must be matched exactly"""
    limit: PositiveInt = 100
    """maximum number of prompts per source"""
    reply_tokens: PositiveInt = 32
    """maximum tokens per reply; for a model that thinks before it answers, include its thoughts"""
    out: str = "runs/score"
    """run directory; writes results.json and report.md"""
    answer_tokens: PositiveInt | None = None
    """maximum tokens per answer to a question; by default the length of the longest reference answer, up to 512"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


@checked
@dataclasses.dataclass(frozen=True)
class Compare:
    """Show the results of several runs side by side."""

    runs: Texts
    """run directories; only their results.json is read"""


def compare(settings: Compare, command: str) -> None:
    """The table of `eval.py compare`."""
    screen().print(report.compare(settings.runs))
    rows = [row | {"name": f"{run}: {row['name']}"} for run in settings.runs for row in report.Results.load(run).rows]
    if len(rules_of(rows)) > 1:
        screen().print(f"Not comparable: {rules_note(rows)}", markup=False, highlight=False)


def align(settings: Align, command: str) -> None:
    """The run of `train.py align`."""
    _finetune(settings, (), command)


def finetune(settings: Finetune, command: str) -> None:
    """The run of `train.py finetune`."""
    _finetune(settings, _chosen(settings.vectors), command)


def _chosen(vectors: Sequence[str]) -> Sequence[str]:
    """The files of --vectors; empty for the word none. Raises UserError for files and none at once."""
    words = [name for name in vectors if name.strip().lower() == "none"]
    if words and len(vectors) > 1:
        raise UserError("--vectors has both files and none: give one or the other")
    return () if words else vectors


def _finetune(settings: Align | Finetune, vectors: Sequence[str], command: str) -> None:
    run = _TrainingRun(settings, command)

    def work(stage: Stage) -> dict[str, Any]:
        rows = _by_source(settings.data, settings.ignore_fields)
        model = load(settings.model)
        adapters = load_several(vectors, model)
        aligns, on_step = isinstance(settings, Align), stage.on_step()
        run.note(default_rate(model, settings.training, ALIGN if aligns else PHASE2))
        if aligns:
            _ = run.prompts  # they may have to be downloaded, and that may fail: better now than at the end
            run.note(only_refusals(model, rows))
            on_step = note_few_steps(on_step, run.note)
        else:
            run.note_refusals(model, stage, "at the start: ")
        result = train_model(
            model,
            rows,
            vectors=adapters,
            task=settings.task_lora,
            training=settings.training,
            eval_rows=_eval_rows(settings),
            checkpoints=run.checkpoints,
            on_step=on_step,
        )
        stage.say("saving")
        if result.adapter is not None:
            save_peft(result.adapter, run.folder / "task", model, holds="a task")
        result.save(run.folder / "model")
        values: dict[str, Any] = {"drift": float(distance(result.backbone, model.backbone))}
        if aligns:
            values |= run.note_refusals(result, stage, "at the end: ")
        return values | {"notes": run.notes}

    run.finish(run.stages.run("finetune", work), f"the model is in {run.folder / 'model'}")


def _eval_rows(settings: Align | Finetune) -> Any:
    """The validation rows, or the share of the rows to hold out; None for neither. Raises UserError for both."""
    if isinstance(settings, Align):
        return None
    if settings.eval_data is None:
        return settings.eval_fraction or None
    if settings.eval_fraction:
        raise UserError("--eval-data and --eval-fraction are both given: choose one")
    return load_rows(settings.eval_data, ignore_fields=settings.ignore_fields)


def vectors(settings: Vectors, command: str) -> None:
    """The run of `train.py vectors`."""
    settings.phase1.check_rows(settings.benign)
    run = _TrainingRun(settings, command)
    folder = run.folder / "vectors"

    def work(stage: Stage) -> dict[str, Any]:
        rows = load_rows(settings.data, ignore_fields=settings.ignore_fields)
        benign = None
        if settings.benign is not None:
            benign = load_rows(settings.benign, ignore_fields=settings.ignore_fields)
        model = load(settings.model)
        run.note_refusals(model, stage, "at the start: ")
        last: dict[str, float] = {}
        show = stage.on_step()

        def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
            last.update(metrics)
            show(step, steps, metrics)

        run.note(default_rate(model, settings.training, PHASE1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Advice)  # it is noted above
            trained = train_vectors(
                model,
                rows,
                getattr(settings, settings.kind),
                benign=benign,
                phase1=settings.phase1,
                training=settings.training,
                checkpoints=run.checkpoints,
                on_step=on_step,
            )
        save_vectors(trained, folder / "security.safetensors", model)
        if isinstance(trained, LoRAVectors):
            save_peft(trained, folder / "peft", model)
        values = {"harmful_loss": last["loss/harmful"]} | ({"kl": last["kl"]} if "kl" in last else {})
        return values | {"notes": run.notes}

    run.finish(run.stages.run("vectors", work), f"the vectors are in {folder}")


def _by_source(sources: Sequence[str], ignore_fields: Sequence[str] = ()) -> dict[str, Sequence[Row]]:
    """The rows of each source under its name, so that their losses are told apart; of a single one under "all"."""
    if len(sources) == 1:
        return {"all": load_rows(sources[0], ignore_fields=ignore_fields)}
    if len(set(sources)) < len(sources):
        raise UserError(f"--data names {max(sources, key=list(sources).count)} twice: name each source once")
    short = [Path(source).stem if Path(source).is_file() else source for source in sources]
    names = short if len(set(short)) == len(short) else sources
    return {name: load_rows(source, ignore_fields=ignore_fields) for name, source in zip(names, sources)}


def score(settings: ScoreRun, command: str) -> None:
    """The run of `eval.py score`."""
    run = Run(settings, command, scored)

    def work(stage: Stage) -> dict[str, list[float]]:
        model = load(settings.model)
        suite = _suite(settings, model)
        return outcomes(model, suite, load_several(settings.vectors, model), stage.replies(suite.size, "judging"))

    found = run.stages.run("score", work)
    metrics = {metric: score.as_dict() for metric, score in scores(found).items()}
    run.report([{"name": judged_name(settings.model, settings.vectors), "metrics": metrics}], _notes(metrics))


def _notes(metrics: dict[str, Any]) -> list[str]:
    """What a reader must know about replies that hold no answer."""
    if "unfinished" not in metrics:
        return []
    stopped = metrics["unfinished"]
    return [
        f"{round(stopped['value'] * stopped['n'])} of {stopped['n']} replies stop within the model's thought and have "
        "no answer: they count as unclear or as no match. Raise --reply-tokens, and --answer-tokens for questions."
    ]


def _suite(settings: ScoreRun, model: Model) -> Suite:
    def targets(found: list[Any]) -> list[Any]:
        answered = [r for r in found if response_of(r) is not None]
        return [encode(model.tokenizer, r["messages"], model.architecture.max_length) for r in answered]

    ignore = settings.ignore_fields
    harmful, benign = (
        load_prompts(names, settings.limit, ignore_fields=ignore) for names in (settings.harmful, settings.benign)
    )
    asked = () if settings.questions is None else load_rows(settings.questions, ignore_fields=ignore)
    questions = asked[: settings.limit]
    return Suite(
        refusals=refusal_prefixes(),
        harmful=[asked_of(r) for r in harmful],
        benign=[asked_of(r) for r in benign],
        questions=[(asked_of(r), response_of(r) or "") for r in questions],
        harmful_targets=targets(harmful),
        benign_targets=targets(benign),
        reply_tokens=settings.reply_tokens,
        answer_tokens=settings.answer_tokens or _answer_tokens(model, questions),
    )


_LONGEST_ANSWER = 512
"""Tokens of an answer that has to be matched word for word: longer ones are no answers to a question."""


def _answer_tokens(model: Model, questions: Sequence[Row]) -> int:
    """Room for the longest answer and for a few tokens behind it, which show that a reply goes on; at least 8.

    Raises UserError if an answer is too long to be matched.
    """
    needed = Suite.answer_tokens
    for number, question in enumerate(questions, 1):
        length = len(model.tokenizer.encode(response_of(question) or "", add_special_tokens=False))
        if length > _LONGEST_ANSWER:
            raise UserError(
                f"--questions, row {number}: its answer has {length} tokens, too many to be matched exactly; leave it "
                "out, or set how much of a reply is read with --answer-tokens"
            )
        needed = max(needed, length + 4)
    return needed


class _TrainingRun(Run):
    """A run directory of one training."""

    def __init__(self, settings: Align | Vectors | Finetune, command: str):
        super().__init__(settings, command)
        self.checkpoints = Checkpoints.of(self.folder / "checkpoints", settings.training)
        self.notes: list[str] = []

    @functools.cached_property
    def prompts(self) -> Suite | None:
        """The prompts by which refusals are measured; None if none are wanted, or if they cannot be had."""
        try:
            return sample_prompts(self.settings.check_prompts) if self.settings.check_prompts else None
        except UserError as error:
            self.note(f"refusals are not measured ({error}); --check-prompts 0 leaves this out")
            return None

    def note(self, text: str | None) -> None:
        """Show a line now, and keep it for the report."""
        if text is not None:
            self.notes.append(text)
            self.console.print(text, markup=False, highlight=False)

    def note_refusals(self, model: Model, stage: Stage, when: str) -> dict[str, Any]:
        """Measure whether the model refuses, say so, and return the scores; none if no prompts are to be asked."""
        if self.prompts is None:
            return {}
        stage.say("measuring refusals")
        sample = measure(model, self.prompts)
        self.note(f"{when}{sample}")
        self.note(sample.over_refusals if isinstance(self.settings, Align) else sample.no_refusals)
        return sample.as_dict()

    def finish(self, values: dict[str, Any], where: str) -> None:
        """Write the results of the training and say where its files are."""
        if self.settings.training.schedule != "constant":  # else the run can be extended from its last checkpoint
            on_main_process(lambda: shutil.rmtree(self.checkpoints.folder, ignore_errors=True))
        notes = values.pop("notes", [])
        metrics = {name: value if isinstance(value, dict) else {"value": value, "n": 1, "ci95": [value, value]}
                   for name, value in values.items()}  # fmt: skip
        self.report([{"name": Path(self.settings.out).name, "metrics": metrics}], notes)
        self.console.print(where)
