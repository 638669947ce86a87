"""`eval.py export`: write a model as a Hugging Face folder, with a model card of how it was trained and scored."""

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from secvec_jax.arguments import check_distinct
from secvec_jax.checks import Text, checked
from secvec_jax.checksums import FILE as CHECKSUMS
from secvec_jax.digests import difference
from secvec_jax.distributed import is_main_process, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.card import model_card
from secvec_jax.evaluation.results import FILE, Results
from secvec_jax.files import resolved
from secvec_jax.model.embedded import ALIGNED, UNALIGNED
from secvec_jax.model.hub import Model, load
from secvec_jax.model.hub_files import REPLACEABLE
from secvec_jax.output_checks import check_kept, check_replaceable
from secvec_jax.recipes.training_run import TASK_FOLDER
from secvec_jax.remote import exists, is_url, local, upload
from secvec_jax.terminal import Console
from secvec_jax.vectors.lora import LoRAVectors, merge
from secvec_jax.vectors.store import holds_security_vectors, load_vectors
from secvec_jax.workspace.inputs import adapter, known, model
from secvec_jax.workspace.run_directory import inputs_of_run
from secvec_jax.workspace.stages import read_by_all

_SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_IDS = {UNALIGNED: _SMOLLM2, ALIGNED: _SMOLLM2, "gemma3-270m": "google/gemma-3-270m"}


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
    """run directories of `eval.py score`, `audit`, `judge` or `harness` whose tables the model card shows"""
    out: str = "exported"
    """folder to write; a model that was exported to it is replaced, and a folder with anything else is an error; or a
    URL such as gs://bucket/model, where nothing exists yet"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the exported weights; by default that of the base model"""


def export(settings: Export, command: str) -> None:
    """Run `eval.py export`.

    Raises UserError if the model would contain security vectors without `carry_vectors`, if `out` contains anything
    other than a model (checked before anything is loaded), if an input of the model's runs has changed, and for scores
    of another model.
    """
    if is_url(settings.out):
        if exists(settings.out):
            raise UserError(f"there are files at {settings.out}: choose a new place for --out")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / (settings.out.rstrip("/").rpartition("/")[2] or "model")
            _write(settings, out)
            on_main_process(lambda: upload(out, settings.out))
    else:
        _write(settings, Path(settings.out))


def _write(settings: Export, out: Path) -> None:
    """Write the model into a folder."""
    if out.exists() and not (out / "config.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not a model: choose a new folder for --out")
    check_kept(out, "--out", {"--model": settings.model})
    for path in settings.adapters:
        check_kept(out, "--out", {"--adapters": path})
    check_replaceable(out, CHECKSUMS, REPLACEABLE)
    check_distinct(settings.adapters)
    adapters = [_adapter(path) for path in settings.adapters]
    carried = [path for path in adapters if holds_security_vectors(path)]
    if carried and not settings.carry_vectors:
        raise UserError(
            f"{carried[0]} contains security vectors: with them merged, the model would show the behavior that they "
            "were trained on. Omit it to export a model for use; to study the behavior, pass --carry-vectors"
        )
    scored = [Results.load(run) for run in settings.scores]
    for run, results in zip(settings.scores, scored):
        _check_inputs(run, f"score it again, or omit --scores {run}")
        _check_scored(run, results, settings.model, adapters)
    trained = list(history(settings.model))[::-1]
    read_by_all(settings)
    loaded = load(settings.model)
    merged = _merged(loaded, adapters)
    base = hub_id(str(trained[0].config.get("model", "")) if trained else settings.model)
    dtype = settings.dtype or loaded.metadata.dtype
    merged.save(out, model_card(resolved(out).name, base, trained, scored, carried, adapters), dtype=dtype)
    Console(quiet=not is_main_process()).print(f"the model is in {settings.out}, in {dtype}", soft_wrap=True)


def _adapter(path: str) -> str:
    """Return the task LoRA inside a run directory; any other path is returned unchanged."""
    task = local(path) / TASK_FOLDER
    return str(task if (task / "adapter_config.json").is_file() else path)


def _check_inputs(run: str | Path, otherwise: str) -> None:
    """Raise UserError if a model or adapter that a run used has changed since."""
    before = inputs_of_run(run)
    named = {label: label.partition(" ") for label in before}
    now = {label: known(_CHECKED[flag], name) for label, (flag, _, name) in named.items() if flag in _CHECKED}
    changed = difference({label: before[label] for label in now}, now)
    if changed is not None:
        raise UserError(f"{changed} since {run} was run, so the model card would be wrong: {otherwise}")


def _check_scored(run: str, results: Results, exported: str, adapters: Sequence[str]) -> None:
    """Raise UserError if a run scored another model than the one that is exported, or with other adapters active."""
    if results.config.get("given"):  # a judge's run of replies that are in its rows
        return
    scored: dict[str, dict[str, str | None]] = {}
    for label, digest in inputs_of_run(run).items():
        flag, _, name = label.partition(" ")
        scored.setdefault(flag, {})[name] = digest
    models = scored.get("--after") or scored.get("--model") or {}
    digest = known(model, exported)
    if other := next((name for name, each in models.items() if None not in (each, digest) and each != digest), None):
        raise UserError(
            f"{run} scored another model ({other}) than {exported}, so the model card would be wrong: score the model "
            f"that is exported, or omit --scores {run}"
        )
    active, merged = scored.get("--vectors", {}), {path: known(adapter, path) for path in adapters}
    if None not in (*active.values(), *merged.values()) and set(active.values()) != set(merged.values()):
        found, wanted = (", ".join(names) or "no adapters" for names in (active, merged))
        raise UserError(
            f"{run} scored the model with {found}, and it is exported with {wanted}, so the model card would be wrong: "
            f"score it with these (--vectors), or omit --scores {run}"
        )


_CHECKED = {"--model": model, "--before": model, "--after": model, "--vectors": adapter}
"""Flags of a run's inputs -> the functions that digest them."""


def history(model: str) -> Iterator[Results]:
    """Yield the training runs that led to a model, latest first."""
    seen: set[Path] = set()
    while (folder := run_of(model)) is not None and folder not in seen:
        seen.add(folder)
        run = Results.load(folder)
        _check_inputs(folder, "train again from the current one, or export a copy of the model folder alone")
        yield run
        model = str(run.config.get("model", ""))


def run_of(model: str) -> Path | None:
    """Return the run directory of a model, given the path of the run or of the model in it; None if there is none."""
    try:
        path = local(model)
        runs = (folder for folder in (path, path.parent) if (folder / FILE).is_file() and (folder / "model").is_dir())
        return next(runs, None)
    except OSError:  # a name that is too long
        return None


def hub_id(model: str) -> str | None:
    """Return the hub id of a model's name: the name itself, or that of an embedded model; None if there is none."""
    is_hub_id = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", model, re.ASCII) is not None and not Path(model).exists()
    return _HUB_IDS.get(model) or (model if is_hub_id else None)


def _merged(base: Model, adapters: Sequence[str]) -> Model:
    backbone = base.backbone
    for path in adapters:
        vectors = load_vectors(path, base)
        if not isinstance(vectors, LoRAVectors):
            raise UserError(f"{path} is not LoRA, so it cannot be merged: pass it as --vectors instead")
        backbone = merge(backbone, vectors)
    return base.with_backbone(backbone)
