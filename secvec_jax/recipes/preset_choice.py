"""The default preset of a training, by the model's size, the devices and their memory.

If the devices' memory is unknown, or no preset fits, the defaults apply. For small models on a CPU, as in the
quickstart, these are the settings of their preset.
"""

import contextlib
from typing import Any, Literal

import jax

from secvec_jax import presets
from secvec_jax.defenses.advice import size
from secvec_jax.distributed import broadcast_from_first
from secvec_jax.errors import UserError
from secvec_jax.model.decoder import abstract_decoder
from secvec_jax.model.hub import load_architecture
from secvec_jax.presets import NONE, Preset
from secvec_jax.sharding import num_shards, parse_mesh, platform
from secvec_jax.trees import num_parameters
from secvec_jax.workspace.run_directory import preset_of_run

Phase = Literal["vectors", "finetune", "align", "protect"]


def default_preset(settings: Any, phase: Phase) -> str | None:
    """The name of the preset to take in addition; None for none, or if the settings name one.

    settings: those of a verb with `preset`, `model`, `out` and `overwrite`.

    A run that is resumed keeps the preset that it was started with, whatever the devices are now. All processes must
    call this. Raises UserError if the settings name a preset that is not for the model's size.
    """
    if settings.preset == NONE:
        return None
    if settings.preset is not None:
        _check_size(settings.preset, settings.model)
        return None
    resumes, before = preset_of_run(settings)
    names = list(presets.presets())
    chosen = before if resumes else choose(settings.model, phase)
    index = broadcast_from_first(names.index(chosen) if chosen in names else -1)
    return None if index < 0 else names[int(index)]


def choose(model: str, phase: Phase) -> str | None:
    """The preset that takes the most memory, of those that fit the model's size and the devices; None if none fits."""
    parameters = _parameters(model)
    limit = _memory_gib()
    fitting = {
        name: preset.memory_gib.get(phase, 0.0)
        for name, preset in presets.presets().items()
        if parameters is not None and preset.fits_size(parameters) and _is_for_devices(preset, phase, limit)
    }
    return max(fitting, key=fitting.__getitem__) if fitting else None


def line(settings: Any) -> str | None:
    """The line about the preset of a training for its start, with the settings that override it; None without one."""
    name = settings.preset
    if name is None or name == NONE:
        return None
    other, is_all = presets.set_otherwise(settings)
    if is_all:
        return f"preset: {name} changes nothing, since flags or the config file set {', '.join(other)}"
    but = f", except {', '.join(other)}, which flags or the config file set" if other else ""
    return f"preset: {name} ({presets.named(name).summary}){but}; --preset {NONE} for the defaults"


def _is_for_devices(preset: Preset, phase: Phase, limit: float | None) -> bool:
    """Whether the devices of the ambient mesh are of the preset's kind and number, and have the memory."""
    mesh = jax.sharding.get_mesh()
    if preset.platform != platform() or preset.devices != (1 if mesh.empty else mesh.size):
        return False
    if preset.platform == "cpu":
        return True
    training = getattr(preset, phase).get("training", {})
    divides = training.get("batch_size", 1) % num_shards("batch") == 0 and _shards_weights(preset)
    return divides and limit is not None and phase in preset.memory_gib and preset.memory_gib[phase] <= limit


def _shards_weights(preset: Preset) -> bool:
    """Whether the ambient mesh shards weights as the preset's does, on which the memory of a device depends."""
    sizes = parse_mesh(preset.mesh) if preset.mesh else {}
    return (num_shards("embed"), num_shards("heads")) == (sizes.get("fsdp", 1), sizes.get("tensor", 1))


def _memory_gib() -> float | None:
    """The memory that a program can use on the smallest local device, in GiB; None if it is unknown."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [each["bytes_limit"] for each in statistics if "bytes_limit" in each]
    return min(limits) / 2**30 if len(limits) == len(statistics) else None


def _parameters(model: str) -> int | None:
    """The parameters of a model; None if they cannot be read, which loading it reports."""
    with contextlib.suppress(UserError, OSError):
        return num_parameters(abstract_decoder(load_architecture(model)))
    return None


def _check_size(name: str, model: str) -> None:
    """Raise UserError if the preset is for models of another size."""
    preset, parameters = presets.named(name), _parameters(model)
    if parameters is None or preset.fits_size(parameters):
        return
    low, high = (size(int(count)) for count in preset.parameters)
    others = [other for other, each in presets.presets().items() if each.fits_size(parameters)]
    use = f"use {' or '.join(others)}, or leave it out" if others else "leave it out"
    raise UserError(
        f"--preset {name} is for models of {low} to {high} parameters, and {model} has {size(parameters)}: {use}"
    )
