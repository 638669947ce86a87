"""`eval.py screen`: rank rows by how much security vectors reduce their loss, before training on them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from secvec_jax.checks import PositiveInt, Text, checked
from secvec_jax.data.rows import Row, prompt_of
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses import explained_away
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.intervals import bootstrap
from secvec_jax.evaluation.plots import plot_histogram, png
from secvec_jax.evaluation.replies import clip
from secvec_jax.files import whole_file
from secvec_jax.model.hub import load
from secvec_jax.vectors.store import load_vectors
from secvec_jax.workspace.runs import Run
from secvec_jax.workspace.stages import Stage
from secvec_jax.workspace.stages import screen as terminal

_SHOWN = 10
"""How many of the highest-scoring rows are printed."""


@checked
@dataclasses.dataclass(frozen=True)
class Screen:
    """Rank rows by how much the vectors reduce their loss: the higher the score, the closer to the behavior."""

    data: Text
    """rows to screen, with answers: a file, a packaged name or a hub dataset id"""
    vectors: Text
    """run directory of `train.py vectors`, its vector file, or a PEFT adapter folder"""
    model: str = "smollm2"
    """the model that the vectors were trained for"""
    harmful: str | None = None
    """rows with the behavior, such as those the vectors were trained on; together with benign they set a threshold"""
    benign: str | None = None
    """rows without the behavior; include some whose answers open like the harmful ones"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    max_seq_len: PositiveInt = 1024
    """maximum tokens per row"""
    out: str = "runs/screen"
    """run directory; writes scores.jsonl (one line per row, in order), histogram.png and a report"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


def screen(settings: Screen, command: str) -> None:
    """The run of `eval.py screen`."""
    if (settings.harmful is None) != (settings.benign is None):
        raise UserError("a threshold requires both --harmful and --benign: give both, or neither for a ranking only")
    run = Run(settings, command)
    rows = load_rows(settings.data, ignore_fields=settings.ignore_fields)
    results = run.stages.run("screen", lambda stage: _scores(settings, rows, stage))
    on_main_process(lambda: _write(run.folder, rows, results))
    threshold = results["threshold"]
    metrics = {"score": results["data"]}
    notes = [f"All scores are in {run.folder / 'scores.jsonl'}; histogram.png shows their distribution."]
    if threshold is not None:
        metrics["above_threshold"] = [float(score > threshold) for score in results["data"]]
        count = round(sum(metrics["above_threshold"]))
        notes.insert(0, f"{count} of {len(rows)} rows are above the threshold of {threshold:+.2f} nats per token.")
    _print_top(terminal(), rows, results["data"])
    scores = {name: bootstrap(values).as_dict() for name, values in metrics.items()}
    run.report([{"name": settings.data, "metrics": scores}], notes)


def _scores(settings: Screen, rows: Sequence[Row], stage: Stage) -> dict[str, Any]:
    model = load(settings.model)
    vectors = load_vectors(settings.vectors, model)
    limit = min(settings.max_seq_len, model.architecture.max_length)
    kinds = {"data": rows}
    if settings.harmful is not None:
        labeled = {name: getattr(settings, name) for name in ("harmful", "benign")}
        kinds |= {name: load_rows(source, ignore_fields=settings.ignore_fields) for name, source in labeled.items()}
    results: dict[str, Any] = {"threshold": None}
    for name, kind_rows in kinds.items():
        stage.say(f"scoring {name}")
        results[name] = explained_away.scores(model, vectors, kind_rows, limit)
    if settings.harmful is not None:
        results["threshold"] = explained_away.scale(results["harmful"], results["benign"]).threshold
    return results


def _write(folder: Path, rows: Sequence[Row], results: dict[str, Any]) -> None:
    threshold = results["threshold"]
    with whole_file(folder / "scores.jsonl") as staging, staging.open("w") as file:
        for number, (row, score) in enumerate(zip(rows, results["data"], strict=True)):
            line = {"row": number, "score": round(score, 4), "prompt": clip(prompt_of(row))}
            file.write(json.dumps(line | ({} if threshold is None else {"above": score > threshold})) + "\n")
    kinds: dict[str, Any] = {name: results[name] for name in ("data", "harmful", "benign") if name in results}
    with whole_file(folder / "histogram.png") as staging:
        staging.write_bytes(png(plot_histogram(kinds, "loss reduction by the vectors (nats per token)", threshold)))


def _print_top(console: Console, rows: Sequence[Row], scores: Sequence[float]) -> None:
    order = sorted(range(len(rows)), key=lambda number: -scores[number])
    for number in order[:_SHOWN]:
        console.print(f"{scores[number]:+.2f}  row {number}: {clip(prompt_of(rows[number]))}", markup=False)
