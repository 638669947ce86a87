"""`eval.py harness`: run lm-evaluation-harness tasks on a secvec_jax model, with or without vectors."""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec_jax.checks import NonNegativeInt, PositiveInt, Seed, Text, checked
from secvec_jax.errors import UserError
from secvec_jax.evaluation.intervals import Z95, bootstrap
from secvec_jax.inference import frozen_precision
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model, load
from secvec_jax.model.quantized import Precision
from secvec_jax.vectors.store import load_several
from secvec_jax.workspace.runs import Run
from secvec_jax.workspace.stage import Stage


@checked
@dataclasses.dataclass(frozen=True)
class Harness:
    """Run tasks of lm-evaluation-harness (pip install lm-eval)."""

    tasks: Text
    """comma-separated task names, such as mmlu,gsm8k,truthfulqa_mc2; * matches any characters"""
    model: str = "smollm2"
    """embedded name (smollm2, smollm2-aligned, gemma3-270m), Hugging Face folder, run directory, hub id or .gguf"""
    vectors: tuple[str, ...] = ()
    """run with these vectors active"""
    frozen_weights: Precision | None = None
    """precision of the model's weights: float32, bfloat16, int8 (one scale per output channel) or nf4 (4 bits, blocks
    of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU"""
    fewshot: NonNegativeInt | None = None
    """few-shot examples per question; by default the task's own number"""
    chat: bool = False
    """apply the model's chat template"""
    limit: PositiveInt | None = None
    """maximum number of questions per task; by default all"""
    include: str | None = None
    """folder with additional task files"""
    batch_size: PositiveInt = 64
    """prompts per decoding batch"""
    seed: Seed = 0
    """seed of the few-shot examples and of sampling"""
    out: str = "runs/harness"
    """run directory; writes results.json and report.md"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


def harness(settings: Harness, command: str) -> None:
    """Run `eval.py harness`. Raises UserError as `find_tasks` does."""
    manager, names = find_tasks(settings)
    run = Run(settings, command, harness_version)

    def work(stage: Stage) -> list[dict[str, Any]]:
        model = load(settings.model, frozen_precision(settings.frozen_weights))
        return task_rows(settings, manager, names, stage, model, load_several(settings.vectors, model) or ())

    run.report(run.stages.run("harness", work))


def harness_version() -> dict[str, str]:
    """Return the version of lm-evaluation-harness as an input of a run."""
    return {"lm-evaluation-harness": importlib.metadata.version("lm-eval")}


def find_tasks(settings: Harness) -> tuple[Any, list[str]]:
    """Return the harness's task manager and the names of the tasks.

    Raises UserError if lm-evaluation-harness is not installed, and for missing or unknown tasks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install lm-eval")
    from lm_eval.tasks import TaskManager

    if settings.include is not None and not Path(settings.include).is_dir():
        raise UserError(f"--include: No such directory: {settings.include}")
    manager = TaskManager(include_path=settings.include)
    requested = [name.strip() for name in settings.tasks.split(",") if name.strip()]
    for name in requested:
        if not manager.match_tasks([name]):
            raise UserError(f"lm-evaluation-harness has no task {name!r}: run `lm_eval ls tasks` for a list")
    return manager, manager.match_tasks(requested)


def task_rows(
    settings: Harness,
    manager: Any,
    names: list[str],
    stage: Stage,
    model: Model,
    vectors: tuple[Adapter, ...] | None = None,
) -> list[dict[str, Any]]:
    """Return a row of results.json for each task; the arguments are those that `find_tasks` returned."""
    from lm_eval import simple_evaluate

    from secvec_jax.evaluation.lm_eval import HarnessModel

    results = simple_evaluate(
        HarnessModel(model, vectors, stage.requests(), settings.batch_size, settings.seed),
        tasks=names,
        num_fewshot=settings.fewshot,
        limit=settings.limit,
        apply_chat_template=settings.chat,
        task_manager=manager,
        log_samples=False,
        random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    if results is None:  # happens only under the harness's own multi-process mode, which is not used here
        raise UserError("lm-evaluation-harness returned no results")
    return [{"name": name, "metrics": _metrics(name, scores, results)} for name, scores in results["results"].items()]


def _metrics(name: str, scores: dict[str, Any], results: Any) -> dict[str, dict[str, Any]]:
    """Return the task's metrics with normal 95% intervals from the harness's standard errors, Wilson's where all
    questions were right or all wrong, and whether higher values are better."""
    samples, tasks = results["n-samples"], _tasks_of(name, results.get("group_subtasks", {}))
    count = sum(samples[task]["effective"] for task in tasks if task in samples)
    higher = results.get("higher_is_better", {}).get(name, {})
    metrics = {}
    for key, value in scores.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = scores.get(f"{metric}_stderr,{filter_name}")
        interval: Sequence[float | None] = [None, None]
        if isinstance(error, int | float):
            is_constant = error == 0 and value in (0, 1) and count
            half_width = Z95 * error
            interval = bootstrap([value] * count).ci95 if is_constant else [value - half_width, value + half_width]
        label = metric if filter_name == "none" else f"{metric} ({filter_name})"
        better = {"higher_is_better": higher[metric]} if isinstance(higher.get(metric), bool) else {}
        metrics[label] = {"value": value, "n": count, "ci95": list(interval), **better}
    return metrics


def _tasks_of(name: str, subtasks: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group, which may have groups among its members; of a task, itself."""
    members = subtasks.get(name) or []
    return set().union(*(_tasks_of(member, subtasks) for member in members)) if members else {name}
