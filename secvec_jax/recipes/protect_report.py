"""What `train.py protect` shows and writes at its end: the verdict, and the model's card."""

import contextlib
import dataclasses
import json
from typing import Any

from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation import audit_report, inspect_log
from secvec_jax.evaluation.audit import Audit
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.results import Results
from secvec_jax.recipes.audit import results_of, write_report
from secvec_jax.recipes.export import history, hub_id
from secvec_jax.recipes.protect_work import Work
from secvec_jax.recipes.training_run import SYSTEM_FILE
from secvec_jax.workspace.stages import screen
from secvec_jax.workspace.stages import write as write_text


def write(work: Work, audit: Audit, settings: Any, command: str) -> dict[str, str]:
    """Write results.json, the reports, the model card and, if it is asked for, an Inspect log of the audit.

    settings: those of `train.py protect`. command: as it was typed. Returns {kind: path} of the files to show.
    """
    results = results_of(audit, settings, command, work.stages.seconds)
    rows_with_facts = [row | (work.facts if row["name"] == "after" else {}) for row in results.rows]
    results = dataclasses.replace(results, rows=rows_with_facts)
    write_report(audit, results, work.folder)
    on_main_process(lambda: write_text(work.folder / "model" / "README.md", _card(work, audit, results)))
    files = {"model": str(work.folder / "model"), "report": str(work.folder / "report.html")}
    if (log := settings.inspect) is not None:
        files["inspect"] = log
        on_main_process(lambda: inspect_log.write_log(audit, log, settings.keep_replies, command))
    return files


def _card(work: Work, audit: Audit, results: Results) -> str:
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

    system: the system prompt that the model is served with. files: those that `write` returned.
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
