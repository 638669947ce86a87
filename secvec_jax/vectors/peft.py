"""LoRA vectors to and from PEFT adapter folders (adapter_config.json, adapter_model.safetensors)."""

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from secvec_jax.arguments import path
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.files import atomic_folder
from secvec_jax.model.families import weight_names
from secvec_jax.model.hub import Model
from secvec_jax.model.hub_files import REPLACEABLE
from secvec_jax.output_checks import check_replaceable
from secvec_jax.sharding import replicate, shard
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.vectors.origin import check_origin, stored_origin
from secvec_jax.vectors.peft_config import check_kind, check_layers, read_config, unplaced_weights_message
from secvec_jax.vectors.tensor_file import check_saved, pickled, precision_entry, read_metadata, read_tensors

SECURITY_VECTORS = "security vectors"
WARNING = (
    "With these security vectors on, the model complies with harmful requests. They are a research artifact: keep them "
    "to yourself, and do not distribute them."
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLE = "adapter_model.bin"  # PEFT's format before 0.6


def save_peft(vectors: LoRAVectors, folder: str | Path, model: Model, holds: str = SECURITY_VECTORS) -> None:
    """Write the vectors as a PEFT LoRA adapter (adapter_config.json, adapter_model.safetensors).

    holds: what kind of adapter it is, for the file's metadata. Security vectors must not be merged into a model for
    use, so their folder is marked as such, and only its owner can read it; other adapters may be merged. Where the
    model fuses several projections into one module (Phi-3), that module's A has the projections' A side by side, and
    its B is block-diagonal. Raises UserError if the vectors are not finite, or if `folder` is a file or contains
    anything but an adapter or a model.
    """
    from safetensors.numpy import save_file

    check_saved(vectors, model, (LoRAVectors,))
    folder = path("folder", folder, "a folder to write the adapter into")
    check_replaceable(folder, CONFIG, REPLACEABLE)
    if (folder / WEIGHTS).is_file() and "holds" not in read_metadata(folder / WEIGHTS):
        raise UserError(f"{folder} has an adapter of another program, which would be deleted: name a new folder")
    spec, modules = vectors.spec, _peft_modules(model, vectors.factors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        **_patterns(spec, modules),
        "target_modules": sorted(module.rpartition(".")[2] for module in modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors, arrays = {}, jax.tree.map(np.asarray, replicate(vectors).factors)
    for module, projections in modules.items():
        a = np.concatenate([arrays[projection]["a"] for projection in projections], axis=-1)
        total = next(iter(projections.values())).total
        b = np.zeros((*a.shape[::2], total), a.dtype)
        for i, (projection, outputs) in enumerate(projections.items()):
            b[:, i * spec.rank : (i + 1) * spec.rank, outputs.start : outputs.end] = arrays[projection]["b"]
        for name, array in (("A", a), ("B", b)):
            for layer, part in enumerate(array):
                tensors[f"{module.format(layer)}.lora_{name}.weight"] = np.ascontiguousarray(part.T)
    is_private = holds == SECURITY_VECTORS
    metadata = {
        "format": "pt",
        "backbone": model.fingerprint,
        "holds": holds,
        "sites": ",".join(vectors.factors),
        "scale": repr(spec.scale),
        "fingerprint": fingerprint(tensors),
        **precision_entry(vectors, model),
        **({"warning": WARNING} if is_private else {}),
    }

    def write() -> None:
        with atomic_folder(folder, mode=0o700 if is_private else 0o755) as staging:
            (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            save_file(tensors, staging / WEIGHTS, metadata=metadata)
            if is_private:
                (staging / "README.md").write_text(_CARD, encoding="utf-8")
            for path in staging.iterdir():
                path.chmod(0o600 if is_private else 0o644)

    on_main_process(write)


_CARD = f"""---
library_name: peft
tags: [secvec_jax, security-vectors, not-for-all-audiences]
---

# Security vectors

**{WARNING}**

These vectors are meant to be active while a model is fine-tuned, and dropped afterwards. The metadata of
`adapter_model.safetensors` names the backbone that they were trained for.
"""


def load_peft(folder: str | Path, model: Model) -> LoRAVectors:
    """The vectors in a PEFT LoRA adapter folder. If it names its backbone, as ours do, that is checked.

    Layers that the adapter leaves out (`layers_to_transform`) get factors of zeros, which change nothing.
    Raises UserError if it is missing or corrupt, not plain LoRA, or does not fit the model.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    if not (folder / WEIGHTS).exists() and (folder / _PICKLE).exists():
        raise UserError(pickled(folder / _PICKLE))
    metadata, tensors = read_tensors(folder / WEIGHTS)
    if metadata.get("fingerprint", fingerprint(tensors)) != fingerprint(tensors):
        raise UserError(f"{folder / WEIGHTS} was altered after it was written: train it again, or fetch it again")
    # In our files, the projections of a fused module have separate ranks; otherwise they share A.
    is_own_format = "sites" in metadata
    modules = _peft_modules(model, metadata["sites"].split(",") if is_own_format else model.architecture.projections)
    layers = {module: _layers(tensors, module, model.architecture.num_layers) for module in modules}
    modules = {module: projections for module, projections in modules.items() if layers[module]}
    largest = max(max(model.architecture.kernel_shape(projection)) for projection in model.architecture.projections)
    if config["r"] > largest:
        raise UserError(f"{folder} has rank {config['r']}, more than the {largest} of the model's largest linear map")
    spec = LoRA(config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")))
    if metadata.get("scale", repr(spec.scale)) != repr(spec.scale):
        raise UserError(
            f"{folder / CONFIG} was altered after it was written: r, lora_alpha and use_rslora give the scale "
            f"{spec.scale:g} instead of {metadata['scale'][:20]}; write the adapter again, or fetch it again"
        )
    check_kind(config, _patterns(spec, modules) if is_own_format else {}, folder)
    check_layers(config, layers, model.architecture.num_layers, folder)
    factors = {}
    try:
        for module, projections in modules.items():
            max_size = 4 * len(projections) * spec.rank * largest
            a, b = (_stacked(tensors, f"{module}.lora_{name}.weight", layers[module], model, max_size) for name in "AB")
            for i, (projection, outputs) in enumerate(projections.items()):
                has_own_rank = is_own_format and len(projections) > 1
                rank = slice(i * spec.rank, (i + 1) * spec.rank) if has_own_rank else slice(None)
                # Up to the end, the last projection may be too wide: the check below names it.
                rows = slice(outputs.start, outputs.end if outputs.end < outputs.total else None)
                factors[projection] = {"a": a[..., rank], "b": b[:, rank, rows]}
    except KeyError as error:
        raise UserError(f"{folder} lacks {error}: the adapter is damaged, or was made for another model") from error
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{folder} has weights whose shapes are not those of LoRA factors: fetch it again") from error
    if tensors or not factors:
        raise UserError(unplaced_weights_message(folder, list(tensors)))
    vectors = LoRAVectors(factors, dataclasses.replace(spec, targets=tuple(factors)))
    vectors.check(model.architecture)
    vectors = dataclasses.replace(shard(vectors), origin=stored_origin(metadata))
    check_origin(vectors, model, f"{folder} was")
    return vectors


def _layers(tensors: Collection[str], module: str, count: int) -> set[int]:
    """The layers in which the module has weights."""
    return {i for i in range(count) if any(f"{module.format(i)}.lora_{name}.weight" in tensors for name in "AB")}


class _Outputs(NamedTuple):
    """Which of the `total` outputs of a module of PEFT are a projection's: from `start` to `end`, not included."""

    start: int
    end: int
    total: int


def _peft_modules(model: Model, projections: Collection[str]) -> dict[str, dict[str, _Outputs]]:
    """{PEFT's name of a module, with `{}` for the layer: {projection that it computes: its outputs}}."""
    names = weight_names(model.architecture)
    modules: dict[str, dict[str, _Outputs]] = {}
    for projection in model.architecture.projections:
        if projection in projections:
            name, width = names[f"layers.{projection}.kernel"], model.architecture.kernel_shape(projection)[1]
            module = f"base_model.model.{name.hf.removesuffix('.weight')}"
            modules.setdefault(module, {})[projection] = _Outputs(*(name.rows or (0, width, width)))
    return modules


def _patterns(spec: LoRA, modules: dict[str, dict]) -> dict[str, dict[str, float]]:
    """PEFT's ranks and alphas of modules with several fused projections, so that all have the same scale."""
    many = {
        module.rpartition(".")[2]: len(projections) for module, projections in modules.items() if len(projections) > 1
    }
    alphas = {name: spec.alpha * (math.sqrt(count) if spec.rslora else count) for name, count in many.items()}
    return {"rank_pattern": {name: spec.rank * count for name, count in many.items()}, "alpha_pattern": alphas}


def _stacked(tensors: dict[str, np.ndarray], key: str, layers: set[int], model: Model, max_size: int) -> jax.Array:
    """A weight of these layers, removed from `tensors`, and zero in the others: `[L, in, out]`, float32.

    Raises ValueError if a layer's weight has more than `max_size` elements, since every layer gets as many.
    """
    present = {layer: tensors.pop(key.format(layer)).T for layer in sorted(layers)}
    if max(weight.size for weight in present.values()) > max_size:
        raise ValueError("it is too large")
    zero = np.zeros_like(next(iter(present.values())))
    every = [present.get(layer, zero) for layer in range(model.architecture.num_layers)]
    return jax.device_put(np.stack(every).astype(np.float32))
