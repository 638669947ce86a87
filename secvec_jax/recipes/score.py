"""`eval.py score`: refusals, compliance, over-refusal, exact match and losses of a model."""

import dataclasses
from typing import Any

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.data.sources import load_prompts, load_rows
from secvec_jax.evaluation.scoring import BENIGN, HARMFUL, make_suite, num_replies, outcomes_with_system
from secvec_jax.evaluation.suite import Outcomes, scores
from secvec_jax.inference import frozen_precision
from secvec_jax.model.hub import load
from secvec_jax.model.quantized import Precision
from secvec_jax.vectors.store import load_several
from secvec_jax.workspace.runs import Run, result_name, scoring_inputs
from secvec_jax.workspace.stage import Stage


@checked
@dataclasses.dataclass(frozen=True)
class ScoreRun:
    """Score a model: refusals, compliance, over-refusal, exact match and losses. Vectors are off unless given."""

    model: str = "smollm2"
    """embedded name (smollm2, smollm2-aligned, gemma3-270m), Hugging Face folder, run directory, hub id or .gguf"""
    vectors: tuple[str, ...] = ()
    """score with these vectors active"""
    frozen_weights: Precision | None = None
    """precision of the model's weights: float32, bfloat16, int8 (one scale per output channel) or nf4 (4 bits, blocks
    of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU"""
    harmful: tuple[str, ...] = HARMFUL
    """prompts that should be refused: files, packaged names or hub ids; rows with answers also give harmful_loss"""
    benign: tuple[str, ...] = BENIGN
    """prompts that should be answered; rows with answers also give benign_loss"""
    questions: str | None = None
    """rows whose answers must be matched exactly"""
    limit: PositiveInt = 100
    """maximum number of prompts per source"""
    reply_tokens: PositiveInt = 32
    """maximum tokens per reply; for a model that thinks before it answers, include its reasoning"""
    out: str = "runs/score"
    """run directory; writes results.json and report.md"""
    answer_tokens: PositiveInt | None = None
    """maximum tokens per answer to a question; by default the length of the longest reference answer, up to 512"""
    system: str | None = None
    """a system prompt under which the harmful and benign prompts are run a second time, such as the one you serve the
    model with"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


def score(settings: ScoreRun, command: str) -> None:
    """Run `eval.py score`."""
    run = Run(settings, command, scoring_inputs)
    measured = run.stages.run("score", lambda stage: _outcomes(settings, stage))
    metrics = {metric: score.as_dict() for metric, score in scores(measured).items()}
    run.report([{"name": result_name(settings.model, settings.vectors), "metrics": metrics}], _notes(metrics))


def _outcomes(settings: ScoreRun, stage: Stage) -> Outcomes:
    model = load(settings.model, frozen_precision(settings.frozen_weights))
    ignore = settings.ignore_fields
    harmful, benign = (
        load_prompts(names, settings.limit, ignore_fields=ignore) for names in (settings.harmful, settings.benign)
    )
    questions = () if settings.questions is None else load_rows(settings.questions, ignore_fields=ignore)
    suite = make_suite(
        model, harmful, benign, questions[: settings.limit], settings.reply_tokens, settings.answer_tokens
    )
    progress = stage.replies(num_replies(suite, settings.system), "scoring")
    return outcomes_with_system(model, suite, settings.system, load_several(settings.vectors, model), progress)


def _notes(metrics: dict[str, Any]) -> list[str]:
    """A note on replies that end before their answer, if there are any."""
    if "unfinished" not in metrics:
        return []
    stopped = metrics["unfinished"]
    return [
        f"{round(stopped['value'] * stopped['n'])} of {stopped['n']} replies end within the model's reasoning, "
        "before an answer: they count as unclear or as no match. Raise --reply-tokens, or --answer-tokens for questions"
    ]
