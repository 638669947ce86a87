"""`eval.py compare`: the results of several runs side by side."""

import dataclasses

from secvec_jax.checks import Texts, checked
from secvec_jax.evaluation import report
from secvec_jax.evaluation.metrics import rules_note, rules_of
from secvec_jax.evaluation.results import Results
from secvec_jax.workspace.stages import screen


@checked
@dataclasses.dataclass(frozen=True)
class Compare:
    """Show the results of several runs side by side."""

    runs: Texts
    """run directories; only their results.json is read"""


def compare(settings: Compare, command: str) -> None:
    """Run `eval.py compare`."""
    screen().print(report.compare(settings.runs))
    rows = [row | {"name": f"{run}: {row['name']}"} for run in settings.runs for row in Results.load(run).rows]
    if len(rules_of(rows)) > 1:
        screen().print(f"Not comparable: {rules_note(rows)}")
