"""Presets: settings of a training by the model's size and the hardware, from the YAML files in configs/presets.

A preset sets what decides whether a step fits into memory and how fast it is: the batch, rematerialization, the
precision of frozen weights, a task LoRA, the mesh. It sets no optimizer and no learning rate. Flags and config files
override it. Imports no JAX.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from secvec_jax import config
from secvec_jax.checks import PositiveFloat, PositiveInt, Text
from secvec_jax.errors import UserError
from secvec_jax.suggestions import suggestion

FOLDER = Path(__file__).parent / "preset_files"
"""A link to configs/presets, so that an installed package has them, too."""

NONE = "none"
"""The value for no preset, not even the default one."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings for models of some size on some hardware.

    parameters: the range of their number. devices: of the mesh. memory_gib: the memory of a step per device, by phase,
    as `train.py plan --preset NAME --phase PHASE` reports it for `model` with sequences of 2048 tokens; without it, the
    preset is taken by name only. topology: what `plan` compiles for. vectors, finetune, align, protect: the settings of
    these verbs, as in a config file; empty: the preset is not for the verb.
    """

    summary: Text
    parameters: tuple[PositiveFloat, PositiveFloat]
    platform: Literal["cpu", "gpu", "tpu"]
    devices: PositiveInt = 1
    mesh: str = ""
    model: str = ""
    topology: str = ""
    memory_gib: Mapping[str, float] = dataclasses.field(default_factory=dict)
    vectors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    finetune: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    align: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    protect: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def fits_size(self, parameters: int) -> bool:
        """Whether it is for models with this number of parameters."""
        low, high = self.parameters
        return low <= parameters <= high


@functools.cache
def presets() -> dict[str, Preset]:
    """All presets by name, from the smallest models and memory to the largest."""
    loaded = {path.stem: config.load(Preset, path) for path in FOLDER.glob("*.yaml")}
    return dict(sorted(loaded.items(), key=lambda item: (item[1].parameters, item[1].devices, largest(item[1]))))


def largest(preset: Preset) -> float:
    """The memory per device of the phase that takes the most, in GiB; 0 if it was not compiled."""
    return max(preset.memory_gib.values(), default=0.0)


def listing() -> str:
    """All presets, one a line."""
    width = max(map(len, presets()))
    return "\n".join(f"{name:{width}}  {preset.summary}" for name, preset in presets().items())


def named(name: str) -> Preset:
    """The preset of this name. Raises UserError, with a note for each preset, if there is none."""
    if name in presets():
        return presets()[name]
    error = UserError(f"unknown preset {name!r}: {suggestion(name, presets())}")
    for line in listing().splitlines():
        error.add_note(line)
    raise error


def holds(settings: Any) -> bool:
    """Whether settings under a preset hold the model's weights as it says, so that its batch fits into memory.

    settings: those of a verb whose `preset` names one, and which may override it.
    """
    chosen = preset_of(type(settings), config.to_dict(settings))
    if chosen is None:
        return False
    preset, values = chosen
    if preset.platform == "cpu":
        return True
    has_task = getattr(settings, "task_lora", None) is not None
    holds_as = getattr(settings, "frozen_weights", None)
    return has_task == ("task_lora" in values) and holds_as == values.get("frozen_weights")


Found = tuple[Preset, Mapping[str, Any]]
"""A preset, and what a verb takes of it."""

Section = Callable[[Preset, Mapping[str, Any]], Mapping[str, Any]]
"""The settings that a verb takes from a preset, given those of flags and the config file."""


def section_of(verb: str, on_topology: bool = False) -> Section:
    """The settings that a verb takes from a preset. Raises UserError, which names others, if the preset has none for
    it.

    on_topology: name only presets of devices that `plan` compiles for.
    """

    def section(preset: Preset, values: Mapping[str, Any]) -> Mapping[str, Any]:
        section_values: Mapping[str, Any] = getattr(preset, verb)
        if not section_values:
            usable = [name for name, each in presets().items() if each.topology or not on_topology]
            others = [name for name in usable if getattr(presets()[name], verb)]
            use = f", or use {' or '.join(others)}" if others else ""
            raise UserError(f"this preset has no settings for {verb}: leave it out{use}")
        return section_values

    return section


def preset_field(section: Section) -> Any:
    """The field `preset` of a verb's settings, None by default."""

    def found(values: Mapping[str, Any]) -> Found | None:
        name = values.get("preset")
        if not isinstance(name, str) or name == NONE:
            return None
        preset = named(name)
        return preset, section(preset, values)

    return dataclasses.field(default=None, metadata={"preset": found, "listing": listing})


def preset_of(settings: type, values: Mapping[str, Any]) -> Found | None:
    """The preset that the values of a verb's settings name, and its values for that verb; None if they name none.

    Raises UserError for an unknown name.
    """
    finders = [field.metadata["preset"] for field in dataclasses.fields(settings) if "preset" in field.metadata]
    return finders[0](values) if finders else None


def set_otherwise(settings: Any) -> tuple[list[str], bool]:
    """The settings that the preset of a verb's settings sets and that have other values, and whether those are all."""
    found = preset_of(type(settings), config.to_dict(settings))
    wanted = {} if found is None else config.flat(dict(found[1]))
    values = config.flat(config.to_dict(settings))
    other = [key.removeprefix("training.") for key, value in wanted.items() if values.get(key) != value]
    return other, len(other) == len(wanted)
