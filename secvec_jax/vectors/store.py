"""Files of vectors: our own safetensors format for every kind, and PEFT's for LoRA.

Every file of ours names the backbone it was made for by fingerprint, and is refused for another one: vectors say
"this behavior is already there" about one set of weights and nothing about any other.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.config import from_dict
from secvec_jax.errors import UserError
from secvec_jax.files import whole_file, whole_folder
from secvec_jax.mesh import by_first, lay, whole
from secvec_jax.model.families import weight_names
from secvec_jax.model.hub import Model
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.kinds import KINDS, Vectors, kind_of
from secvec_jax.vectors.lora import LoRA, LoRAVectors

_FORMAT = "secvec_jax/1"
_SECURITY_VECTORS = "security vectors"
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_vectors(vectors: Vectors, path: str | Path, model: Model) -> None:
    """Write one safetensors file with the vectors, their shape, and the fingerprint of the model's backbone."""
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(array) for name, array in _flat(whole(vectors).factors).items()}
    metadata = {
        "format": _FORMAT,
        "kind": kind_of(vectors),
        "spec": json.dumps(dataclasses.asdict(vectors.spec)),
        "backbone": model.fingerprint,
        "backbone_name": model.name,
        "fingerprint": _fingerprint(vectors),
    }

    def write() -> None:
        with whole_file(path) as staging:
            save_file(arrays, staging, metadata=metadata)

    by_first(write)


def load_several(paths: Sequence[str | Path], model: Model) -> tuple[Vectors, ...] | None:
    """The vectors in these files, to be active at once; None, and not an empty tuple, where there are none."""
    return tuple(load_vectors(path, model) for path in paths) or None


def load_vectors(path: str | Path, model: Model) -> Vectors:
    """The vectors in `path`, one of our files of any kind or a PEFT adapter folder, checked against the model.

    Raises UserError if the file is missing, corrupt, altered, or made for another backbone or shape.
    """
    path = Path(path)
    if path.is_dir():
        return load_peft(path, model)
    metadata, arrays = _read(path)
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path} is no file of security vectors: give one that train.py vectors wrote, or a PEFT folder"
        )
    try:
        factors: dict[str, Any] = {}
        for key, array in arrays.items():
            *groups, name = key.split(".")
            functools.reduce(lambda tree, group: tree.setdefault(group, {}), groups, factors)[name] = jnp.asarray(array)
        kind = KINDS[metadata["kind"]]
        vectors = kind.vectors(factors, from_dict(kind.spec, json.loads(metadata["spec"])))
        whole = "backbone" in metadata and _fingerprint(vectors) == metadata["fingerprint"]
    except (ValueError, KeyError, TypeError):  # UserError and JSONDecodeError are ValueErrors
        whole = False
    if not whole:
        raise UserError(f"{path} was altered after it was written: its fingerprint differs; train the vectors anew")
    vectors.check(model.architecture)
    _check_backbone(metadata, model, path)
    return lay(vectors)


def _flat(factors: dict[str, Any], prefix: str = "") -> dict[str, jax.Array]:
    """{"site.name": array}, or {"name": array} where there are no sites."""
    flat: dict[str, jax.Array] = {}
    for name, part in factors.items():
        flat |= _flat(part, f"{prefix}{name}.") if isinstance(part, dict) else {prefix + name: part}
    return flat


def _fingerprint(vectors: Vectors) -> str:
    """Of the factors and of what scales them."""
    return fingerprint((vectors, np.float64(vectors.spec.scale)))


