"""`eval.py export`: a model as a folder that goes to transformers or the hub, with a card that tells its history."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from secvec_jax.checks import Text, checked
from secvec_jax.digests import difference
from secvec_jax.distributed import is_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.report import FILE, Results
from secvec_jax.model.hub import Model, load
from secvec_jax.vectors.lora import LoRAVectors, merge
from secvec_jax.vectors.store import holds_security_vectors, load_vectors
from secvec_jax.workspace.inputs import adapter, known, model
from secvec_jax.workspace.run_directory import inputs_of_run

_HUB_IDS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@checked
@dataclasses.dataclass(frozen=True)
class Export:
    """Write a Hugging Face folder: weights, tokenizer, chat template, generation config and a model card."""

    model: Text
    """run directory of `train.py align` or `finetune`, embedded name, Hugging Face folder, hub id or .gguf file"""
    adapters: tuple[str, ...] = ()
    """LoRA adapters to merge into the weights: PEFT folders, run directories with a task LoRA, or our vector files"""
    carry_vectors: bool = False
    """allow adapters that are security vectors; the exported model then shows their behavior"""
    scores: tuple[str, ...] = ()
    """run directories of `eval.py score`, `judge` or `harness` whose tables the model card shows"""
    out: str = "exported"
    """folder to write; an exported model in it is replaced, anything else is refused"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the exported weights; by default that of the base model"""


def export(settings: Export, command: str) -> None:
    """The run of `eval.py export`.

    Raises UserError if the model would carry security vectors and was not told to, and before anything is loaded if
    `out` holds something else than a model.
    """
    out = Path(settings.out)
    if out.exists() and not (out / "config.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} holds something else than a model: give --out a new folder")
    adapters = [_adapter(path) for path in settings.adapters]
    carried = [path for path in adapters if holds_security_vectors(path)]
    if carried and not settings.carry_vectors:
        raise UserError(
            f"{carried[0]} holds security vectors: merged, the model would show the behavior that they stand for. "
            "Leave it out for a model to be used; to study the behavior, pass --carry-vectors"
        )
    scored = [Results.load(run) for run in settings.scores]
    for run in settings.scores:
        _check_inputs(run, f"score it again, or leave --scores {run} out")
    trained = list(_history(settings.model))[::-1]
    loaded = load(settings.model)
    merged = _merged(loaded, adapters)
    root = str(trained[0].config["model"]) if trained else settings.model
    base = _HUB_IDS.get(root) or (root if re.fullmatch(r"[\w.-]+/[\w.-]+", root) and not Path(root).exists() else None)
    dtype = settings.dtype or loaded.metadata.dtype
    merged.save(out, model_card(out.resolve().name, base, trained, scored, carried), dtype=dtype)
    Console(quiet=not is_main_process()).print(f"the model is in {out}, in {dtype}", markup=False, highlight=False)


def _adapter(path: str) -> str:
    """Of a run directory with a task LoRA, that LoRA."""
    task = Path(path).expanduser() / "task"
    return str(task if (task / "adapter_config.json").is_file() else path)


def _check_inputs(run: str | Path, otherwise: str) -> None:
    """Raises UserError if a model or adapter that a run was made with is no longer what it was."""
    before = inputs_of_run(run)
    now = {label: known(adapter if label.startswith("--vectors ") else model, label.partition(" ")[2])
           for label in before if label.startswith(("--model ", "--vectors "))}  # fmt: skip
    changed = difference({label: before[label] for label in now}, now)
    if changed is not None:
        raise UserError(f"{changed} since {run} was made, so the card would not tell the truth: {otherwise}")


def _history(model: str) -> Iterator[Results]:
    """The trainings behind a model, the last one first."""
    seen: set[Path] = set()
    while (folder := _run_of(model)) is not None and folder not in seen:
        seen.add(folder)
        run = Results.load(folder)
        _check_inputs(folder, "train again from it as it is now, or export the folder's model alone, copied elsewhere")
        yield run
        model = str(run.config.get("model", ""))


def _run_of(model: str) -> Path | None:
    """The run directory that a model is from, whether its path is that of the run or of the model in it."""
    path = Path(model).expanduser()
    runs = (folder for folder in (path, path.parent) if (folder / FILE).is_file() and (folder / "model").is_dir())
    return next(runs, None)


def _merged(base: Model, adapters: Sequence[str]) -> Model:
    backbone = base.backbone
    for path in adapters:
        vectors = load_vectors(path, base)
        if not isinstance(vectors, LoRAVectors):
            raise UserError(f"{path} is no LoRA, and weights have no place for it: pass it when you generate or score")
        backbone = merge(backbone, vectors)
    return base.with_backbone(backbone)
