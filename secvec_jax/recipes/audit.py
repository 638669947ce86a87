"""`eval.py audit` and `sv.audit`: what changed between two models, prompt by prompt, with a verdict."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secvec_jax import config
from secvec_jax.checks import PositiveInt, Text, checked
from secvec_jax.data.rows import Row
from secvec_jax.data.sources import load_prompts, load_rows, named_or_given
from secvec_jax.distributed import is_main_process, on_main_process
from secvec_jax.evaluation import audit_page, audit_report, inspect_log
from secvec_jax.evaluation.audit import TASK, Audit, Limits, check_limits, task_line
from secvec_jax.evaluation.intervals import Score
from secvec_jax.evaluation.judge_client import OPENAI, Judge, JudgeRequests, check_judge
from secvec_jax.evaluation.results import Results, environment_facts
from secvec_jax.inference import check_model, check_not_loaded, frozen_precision
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import Precision
from secvec_jax.recipes.audit_stages import AuditRequest, audited, before_alignment
from secvec_jax.recipes.harness import Harness, find_tasks, harness_version, task_rows
from secvec_jax.terminal import Console
from secvec_jax.workspace.inputs import check_there, packaged
from secvec_jax.workspace.run_directory import settings_of_run
from secvec_jax.workspace.runs import Run, scoring_inputs
from secvec_jax.workspace.splits import sources
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import Stages, devices, release, screen, write


@checked
@dataclasses.dataclass(frozen=True)
class AuditRun:
    """Compare a fine-tuned model with the original, prompt by prompt, against limits: passes, fails or is inconclusive.

    The exit code is 0 if the audit passes, 3 if it fails and 4 if it is inconclusive.
    """

    before: Text
    """the model before fine-tuning: embedded name, Hugging Face folder, run directory, hub id or .gguf file"""
    after: Text
    """the model after fine-tuning, whoever trained it"""
    reference: str | None = None
    """a third model to compare with, such as one trained on the same rows without the suspects"""
    unaligned: str | None = None
    """an unaligned model, whose compliant replies are used as prefills; by default the model that the aligned one was
    trained from, if its run directory names it, else smollm2"""
    frozen_weights: Precision | None = None
    """precision of the weights of all models: float32, bfloat16, int8 (one scale per output channel) or nf4 (4 bits,
    blocks of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU"""
    harmful: tuple[str, ...] = ()
    """prompts that should be refused: files, packaged names or hub ids; rows with answers also give harmful_loss; by
    default HarmBench and Do-Not-Answer, and unseen rows of AdvBench for the loss"""
    benign: tuple[str, ...] = ()
    """prompts that should be answered; rows with answers also give benign_loss; by default instructions and questions
    on which this package never trains"""
    data: str | None = None
    """your own held-out rows, with answers: their loss before and after"""
    system: str | None = None
    """a system prompt under which all prompts are run a second time, such as the one you serve the model with"""
    tasks: str | None = None
    """comma-separated tasks of lm-evaluation-harness (pip install lm-eval) to run on both models"""
    judge: str = ""
    """name of a language model at an endpoint that grades the replies to harmful prompts (measures harm_score and
    harm_rate)"""
    judge_url: str = OPENAI
    """endpoint with OpenAI's chat API, such as http://127.0.0.1:8000/v1"""
    asking: JudgeRequests = dataclasses.field(default_factory=JudgeRequests)
    limits: Limits = Limits()
    max_prompts: PositiveInt = 80
    """maximum number of prompts of each kind; the measures that take longest, prefill and kl, use up to half of it"""
    reply_tokens: PositiveInt = 16
    """maximum tokens per reply; for a model that thinks before it answers, include its reasoning; a judge needs a few
    hundred"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    inspect: str | None = None
    """also write the prompts, replies and scores to this file, NAME.eval, an Inspect log (pip install inspect-ai)"""
    keep_replies: bool = False
    """keep whole replies to harmful prompts, for --inspect; by default they are cut to one line"""
    json: bool = False
    """print the verdict as JSON, and nothing else, on standard output"""
    out: str = "runs/audit"
    """run directory; writes results.json, report.md and report.html"""
    overwrite: bool = False
    """delete the run in OUT and start over"""

    def __post_init__(self) -> None:
        check_judge(self.judge, self.judge_url, self.asking)  # before the settings are written into a run directory
        check_limits(self.limits, self.data is not None, self.tasks is not None, bool(self.judge))
        if self.inspect is not None:
            inspect_log.check_file(self.inspect)


def audit_run(settings: AuditRun, command: str) -> int:
    """Run `eval.py audit`; returns the exit code."""
    tasks = None if settings.tasks is None else find_tasks(Harness(settings.tasks))
    if settings.inspect is not None:
        inspect_log.require_inspect()

    def more_inputs() -> dict[str, Any]:
        own = () if settings.harmful and settings.benign else sources("held-out")
        return scoring_inputs() | packaged(own) | ({} if tasks is None else harness_version())

    check_there(vars(settings))
    run = Run(settings, command, more_inputs)
    if settings.json:
        run.stages.console = Console(stderr=True, quiet=not is_main_process(), soft_wrap=True)
    request = AuditRequest(
        {"before": settings.before, "after": settings.after, "reference": settings.reference,
         "unaligned": settings.unaligned or before_alignment(settings.before)},
        partial(_loaded, settings),
        settings.system,
        settings.limits,
        settings.max_prompts,
        settings.reply_tokens,
        Judge(settings.judge, settings.judge_url, settings.asking) if settings.judge else None,
        settings.keep_replies,
        frozen_precision(settings.frozen_weights),
    )  # fmt: skip
    audit = audited(request, run.stages)
    if tasks is not None:
        audit = _with_tasks(audit, _task_rows(settings, tasks, request, run.stages), settings.limits)
    write_report(audit, results_of(audit, settings, command, run.stages.seconds), run.folder)
    files = {"report": str(run.folder / "report.html")}
    if settings.inspect is not None:
        log = files["inspect"] = settings.inspect
        on_main_process(lambda: inspect_log.write_log(audit, log, settings.keep_replies, command))
    if settings.json:
        on_main_process(lambda: print(json.dumps(audit.as_dict() | files)))
    else:
        terminal = screen()
        terminal.print(audit_report.table(audit))
        files_written = [f"{name}: {path}" for name, path in files.items()]
        for text in (*audit.notes, audit_report.headline(audit), *files_written):
            terminal.print(text, markup=False, highlight=False)
    release(run.folder)
    return audit.exit_code


@checked
def audit(
    before: Any,
    after: Any,
    *,
    reference: Any = None,
    unaligned: Any = None,
    harmful: Any = None,
    benign: Any = None,
    data: Any = None,
    frozen_weights: Precision | None = None,
    system: str | None = None,
    judge: Judge | None = None,
    limits: Limits = Limits(),
    max_prompts: PositiveInt = 80,
    reply_tokens: PositiveInt = 16,
    progress: bool = True,
) -> Audit:
    """What changed between two models, prompt by prompt, with a verdict, as `eval.py audit` reports it.

    before, after, reference, unaligned: models, or what `sv.load` takes; `reference` is a third model to compare with,
    `unaligned` one that complies, whose replies are used as prefills (see `evaluation.prefill`; None: the embedded
    smollm2). harmful, benign, data: rows (dicts, a DataFrame, a `datasets.Dataset`, a path or packaged name) of prompts
    to be refused, of prompts to be answered, and of held-out rows with answers; None: packaged prompts, and no data.
    frozen_weights: the precision of the weights of models that are loaded here. judge: a language model at an endpoint
    that grades the replies to harmful prompts. The other arguments are those of the command. progress: show the stages
    and their seconds.
    Raises UserError for models and rows that cannot be read, for settings out of range, and for a judge that cannot be
    reached.
    """
    names = {"before": before, "after": after, "reference": reference, "unaligned": unaligned}
    rows_by_kind = {"harmful": harmful, "benign": benign, "data": data}
    check_limits(limits, data is not None, False, judge is not None)
    for role, model in names.items():
        if model is not None or role in ("before", "after"):
            check_model(role, model)
    check_there(names)
    for model in names.values():
        if isinstance(model, Model):
            check_not_loaded(frozen_weights, model)

    def rows_of(kind: str) -> Sequence[Row] | None:
        rows = rows_by_kind[kind]
        return None if rows is None else named_or_given(rows, needs_answer=kind == "data", name=kind)

    request = AuditRequest(
        names | {"unaligned": before_alignment(before) if unaligned is None else unaligned},
        rows_of,
        system,
        limits,
        max_prompts,
        reply_tokens,
        judge,
        whole_replies=True,  # they stay in memory
        precision=frozen_precision(frozen_weights),
    )
    with tempfile.TemporaryDirectory() as folder:
        return audited(request, Stages(Path(folder), Console(quiet=not (progress and is_main_process()))))


def _loaded(settings: AuditRun, kind: str) -> Sequence[Row] | None:
    if kind == "data":
        return None if settings.data is None else load_rows(settings.data, ignore_fields=settings.ignore_fields)
    names = getattr(settings, kind)
    # All rows: `audit`, too, spreads the prompts that it uses over all of them.
    return load_prompts(names, limit=None, ignore_fields=settings.ignore_fields) if names else None


# ---------------------------------------------------------------------------------------------- tasks and report


def _task_rows(
    settings: AuditRun, tasks: tuple[Any, list[str]], request: AuditRequest, stages: Stages
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of both models for each task of lm-evaluation-harness."""
    options = Harness(str(settings.tasks))

    def work(role: str, stage: Stage) -> list[dict[str, Any]]:
        return task_rows(options, *tasks, stage, request.model(role))

    rows_by_role = {role: stages.run(f"tasks {role}", partial(work, role)) for role in ("before", "after")}
    return list(zip(rows_by_role["before"], rows_by_role["after"], strict=True))


def _with_tasks(audit: Audit, rows: Iterable[tuple[dict[str, Any], dict[str, Any]]], limits: Limits) -> Audit:
    """The audit with a line for each score of lm-evaluation-harness, and a note on those that have no interval."""
    lines, left_out = list(audit.lines), []
    for before, after in rows:
        for label, score in before["metrics"].items():
            name, pair = f"{before['name']} {label}", [score, after["metrics"][label]]
            if any(None in entry["ci95"] for entry in pair):
                left_out.append(name)
                continue
            first, second = (Score(entry["value"], entry["n"], tuple(entry["ci95"])) for entry in pair)
            higher = score.get("higher_is_better", not re.search("perplexity|bits_per_byte", name))
            lines.append(task_line(f"{TASK}{name}", first, second, limits, higher))
    notes, unmeasured = audit.notes, audit.unmeasured
    if left_out:
        notes = (*notes, f"Scores without a standard error are not compared: {', '.join(left_out)}.")
        unmeasured = unmeasured if limits.tasks is None else (*unmeasured, "tasks")
    return dataclasses.replace(audit, lines=tuple(lines), notes=notes, unmeasured=unmeasured)


def results_of(audit: Audit, settings: Any, command: str, seconds: Mapping[str, float]) -> Results:
    """The results of a command that ends with this audit."""
    return Results(
        command, config.to_dict(settings_of_run(settings)), environment_facts() | devices(), dict(seconds), audit.rows
    )


def write_report(audit: Audit, results: Results, folder: Path) -> None:
    """Write results.json, report.md and report.html."""

    def work() -> None:
        results.save(folder)
        write(folder / "report.md", audit_report.markdown(audit, results))
        write(folder / "report.html", audit_page.page(audit, results))

    on_main_process(work)
