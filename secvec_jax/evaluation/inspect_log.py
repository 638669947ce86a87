"""An audit as an Inspect log (inspect_ai), written by Inspect itself: for its viewer, and for tools that read its logs.

A log has one sample for each prompt and model, with the scores of that reply, and as results the audit's lines: for
each metric the mean before and after, the difference and the bounds of its interval, with the limit and the verdict as
metadata. Inspect (the extra `inspect`) is imported only here and in `inspect_model`, and only when it is used.
"""

import importlib.metadata
import importlib.util
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import secvec_jax
from secvec_jax.data.rows import row
from secvec_jax.errors import UserError
from secvec_jax.evaluation.audit import Audit, Line
from secvec_jax.evaluation.audit_samples import Sample
from secvec_jax.evaluation.replies import clip
from secvec_jax.files import atomic_file, check_regular, expanded
from secvec_jax.turns import answer_of

_SUFFIX = ".eval"


def require_inspect() -> None:
    """Raise UserError if Inspect is not installed."""
    if importlib.util.find_spec("inspect_ai") is None:
        raise UserError("Inspect is not installed: pip install inspect-ai (the extra secvec_jax[inspect])")


def check_file(path: str | Path) -> None:
    """Raise UserError for a name that is not that of an Inspect log."""
    if Path(path).suffix != _SUFFIX:
        raise UserError(f"{path} is not a name for an Inspect log: it must end in {_SUFFIX}")
    check_regular(expanded(path))


def write_log(audit: Audit, path: str | Path, keep_replies: bool = False, command: str = "") -> None:
    """Write the audit to NAME.eval, replacing any existing file.

    keep_replies: write the models' whole replies, if the audit has them; by default each is cut to one line. command:
    the command of the audit, for the log. Raises UserError without Inspect, for another name, and for a file that
    cannot be written.
    """
    require_inspect()
    check_file(path)
    from inspect_ai.log import write_eval_log

    log = _log(audit, keep_replies, command)
    with atomic_file(expanded(path)) as staging:
        # The writer goes by the suffix, which an unfinished file does not have.
        write_eval_log(log, str(staging), format="eval")


def _log(audit: Audit, keep_replies: bool, command: str) -> Any:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalPlan, EvalResults, EvalSpec, EvalStats

    now = datetime.now(UTC).isoformat(timespec="seconds")
    samples = [_sample(sample, keep_replies) for sample in audit.samples]
    facts = audit.as_dict()
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=now,
            task="secvec_jax/audit",
            task_display_name=f"audit: {audit.verdict}",
            task_args={"before": audit.before, "after": audit.after, "reference": audit.reference},
            dataset=EvalDataset(name="audit", samples=len(samples), sample_ids=[sample.id for sample in samples]),
            model=audit.after,
            config=EvalConfig(),
            packages={
                "inspect_ai": importlib.metadata.version("inspect-ai"),
                "secvec_jax": secvec_jax.__version__,
            },
            metadata={"command": command, **facts},
        ),
        plan=EvalPlan(),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=[_score(line) for line in audit.lines],
        ),
        stats=EvalStats(started_at=now, completed_at=now),
        samples=samples,
    )


def _score(line: Line) -> Any:
    """A line of the audit, as Inspect shows the score of a task."""
    from inspect_ai.log import EvalMetric, EvalScore

    low, high = line.difference.ci95
    values = {
        "before": line.before.value,
        "after": line.after.value,
        "difference": line.difference.value,
        "low": low,
        "high": high,
    }
    if line.reference is not None and line.to_reference is not None:
        values |= {"reference": line.reference.value, "difference to reference": line.to_reference.value}
    return EvalScore(
        name=line.metric,
        scorer="secvec_jax/audit",
        scored_samples=line.difference.n,
        metrics={name: EvalMetric(name=name, value=value) for name, value in values.items()},
        metadata={"limit": line.limit, "verdict": line.verdict, "prompts_needed": line.prompts_needed},
    )


def _sample(sample: Sample, keep_replies: bool) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score

    reply = sample.reply if keep_replies else clip(answer_of(sample.reply))
    asked = row(sample.prompt)["messages"] if isinstance(sample.prompt, str) else sample.prompt
    input_messages = [_message(turn["role"], turn["content"]) for turn in asked]
    output = ModelOutput.from_content(model=sample.model, content=reply)
    return EvalSample(
        id=f"{sample.role}-{sample.kind}-{sample.number}",
        epoch=1,
        input=input_messages,
        target="",
        messages=[*input_messages, output.message],
        output=output,
        scores={metric: Score(value=value) for metric, value in sample.scores.items()},
        metadata={
            "role": sample.role,
            "model": sample.model,
            "kind": sample.kind,
            "prompt": sample.number,
            "clipped": reply != sample.reply,
        },
    )


def _message(role: str, text: str) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageTool, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "assistant": ChatMessageAssistant, "tool": ChatMessageTool}
    return kinds.get(role, ChatMessageUser)(content=text)
