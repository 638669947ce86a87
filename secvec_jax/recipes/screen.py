"""`eval.py screen`: rank rows by how much security vectors reduce their loss, before training on them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secvec_jax.checks import PositiveInt, Text, checked
from secvec_jax.data.columns import without_columns
from secvec_jax.data.rows import Row, prompt_of
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.screening import Screening
from secvec_jax.defenses.screening import screen as screen_rows
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.intervals import bootstrap
from secvec_jax.evaluation.metrics import is_rate
from secvec_jax.evaluation.replies import clip
from secvec_jax.files import atomic_file, check_regular, expanded
from secvec_jax.inference import frozen_precision
from secvec_jax.model.hub import load
from secvec_jax.model.quantized import Precision
from secvec_jax.output_checks import check_replaceable, check_separate
from secvec_jax.remote import is_url
from secvec_jax.terminal import Console
from secvec_jax.workspace.run_directory import check_not_of_run
from secvec_jax.workspace.runs import Run
from secvec_jax.workspace.stage import Stage
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
    frozen_weights: Precision | None = None
    """precision of the model's weights: float32, bfloat16, int8 (one scale per output channel) or nf4 (4 bits, blocks
    of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU"""
    harmful: str | None = None
    """rows with the behavior, such as those the vectors were trained on; together with benign they set a threshold"""
    benign: str | None = None
    """rows without the behavior; include some whose answers open like the harmful ones"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    max_seq_len: PositiveInt = 1024
    """maximum tokens per row"""
    write_clean: str | None = None
    """also write the rows that are not above the threshold to this JSONL file"""
    out: str = "runs/screen"
    """run directory; writes scores.jsonl (one line per row, in order), histogram.png and a report"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


def screen(settings: Screen, command: str) -> None:
    """Run `eval.py screen`."""
    labeled = settings.harmful is not None and settings.benign is not None
    if not labeled and (settings.harmful is not None or settings.benign is not None):
        raise UserError("a threshold requires both --harmful and --benign: give both, or neither for a ranking only")
    if settings.write_clean is not None and not labeled:
        raise UserError("--write-clean needs a threshold: give --harmful and --benign, too")
    if settings.write_clean is not None:
        _check_clean(settings, settings.write_clean)
    run = Run(settings, command)
    rows = load_rows(settings.data, ignore_fields=settings.ignore_fields)

    def work(stage: Stage) -> dict[str, Any]:
        labeled_rows = {
            name: load_rows(source, ignore_fields=settings.ignore_fields)
            for name, source in (("harmful", settings.harmful), ("benign", settings.benign))
            if source is not None
        }
        screening = screen_rows(
            load(settings.model, frozen_precision(settings.frozen_weights)),
            settings.vectors,
            rows,
            **labeled_rows,
            max_seq_len=settings.max_seq_len,
            progress=lambda name: stage.say(f"scoring {name}"),
        )
        return dataclasses.asdict(screening)

    screening = Screening(**run.stages.run("screen", work))
    on_main_process(lambda: _write(run.folder, rows, screening))
    metrics = {"score": screening.scores}
    notes = [f"All scores are in {run.folder / 'scores.jsonl'}; histogram.png shows their distribution."]
    if screening.threshold is not None:
        metrics["above_threshold"] = [float(score > screening.threshold) for score in screening.scores]
        count = len(screening.suspects)
        notes.insert(
            0, f"{count} of {len(rows)} rows are above the threshold of {screening.threshold:+.2f} nats per token."
        )
    if settings.write_clean is not None:
        clean = expanded(settings.write_clean)
        on_main_process(lambda: _write_clean(clean, rows, screening))
        notes.append(f"The other {len(rows) - len(screening.suspects)} rows are in {clean}.")
    _print_top(terminal(), rows, screening.scores)
    scores = {name: bootstrap(values, is_rate=is_rate(name)).as_dict() for name, values in metrics.items()}
    run.report([{"name": settings.data, "metrics": scores}], notes)


def _check_clean(settings: Screen, clean: str) -> None:
    """Raise UserError if the clean rows cannot be written to a file of this name, or would replace an input."""
    if not clean.strip():
        raise UserError("--write-clean is empty: name a file")
    path = expanded(clean)
    check_replaceable(path)
    check_regular(path)
    named = {f"--{name}": getattr(settings, name) for name in ("data", "harmful", "benign", "vectors", "model")}
    files = {flag: without_columns(name) for flag, name in named.items() if name is not None}
    inputs = {flag: expanded(name) for flag, name in files.items() if not is_url(name)}
    check_separate(path, "--write-clean", inputs)
    check_not_of_run(path, "--write-clean", settings.out)


def _write(folder: Path, rows: Sequence[Row], screening: Screening) -> None:
    threshold = screening.threshold
    with atomic_file(folder / "scores.jsonl") as staging, staging.open("w") as file:
        for number, (row, score) in enumerate(zip(rows, screening.scores, strict=True)):
            line = {"row": number, "score": round(score, 4), "prompt": clip(prompt_of(row))}
            file.write(json.dumps(line | ({} if threshold is None else {"above": score > threshold})) + "\n")
    write_histogram(folder / "histogram.png", screening)


def write_histogram(path: Path, screening: Screening) -> None:
    """Draw the scores of the rows, and of those of known kind, with the threshold."""
    from secvec_jax.evaluation.plots import plot_histogram, png

    by_kind = {"data": screening.scores, "harmful": screening.harmful, "benign": screening.benign}
    drawn = {name: scores for name, scores in by_kind.items() if scores is not None}
    figure = plot_histogram(drawn, "loss reduction by the vectors (nats per token)", screening.threshold)
    with atomic_file(path) as staging:
        staging.write_bytes(png(figure))


def _write_clean(path: Path, rows: Sequence[Row], screening: Screening) -> None:
    """The rows that are not above the threshold, in order, as JSON lines."""
    suspects = set(screening.suspects)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staging, staging.open("w") as file:
        for number, row in enumerate(rows):
            if number not in suspects:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _print_top(console: Console, rows: Sequence[Row], scores: Sequence[float]) -> None:
    order = sorted(range(len(rows)), key=lambda number: -scores[number])
    for number in order[:_SHOWN]:
        console.print(f"{scores[number]:+.2f}  row {number}: {clip(prompt_of(rows[number]))}")
