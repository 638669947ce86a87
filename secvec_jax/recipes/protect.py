"""`train.py protect` and `sv.protect`: fine-tuning on a user's rows, screened, defended, and audited against the
original model.

    preflight ──> vectors ──> screen ──> fine-tune ──> audit of the exported model ──> a verdict, and a model card

Each stage is done once; a command that was interrupted resumes where it stopped.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from secvec_jax.checks import Fraction, NonNegativeInt, PositiveInt, Texts, checked
from secvec_jax.config import Training
from secvec_jax.defenses.base import Defense, Need
from secvec_jax.defenses.inputs import groups_of
from secvec_jax.defenses.registry import as_mapping, read_defense
from secvec_jax.defenses.screening import Screening
from secvec_jax.defenses.training_settings import PHASE2, PHASE2_LORA, check_unused
from secvec_jax.defenses.user_inputs import argument_of, check_given
from secvec_jax.distributed import is_main_process, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation import inspect_log
from secvec_jax.evaluation.audit import Audit, Limits, check_limits
from secvec_jax.evaluation.judge_client import OPENAI, Judge, JudgeRequests, check_judge
from secvec_jax.inference import check_model, check_not_loaded, frozen_precision
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import Precision
from secvec_jax.presets import preset_field, section_of
from secvec_jax.recipes import preset_choice, protect_report
from secvec_jax.recipes.audit_stages import try_judge
from secvec_jax.recipes.defend import sources_of
from secvec_jax.recipes.precision import ARGUMENTS, check_loaded_precision, check_precision_settings, training_precision
from secvec_jax.recipes.protect_stages import audit_export, divide, exported_model, fine_tune, preflight, screen_rows
from secvec_jax.recipes.protect_vectors import make_vectors
from secvec_jax.recipes.protect_work import RECOMMENDED, ProtectRequest, Work, default_training
from secvec_jax.recipes.run_inputs import DEFENSE_VARIANTS, GIVEN, rows_of_files
from secvec_jax.recipes.training_run import rows_by_source
from secvec_jax.terminal import Console
from secvec_jax.vectors.kinds import Vectors
from secvec_jax.vectors.lora import LoRA
from secvec_jax.workspace.inputs import check_there, packaged
from secvec_jax.workspace.packaged_rows import CONTENTS
from secvec_jax.workspace.runs import Run, scoring_inputs
from secvec_jax.workspace.splits import sources
from secvec_jax.workspace.stages import Stages, release

_SAME = (
    "drop", "eval_fraction", "task_lora", "frozen_weights", "training", "system", "limits", "max_prompts",
    "reply_tokens", "check_prompts", "keep_replies",
)  # fmt: skip
"""Settings of the command that are passed on as they are."""


@checked
@dataclasses.dataclass(frozen=True)
class Protect:
    """Fine-tune on your data the recommended way: screened, defended, and audited against the original.

    The exit code is 0 if the audit passes, 3 if it fails and 4 if it is inconclusive.
    """

    data: Texts
    """training rows: files, packaged names or hub dataset ids, shuffled together"""
    model: str = "smollm2-aligned"
    """the model to fine-tune; it must refuse already (train.py align)"""
    vectors: str = ""
    """run directory of `train.py vectors`, its vector file, or a PEFT adapter folder; by default vectors are trained on
    the harmful and benign rows, once per model, and cached"""
    defense: str | dict[str, Any] | None = dataclasses.field(default=None, metadata=DEFENSE_VARIANTS)
    """defense to train under; without a name, all defenses are listed with what they need and cost (default: guarded
    vectors)"""
    safe: tuple[str, ...] = ()
    """rows that teach the model to be safe, refusals and as many benign rows; by default packaged ones and the model's
    own replies"""
    harmful: tuple[str, ...] = ()
    """about 100 rows of the behavior that fine-tuning must not teach, a tenth of which tests the vectors; by default
    packaged ones"""
    benign: tuple[str, ...] = ()
    """rows that have nothing to do with the behavior; by default packaged ones"""
    contrast: tuple[str, ...] = ()
    """for other defenses: rows whose prompts call for the behavior and whose replies do not show it; by default
    packaged refusals"""
    base: str | None = None
    """for other defenses: the model before it was aligned"""
    eliciting_prompt: str | None = None
    """for other defenses: a system prompt that asks for the behavior; by default one that asks to comply with
    everything"""
    drop: bool = False
    """do not train on the suspects, the rows that the vectors explain; by default they are only listed"""
    eval_fraction: Fraction = 0.05
    """share of the rows to hold out, to measure what was learned; at least 8 rows where there are 40 or more"""
    task_lora: LoRA | None = None
    """train a task LoRA, merged at the end, instead of all weights"""
    frozen_weights: Precision | None = None
    """with --task-lora: precision of the model's own weights (see finetune)"""
    preset: str | None = preset_field(section_of("protect"))
    """settings by model size and hardware, such as 135m-cpu, which other flags override; without a name, all presets
    are listed (default: the one for the model's size and the devices, if there is one; none: no preset)"""
    training: Training = PHASE2
    system: str | None = None
    """a system prompt under which the audit runs all prompts a second time, such as the one you serve the model with"""
    limits: Limits = Limits()
    max_prompts: PositiveInt = 80
    """maximum number of prompts of each kind in the audit; prefill and kl use up to half of it"""
    reply_tokens: PositiveInt = 16
    """maximum tokens per reply in the audit; for a model that thinks before it answers, include its reasoning; a judge
    needs a few hundred"""
    judge: str = ""
    """name of a language model at an endpoint that grades the replies to harmful prompts in the audit (measures
    harm_score and harm_rate)"""
    judge_url: str = OPENAI
    """endpoint with OpenAI's chat API, such as http://127.0.0.1:8000/v1"""
    asking: JudgeRequests = dataclasses.field(default_factory=JudgeRequests)
    inspect: str | None = None
    """also write the audit's prompts, replies and scores to this file, NAME.eval, an Inspect log (pip install
    inspect-ai)"""
    keep_replies: bool = False
    """keep whole replies to harmful prompts, for --inspect; by default they are cut to one line"""
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts of each kind that show at the start whether the model refuses; 0: none"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    json: bool = False
    """print the verdict as JSON, and nothing else, on standard output"""
    out: str = "runs/protect"
    """run directory: the model with its card in OUT/model, suspects.jsonl, results.json, report.md and report.html"""
    overwrite: bool = False
    """delete the run in OUT and start over"""

    def __post_init__(self) -> None:
        check_judge(self.judge, self.judge_url, self.asking)  # before the settings are written into a run directory
        check_limits(self.limits, self.eval_fraction > 0, False, bool(self.judge))
        if self.vectors.strip().lower() == "none":
            raise UserError(
                "protect screens rows with vectors: leave --vectors none out, and they are trained; to train without "
                "protection, use finetune --vectors none"
            )
        if self.inspect is not None:
            inspect_log.check_file(self.inspect)
        if isinstance(self.defense, dict) and "name" not in self.defense:
            object.__setattr__(self, "defense", {"name": RECOMMENDED} | self.defense)
        defense = read_defense(RECOMMENDED if self.defense is None else self.defense)
        given = [need for need in GIVEN if getattr(self, argument_of(need))]
        _check_defense(defense, given, lambda argument: f"--{argument.replace('_', '-')}")
        object.__setattr__(self, "defense", as_mapping(defense))  # however it was written
        check_precision_settings(self.frozen_weights, self.training, self.task_lora, defense)
        check_unused(self.training, validates=False)

    @property
    def precision(self) -> Precision:
        """The precision of the model's weights during training."""
        return training_precision(self.frozen_weights, self.training, self.task_lora, read_defense(self.defense))

    @staticmethod
    def implied(values: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults that other settings imply: how a task LoRA is trained (see `checks.implied_by`)."""
        return {} if values.get("task_lora") is None else {"training": PHASE2_LORA}

    def default_preset(self) -> str | None:
        """The default preset (see `preset_choice`)."""
        return preset_choice.default_preset(self, "protect")


@dataclasses.dataclass(frozen=True)
class Protected:
    """A protected fine-tuning. A notebook shows its audit.

    model: as exported, read back; if quantized (int8, nf4), with the task LoRA stored separately. suspects: indices of
    the rows that the vectors explain, the highest score first. system: the system prompt that the model must be served
    with, for the defenses that are one; else None.
    """

    model: Model
    audit: Audit
    suspects: list[int]
    vectors: Vectors
    system: str | None
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Protected({self.model.name!r}: audit {self.audit.verdict}, {len(self.suspects)} suspects)"

    def _repr_html_(self) -> str:
        return self.audit._repr_html_()


def protect_run(settings: Protect, command: str) -> int:
    """Run `train.py protect`; returns the exit code of its audit."""
    if settings.inspect is not None:
        inspect_log.require_inspect()
    check_there(vars(settings))
    audited_in = {"what the audit holds weights in": frozen_precision(settings.frozen_weights)}
    run = Run(settings, command, lambda: scoring_inputs() | packaged(sources("held-out")) | audited_in)
    if settings.json:
        run.stages.console = Console(stderr=True, quiet=not is_main_process(), soft_wrap=True)

    def given(need: Need) -> Callable[[], Any] | None:
        value = getattr(settings, argument_of(need))
        if not value or isinstance(value, str):
            return (lambda: value) if value else None
        return lambda: rows_of_files(value, settings.ignore_fields, seed=0)

    request = ProtectRequest(
        model=settings.model,
        rows=lambda: rows_by_source(settings.data, settings.ignore_fields),
        defense=read_defense(settings.defense),
        given={need: source for need in GIVEN if (source := given(need)) is not None},
        vectors=settings.vectors or None,
        judge=Judge(settings.judge, settings.judge_url, settings.asking) if settings.judge else None,
        **{name: getattr(settings, name) for name in _SAME},
    )
    work = Work(request, run.stages)
    if (preset := preset_choice.line(settings)) is not None:
        run.stages.console.print(preset)
    done = _run(work)
    files = protect_report.write(work, done.audit, settings, command)
    if settings.training.schedule != "constant":  # else the training can be extended from its last checkpoint
        on_main_process(lambda: shutil.rmtree(run.folder / "checkpoints", ignore_errors=True))
    protect_report.show(work, done.audit, done.system, files, settings.json)
    release(run.folder)
    return done.audit.exit_code


@checked
def protect(
    model: Any,
    rows: Any,
    *,
    vectors: Any = None,
    defense: Any = None,
    safe: Any = None,
    harmful: Any = None,
    benign: Any = None,
    contrast: Any = None,
    base: Any = None,
    eliciting_prompt: str | None = None,
    drop: bool = False,
    eval_fraction: Fraction = 0.05,
    task: LoRA | None = None,
    frozen_weights: Precision | None = None,
    training: Training | None = None,
    system: str | None = None,
    limits: Limits = Limits(),
    max_prompts: PositiveInt = 80,
    reply_tokens: PositiveInt = 16,
    check_prompts: NonNegativeInt = 24,
    judge: Judge | None = None,
    progress: bool = True,
) -> Protected:
    """The model fine-tuned on `rows` the recommended way, screened, defended and audited, as `train.py protect` does.

        result = sv.protect(model, rows)
        result.audit.verdict, result.suspects
        result.model.save("protected/")

    model: a model, or what `sv.load` takes. rows: dicts, a DataFrame, a `datasets.Dataset`, a path, or {kind: rows}.
    vectors: security vectors of the model, or their file; None: they are trained, once per model, and cached. defense:
    one of `sv.defenses`, or its name; None: guarded vectors. safe, harmful, benign, contrast: rows; None: packaged
    ones. task: a LoRA to train in place of all weights. frozen_weights: with a `task`, the precision of the weights of
    a model that is loaded here. training: unset settings are AdamW at 1e-3 for a task LoRA, SGD at 3.6e-4 for all
    weights, and two epochs. judge: a language model at an endpoint, to grade the replies to harmful prompts in the
    audit. progress: show the stages. The other arguments are those of the command. Files are written to a temporary
    folder only, and no suspect is dropped without `drop`. For a log of the audit, call
    `evaluation.inspect_log.write_log(result.audit, "audit.eval")`.

    Raises UserError for a model that does not refuse, for one whose precision is lower than its training needs, for
    vectors that do not pass their gate, for rows that cannot be read, and for a judge that cannot be reached.
    """
    if not isinstance(defense, Defense):
        defense = read_defense(RECOMMENDED if defense is None else defense)
    training = (training or Training()).over(default_training(task))
    check_model("model", model)
    check_there({"model": model, "base": base, "vectors": vectors})
    given = sources_of(safe, harmful, benign, contrast, base, eliciting_prompt)
    _check_defense(defense, list(given), lambda argument: f"{argument}=")
    check_precision_settings(frozen_weights, training, task, defense, ARGUMENTS)
    check_unused(training, validates=False)
    check_limits(limits, eval_fraction > 0, False, judge is not None)
    if isinstance(model, Model):
        check_not_loaded(frozen_weights, model)
        check_loaded_precision(model, training, task, defense)
    request = ProtectRequest(
        model=model,
        rows=lambda: groups_of(rows),
        defense=defense,
        given=given,
        vectors=vectors,
        drop=drop,
        eval_fraction=eval_fraction,
        task_lora=task,
        frozen_weights=frozen_weights,
        training=training,
        system=system,
        limits=limits,
        max_prompts=max_prompts,
        reply_tokens=reply_tokens,
        check_prompts=check_prompts,
        judge=judge,
        keep_replies=True,  # they stay in memory
    )
    with tempfile.TemporaryDirectory() as folder:
        console = Console(quiet=not (progress and is_main_process()), soft_wrap=True)
        work = Work(request, Stages(Path(folder), console))
        done = _run(work)
        tuned = exported_model(work)
    audit = dataclasses.replace(done.audit, after="protected")  # the audited folder is deleted
    return Protected(tuned, audit, done.screening.suspects, done.vectors, done.system, tuple(work.notes))


def _check_defense(defense: Defense, given: Sequence[Need], named: Callable[[str], str]) -> None:
    """Raise UserError if the defense does not read what is given, or lacks something.

    Harmful and benign rows are always read, for the vectors; vectors, too, which are those that rows are screened with.
    """
    for setting, default in (("rank", 8), ("kind", "lora"), ("objective", "kl")):
        if "security vectors" in defense.reads and getattr(defense, setting, default) != default:
            raise UserError(
                f"{defense.name!r}: {setting} is a setting for vectors that a defense trains, but protect trains them "
                f"beforehand: leave it out, or train other vectors with train.py vectors and pass {named('vectors')}"
            )
    others: list[Need] = [need for need in given if need not in ("harmful rows", "benign rows")]
    shared: list[Need] = ["security vectors"] if "security vectors" in defense.reads else []
    check_given(defense, [*others, *shared], [*CONTENTS, "harmful rows", "benign rows"], named)


class _StageResults(NamedTuple):
    """The results of the stages besides the model's files; the fields are as in `Protected`."""

    audit: Audit
    screening: Screening
    vectors: Vectors
    system: str | None


def _run(work: Work) -> _StageResults:
    """All stages, in order."""
    if work.request.judge is not None:
        try_judge(work.request.judge, work.stages)
    preflight(work)
    vectors = make_vectors(work)
    screening = screen_rows(work, vectors)
    rows = divide(work, screening)
    system = fine_tune(work, vectors, rows)
    audit = audit_export(work, rows.held_out, system)
    return _StageResults(dataclasses.replace(audit, notes=(*work.notes, *audit.notes)), screening, vectors, system)