def save_peft(vectors: LoRAVectors, folder: str | Path, model: Model, holds: str = _SECURITY_VECTORS) -> None:
    """Write the vectors as a PEFT LoRA adapter (adapter_config.json, adapter_model.safetensors).

    holds: what they are; anything but security vectors may be merged into a model to be used. Where the model computes
    several sites in one product, A has their columns side by side, and B is block-diagonal.
    """
    from safetensors.numpy import save_file

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
    tensors, arrays = {}, jax.tree.map(np.asarray, whole(vectors).factors)
    for module, sites in modules.items():
        a = np.concatenate([arrays[site]["a"] for site in sites], axis=-1)
        _, _, outputs = next(iter(sites.values()))
        b = np.zeros((*a.shape[::2], outputs), a.dtype)
        for i, (site, (first, end, _)) in enumerate(sites.items()):
            b[:, i * spec.rank : (i + 1) * spec.rank, first:end] = arrays[site]["b"]
        for name, array in (("A", a), ("B", b)):
            for layer, part in enumerate(array):
                tensors[f"{module.format(layer)}.lora_{name}.weight"] = np.ascontiguousarray(part.T)
    metadata = {"format": "pt", "backbone": model.fingerprint, "holds": holds, "sites": ",".join(vectors.factors)}

    def write() -> None:
        with whole_folder(folder) as staging:
            (staging / _PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            save_file(tensors, staging / _PEFT_WEIGHTS, metadata=metadata)

    by_first(write)


def holds_security_vectors(path: str | Path) -> bool:
    """Whether a file or a PEFT folder says that it holds security vectors. Raises UserError if it cannot be read."""
    path = Path(path)
    metadata, _ = _read(path / _PEFT_WEIGHTS if path.is_dir() else path)
    return metadata.get("format") == _FORMAT or metadata.get("holds") == _SECURITY_VECTORS


def load_peft(folder: str | Path, model: Model) -> LoRAVectors:
    """A PEFT LoRA adapter as vectors; one of ours is checked for its backbone, others for their shapes only.

    Raises UserError if it is missing or corrupt, of another kind than plain LoRA, or does not fit the model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / _PEFT_CONFIG).read_text())
        if not isinstance(config, dict) or not {"r", "lora_alpha"} <= set(config):
            raise ValueError("r or lora_alpha is missing")
        if type(config["r"]) is not int or type(config["lora_alpha"]) not in (int, float):
            raise ValueError("r must be a whole number, lora_alpha a number")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / _PEFT_CONFIG} cannot be read ({error}): give a PEFT adapter folder") from error
    metadata, tensors = _read(folder / _PEFT_WEIGHTS)
    ours = "sites" in metadata  # several sites of a module have ranks of their own; else they share A
    held = metadata["sites"].split(",") if ours else model.architecture.sites
    modules = {
        module: sites
        for module, sites in _peft_modules(model, held).items()
        if f"{module.format(0)}.lora_A.weight" in tensors
    }
    spec = LoRA(config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")))
    _check_peft_kind(config, _patterns(spec, modules) if ours else {}, folder)
    factors = {}
    try:
        for module, sites in modules.items():
            a, b = (_stacked(tensors, f"{module}.lora_{name}.weight", model) for name in "AB")
            for i, (site, (first, end, outputs)) in enumerate(sites.items()):
                rank = slice(i * spec.rank, (i + 1) * spec.rank) if ours and len(sites) > 1 else slice(None)
                rows = slice(first, end if end < outputs else None)  # what is too wide stays so, and is told
                factors[site] = {"a": a[..., rank], "b": b[:, rank, rows]}
    except KeyError as error:
        raise UserError(f"{folder} lacks {error}: the adapter was made for another model") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{folder} has weights of no shape that LoRA has: fetch it again") from error
    if tensors or not factors:
        raise UserError(f"{folder} has weights with no place in the model ({next(iter(tensors), 'none at all')})")
    vectors = LoRAVectors(factors, dataclasses.replace(spec, targets=tuple(factors)))
    vectors.check(model.architecture)
    if "backbone" in metadata:
        _check_backbone(metadata, model, folder)
    return lay(vectors)


_PEFT_UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "modules_to_save",
                     "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
                     "layer_replication")  # fmt: skip


def _check_peft_kind(config: dict, ours: dict[str, Any], folder: Path) -> None:
    """ours: entries that are of our own making, and understood at this value."""
    unsupported = [key for key in _PEFT_UNSUPPORTED if config.get(key) and config[key] != ours.get(key)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        unsupported.append("init_lora_weights")  # pissa, olora, ... take their start out of the backbone
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        what = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(f"{folder} is no plain LoRA adapter ({what}): train one without these")


def _peft_modules(model: Model, sites: Collection[str]) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Modules as PEFT names them, with a `{}` for the layer -> those of the sites that they compute -> their outputs.

    Outputs are (first, behind the last, of how many).
    """
    names = weight_names(model.architecture)
    modules: dict[str, dict[str, tuple[int, int, int]]] = {}
    for site in model.architecture.sites:
        if site in sites:
            name, width = names[f"layers.{site}.kernel"], model.architecture.site_shape(site)[1]
            module = f"base_model.model.{name.hf.removesuffix('.weight')}"
            modules.setdefault(module, {})[site] = name.rows or (0, width, width)
    return modules


def _patterns(spec: LoRA, modules: dict[str, dict]) -> dict[str, dict[str, float]]:
    """PEFT's ranks and alphas of modules that hold several sites, so that each of them has the others' scale."""
    many = {module.rpartition(".")[2]: len(sites) for module, sites in modules.items() if len(sites) > 1}
    alphas = {name: spec.alpha * (math.sqrt(count) if spec.rslora else count) for name, count in many.items()}
    return {"rank_pattern": {name: spec.rank * count for name, count in many.items()}, "alpha_pattern": alphas}


def _stacked(tensors: dict[str, np.ndarray], key: str, model: Model) -> jax.Array:
    """A weight of all layers, taken out of `tensors`: `[L, in, out]`, float32."""
    layers = [tensors.pop(key.format(layer)).T for layer in range(model.architecture.num_layers)]
    return jnp.asarray(np.stack(layers), jnp.float32)


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="flax") as file:
            tensors = {key: np.asarray(file.get_tensor(key)) for key in file.keys()}
            if odd := [key for key, array in tensors.items() if not jnp.issubdtype(array.dtype, jnp.floating)]:
                raise UserError(
                    f"{path}: {odd[0]} is of type {tensors[odd[0]].dtype}, no float: train the vectors anew"
                )
            return file.metadata() or {}, tensors
    except FileNotFoundError as error:
        raise UserError(f"no vectors at {path}: check --vectors") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt ({error}): train the vectors anew") from error


def _check_backbone(metadata: dict[str, str], model: Model, path: Path) -> None:
    if metadata["backbone"] != model.fingerprint:
        made_for = metadata.get("backbone_name", "another model")
        raise UserError(
            f"{path} was made for another backbone ({made_for}, {metadata['backbone'][:12]}), not for {model.name} "
            f"({model.fingerprint[:12]}): train vectors on this model, or name the model they were made for"
        )
