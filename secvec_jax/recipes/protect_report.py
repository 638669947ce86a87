"""What `train.py protect` shows and writes at its end: the verdict, and the model's card."""

import contextlib
import dataclasses
import json

from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation import audit_report
from secvec_jax.evaluation.audit import Audit
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.results import Results
from secvec_jax.recipes.export import history, hub_id
from secvec_jax.recipes.protect_work import Work
from secvec_jax.recipes.training_run import SYSTEM_FILE
from secvec_jax.workspace.stages import screen


def card(work: Work, audit: Audit, results: Results) -> str:
    """The model card, with the audit."""
    name = work.folder.resolve().name
    earlier: list[Results] = []
    with contextlib.suppress(UserError):  # a run that was moved or changed is left out
        earlier = list(history(str(work.request.model)))[::-1]
    root = str(earlier[0].config.get("model", "")) if earlier else work.model_name
    drift = work.facts["drift"]
    row = work.facts | {"name": name, "metrics": {"drift": {"value": drift, "n": 1, "ci95": [drift, drift]}}}
    trained = dataclasses.replace(results, rows=[row])
    return model_card(name, hub_id(root), [*earlier, trained], [results]) + "\n" + audit_report.section(audit)


def _learned(audit: Audit) -> list[str]:
    """What was learned, in one sentence; none without held-out rows."""
    return [
        f"the loss of your {line.before.n} held-out rows is {line.after.value:.2f} nats per token (before: "
        f"{line.before.value:.2f})"
        for line in audit.lines
        if line.metric == "data_loss"
    ]


def show(work: Work, audit: Audit, system: str | None, files: dict[str, str], as_json: bool) -> None:
    """Print the verdict: as JSON alone on standard output, or as a table and lines that begin with it.

    system: the system prompt that the model is served with. files: {kind: path} of what was written.
    """
    if as_json:
        counts = {name: work.facts[name] for name in ("suspects", "dropped")}
        verdict = audit.as_dict() | {"reason": audit_report.headline(audit)} | files | counts
        on_main_process(lambda: print(json.dumps(verdict)))
        return
    terminal = screen()
    terminal.print(audit_report.table(audit))
    lines = [audit_report.headline(audit), *_learned(audit), *audit.notes[len(work.notes) :]]
    if system is not None:
        lines.append(f"serve the model with its system prompt, which is its defense: {work.folder / SYSTEM_FILE}")
    lines.append(f"suspects: {work.folder / 'suspects.jsonl'}; report: {files['report']}")
    if "inspect" in files:
        lines.append(f"inspect: {files['inspect']}")
    for line in (*lines, f"the model, with its card, is in {files['model']}"):
        terminal.print(line)
