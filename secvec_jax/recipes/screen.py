"""`eval.py screen`: a user's rows by how well security vectors explain them, before anything is trained on them."""

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
"""Rows that are shown in the terminal, those that the vectors explain best."""


@checked
@dataclasses.dataclass(frozen=True)
class Screen:
    """Rank rows by the loss reduction from the vectors: the larger, the more a row resembles the behavior."""

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
    found = run.stages.run("screen", lambda stage: _scores(settings, rows, stage))
    on_main_process(lambda: _write(run.folder, rows, found))
    threshold = found["threshold"]
    metrics = {"score": found["data"]}
    notes = [f"All scores are in {run.folder / 'scores.jsonl'}, and drawn in histogram.png."]
    if threshold is not None:
        metrics["above_threshold"] = [float(score > threshold) for score in found["data"]]
        count = round(sum(metrics["above_threshold"]))
        notes.insert(0, f"{count} of {len(rows)} rows are above the threshold of {threshold:+.2f} nats a token.")
    _tell(terminal(), rows, found["data"])
    scores = {name: bootstrap(values).as_dict() for name, values in metrics.items()}
    run.report([{"name": settings.data, "metrics": scores}], notes)


def _scores(settings: Screen, rows: Sequence[Row], stage: Stage) -> dict[str, Any]:
    model = load(settings.model)
    vectors = load_vectors(settings.vectors, model)
    limit = min(settings.max_seq_len, model.architecture.max_length)
    kinds = {"data": rows}
    if settings.harmful is not None:
        known = {name: getattr(settings, name) for name in ("harmful", "benign")}
        kinds |= {name: load_rows(source, ignore_fields=settings.ignore_fields) for name, source in known.items()}
    found: dict[str, Any] = {"threshold": None}
    for name, some in kinds.items():
        stage.say(f"scoring {name}")
        found[name] = explained_away.scores(model, vectors, some, limit)
    if settings.harmful is not None:
        found["threshold"] = explained_away.scale(found["harmful"], found["benign"]).threshold
    return found


def _write(folder: Path, rows: Sequence[Row], found: dict[str, Any]) -> None:
    threshold = found["threshold"]
    with whole_file(folder / "scores.jsonl") as staging, staging.open("w") as file:
        for number, (row, score) in enumerate(zip(rows, found["data"], strict=True)):
            line = {"row": number, "score": round(score, 4), "prompt": clip(prompt_of(row))}
            file.write(json.dumps(line | ({} if threshold is None else {"above": score > threshold})) + "\n")
    kinds: dict[str, Any] = {name: found[name] for name in ("data", "harmful", "benign") if name in found}
    with whole_file(folder / "histogram.png") as staging:
        staging.write_bytes(png(plot_histogram(kinds, "nats per token that the vectors explain away", threshold)))


def _tell(console: Console, rows: Sequence[Row], scores: Sequence[float]) -> None:
    order = sorted(range(len(rows)), key=lambda number: -scores[number])
    for number in order[:_SHOWN]:
        console.print(f"{scores[number]:+.2f}  row {number}: {clip(prompt_of(rows[number]))}", markup=False)
