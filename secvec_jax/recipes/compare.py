"""`eval.py compare`: the results of several runs side by side."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from secvec_jax.checks import Texts, checked
from secvec_jax.evaluation import report
from secvec_jax.evaluation.metrics import rules_note, rules_of
from secvec_jax.evaluation.results import Results
from secvec_jax.printable import one_line
from secvec_jax.workspace.run_directory import inputs_of_run
from secvec_jax.workspace.stages import screen

_PROMPTS = (
    "harmful", "benign", "questions", "data", "tasks", "limit", "fewshot", "chat", "answer_tokens", "judge",
    "judge_url", "asking", "classifier", "labels", "unaligned", "include", "seed",
)  # fmt: skip
"""Settings of the verbs of eval.py that decide what a score is measured on; in trainings, some are rows to train on."""
_ALL = ("max_prompts", "check_prompts", "reply_tokens", "system")
"""Such settings of all verbs."""


@checked
@dataclasses.dataclass(frozen=True)
class Compare:
    """Show the results of several runs side by side."""

    runs: Texts
    """run directories; their results.json is read, and what their inputs.json says of the prompts"""


def compare(settings: Compare, command: str) -> None:
    """Run `eval.py compare`."""
    screen().print(report.compare(settings.runs))
    runs = {run: Results.load(run) for run in settings.runs}
    rows = [row | {"name": f"{name}: {row['name']}"} for name, run in runs.items() for row in run.rows]
    if len(rules_of(rows)) > 1:
        screen().print(f"Not comparable: {rules_note(rows)}")
    for line in [*measured_otherwise(runs), *_other_content(runs)]:
        screen().print(f"Not comparable: {line}", markup=False, highlight=False)


def measured_otherwise(runs: Mapping[str, Results]) -> list[str]:
    """A line for each setting that decides what is measured and differs between runs with a metric in common."""
    metrics = {name: {metric for row in run.rows for metric in row["metrics"]} for name, run in runs.items()}
    lines = []
    for key in (*_PROMPTS, *_ALL):
        values = {
            name: run.config[key]
            for name, run in runs.items()
            if key in run.config and (key in _ALL or "training" not in run.config)
        }
        runs_by_value: dict[str, list[str]] = {}
        for name, value in values.items():
            if any(value != values[other] and metrics[name] & metrics[other] for other in values):
                runs_by_value.setdefault(_shown(value), []).append(name)
        if runs_by_value:
            by_value = (f"{value} in {', '.join(names)}" for value, names in runs_by_value.items())
            lines.append(f"--{key.replace('_', '-')} is {'; '.join(by_value)}.")
    return lines


def _other_content(runs: Mapping[str, Results]) -> list[str]:
    """A line for each source of prompts that runs name alike and whose content was another, such as an edited file."""
    flags = {f"--{key.replace('_', '-')}" for key in _PROMPTS}
    contents: dict[str, dict[str, list[str]]] = {}
    for name, run in runs.items():
        for label, content in inputs_of_run(name).items():
            if "training" not in run.config and label.partition(" ")[0] in flags and isinstance(content, str):
                contents.setdefault(label, {}).setdefault(content, []).append(name)
    return [
        f"{label} was changed between {' and '.join(', '.join(names) for names in found.values())}."
        for label, found in contents.items()
        if len(found) > 1
    ]


def _shown(value: Any) -> str:
    return "not set" if value in (None, "", []) else one_line(json.dumps(value, ensure_ascii=False), 80)
