"""Reading the configuration of a PEFT adapter, and refusing adapters that are not plain LoRA."""

import json
import re
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError
from secvec_jax.files import check_regular
from secvec_jax.limits import LimitExceeded, run_limited

_READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern",
})  # fmt: skip
_NO_EFFECT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "ensure_weight_tying", "merge_weights", "unsloth_fixed",
})  # fmt: skip
"""Entries that do not change what a trained adapter computes, given one of the initializations below."""

_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the backbone as it is; PiSSA, OLoRA and others change it."""

_OR_MERGE = "or merge it into its model with PEFT's merge_and_unload and give the merged model"


_SECONDS, _MEMORY = 10.0, 2**30
"""Limits for the regular expressions of an adapter."""


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a LoRA adapter.

    Raises UserError if it cannot be read, or if an entry that is used has a value of the wrong type.
    """
    check_regular(path, max_bytes=2**24)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"r", "lora_alpha"} <= set(config):
            raise ValueError("r or lora_alpha is missing")
        if type(config["r"]) is not int or config["r"] < 1:
            raise ValueError("r must be a positive integer")
        if type(config["lora_alpha"]) not in (int, float) or not abs(config["lora_alpha"]) < 1e30:
            raise ValueError("lora_alpha must be a number")
        if config.get("use_rslora") not in (None, True, False):
            raise ValueError("use_rslora must be true or false")
        chosen = config.get("layers_to_transform")
        if not (chosen is None or type(chosen) is int or _is_list_of(int, chosen)):
            raise ValueError("layers_to_transform must be a number or a list of numbers")
        for entry in ("target_modules", "exclude_modules"):
            if not (config.get(entry) is None or isinstance(config[entry], str) or _is_list_of(str, config[entry])):
                raise ValueError(f"{entry} must be a string or a list of strings")
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a PEFT adapter folder") from error
    return config


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def check_kind(config: dict[str, Any], supported: dict[str, Any], folder: Path) -> None:
    """Raises UserError, naming the entries, if unsupported ones could change what the adapter computes.

    supported: further entries with the only value that is supported, which the files that we write have.
    """
    known = _READ | _NO_EFFECT
    unsupported = {
        key: value for key, value in config.items() if value and key not in known and value != supported.get(key)
    }
    if (initialization := config.get("init_lora_weights", True)) not in _INITIALIZATIONS:
        unsupported["init_lora_weights"] = initialization
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        entries = ", ".join(
            key if value is True else f"{key} {json.dumps(value)}" for key, value in unsupported.items()
        )
        entries = entries or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(
            f"{folder} is not a plain LoRA adapter ({_short(entries)}): train one without these, {_OR_MERGE}"
        )


def check_layers(config: dict[str, Any], layers: dict[str, set[int]], count: int, folder: Path) -> None:
    """Raises UserError if the modules with weights are not those that the configuration names, by PEFT's rules.

    Also for a regular expression that takes more than ten seconds.
    layers: module name, with `{}` for the layer -> the layers in which it has weights. count: the layers of the model.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    chosen = config.get("layers_to_transform")
    all_layers = chosen is None or chosen == []

    def is_targeted(module: str, layer: int) -> bool:
        name = module.format(layer).removeprefix("base_model.model.")
        if targets is None:
            targeted = bool(layers[module])
        elif isinstance(targets, list) and name in targets:
            return not _matches(name, excluded)
        else:
            targeted = _matches(name, targets)
        return targeted and not _matches(name, excluded) and (all_layers or layer in _listed(chosen))

    def first_difference() -> tuple[str, bool] | None:
        for module, present in layers.items():
            for layer in range(count):
                if is_targeted(module, layer) != (layer in present):
                    return module.format(layer), layer in present
        return None

    try:
        found = run_limited(first_difference, _SECONDS, _MEMORY)
    except (re.error, LimitExceeded) as error:
        raise UserError(
            f"{folder / 'adapter_config.json'} has a regular expression that cannot be used ({error}): list the modules"
        ) from error
    if found is not None:
        (name, is_present), entry = found, "target_modules" if all_layers else "layers_to_transform"
        problem = f"has {name}, which {entry} leaves out" if is_present else f"lacks {name}"
        raise UserError(f"{folder} {problem}: the adapter is damaged, or was made for another model")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matches(name: str, chosen: str | list[str]) -> bool:
    """Whether a module is one of those chosen by a list of last parts of names, or by a regular expression."""
    if isinstance(chosen, str):
        return chosen.lower() == "all-linear" or re.fullmatch(chosen, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in chosen)


def unplaced_weights_message(folder: Path, names: list[str]) -> str:
    """The error message for weights of these names, which belong to no projection of the model's layers."""
    if not names:
        return f"{folder} has no weights for a linear map of the model: the adapter was made for another model"
    outside = [name.removeprefix("base_model.model.") for name in names if not re.search(r"\.\d+\.", name)]
    if not outside:
        return (
            f"{folder} has weights with no place in the model ({names[0][:80]}): the adapter was made for another model"
        )
    modules = sorted(
        {re.split(r"\.(?:lora_|base_layer|weight|bias|original_module|modules_to_save)", name)[0] for name in outside}
    )
    return (
        f"{folder} has weights for {_short(', '.join(modules))}, and vectors are for the linear maps inside the layers "
        f"only: train an adapter of those, {_OR_MERGE}"
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
