"""Training settings, and settings as YAML files. Settings are dataclasses that check themselves (see `checks`).

The docstring below a field is its help text on the command line. Imports no JAX.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from secvec_jax.checks import (
    UNSET,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    SettingError,
    arguments_of,
    checked,
    defaults_of,
    hints_of,
    implied_by,
    inherit,
)
from secvec_jax.errors import UserError
from secvec_jax.files import atomic_file, check_regular
from secvec_jax.suggestions import suggestion

Settings = TypeVar("Settings")


@checked
@dataclasses.dataclass(frozen=True, repr=False)
class Training:
    """Optimizer, learning rate, batches and checkpoints.

    Unset settings are inherited from the function or command that the settings are passed to: `Training(max_steps=15)`
    for `train_vectors` is its default training, ended after 15 steps. `Training.base` holds the general defaults.
    Raises UserError for a value of the wrong type or out of range.
    """

    optimizer: Literal["sgd", "adamw", "adamw-bf16", "adafactor", "muon"] = UNSET
    """sgd keeps small gradients small, which security vectors rely on; adamw rescales them to full steps. Experimental,
    their safety is not measured: adamw-bf16 (both moments in bfloat16), adafactor (factored second moments) and muon
    (orthogonalized updates) take less memory than adamw and rescale gradients as it does"""
    learning_rate: PositiveFloat = UNSET
    """peak learning rate"""
    schedule: Literal["cosine", "linear", "constant"] = UNSET
    """how the learning rate decays after the warm-up; cosine and linear decay toward a tenth of the peak"""
    warmup_steps: NonNegativeInt = UNSET
    """steps in which the learning rate rises linearly from zero"""
    momentum: Fraction = UNSET
    """momentum of sgd"""
    weight_decay: NonNegativeFloat = UNSET
    """weight decay of all weights except norms and biases: added to the gradient with sgd, else decoupled"""
    trained_weights: Literal["float32", "bfloat16"] = UNSET
    """precision of all weights while they are trained; bfloat16 halves the memory of weights and gradients, and uses
    stochastic rounding; a task LoRA and vectors are float32"""
    max_grad_norm: NonNegativeFloat = UNSET
    """clip the gradient to this norm; 0: do not clip"""
    epochs: PositiveInt = UNSET
    """passes over the rows"""
    max_steps: PositiveInt | None = UNSET
    """optimizer steps; overrides epochs"""
    batch_size: PositiveInt = UNSET
    """packed sequences per batch, on all devices together; several short rows share a sequence"""
    max_seq_len: PositiveInt | None = UNSET
    """tokens per packed sequence, and the limit for a single row; by default 256, 512, 1024 or 2048, chosen to fit the
    longest row"""
    long_rows: Literal["truncate", "drop", "refuse"] = UNSET
    """what to do with rows longer than max_seq_len: truncate the answer, drop the row, or refuse the data; truncated
    and dropped rows are counted and reported"""
    control_tokens: Literal["text", "tokens", "refuse"] = UNSET
    """what to do with control tokens spelled out in a row, such as <|im_end|>: text: train on the characters; tokens:
    train on the tokens themselves; refuse: stop with an error that names the row"""
    grad_accum_steps: PositiveInt = UNSET
    """batches per optimizer step"""
    remat: Literal["none", "dots", "attention", "full"] = UNSET
    """what the backward pass recomputes to save memory: none: nothing; dots: everything except matrix products;
    attention: everything except fused attention; full: whole layers"""
    share_prefix: bool | None = UNSET
    """store the tokens that all rows begin with once per sequence; by default on, except on TPUs, whose fused attention
    does not support it"""
    seed: Seed = UNSET
    """seed of the order of the rows and of the initial vectors"""
    save_every_seconds: PositiveFloat = UNSET
    """seconds between checkpoints"""
    max_checkpoints: PositiveInt = UNSET
    """number of checkpoints to keep during training; older ones are deleted"""
    best: str | None = UNSET
    """a metric, such as loss/all: return the checkpoint where it was lowest; by default the last step or, with
    validation rows, the lowest eval/loss"""
    eval_every_steps: PositiveInt | None = UNSET
    """steps between evaluations of the validation rows; by default one epoch"""
    patience: PositiveInt | None = UNSET
    """stop after this many evaluations without a new lowest eval/loss; by default never"""

    base: ClassVar["Training"]

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"Training({', '.join(f'{name}={value!r}' for name, value in values if value is not UNSET)})"

    def over(self, default: "Training") -> "Training":
        """These settings with each unset one taken from `default`, or else from `Training.base`."""
        return inherit(self, default, Training.base)


Training.base = Training(
    optimizer="sgd",
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=3,
    momentum=0.9,
    weight_decay=0.0,
    trained_weights="float32",
    max_grad_norm=0.0,
    epochs=1,
    max_steps=None,
    batch_size=2,
    max_seq_len=None,
    long_rows="truncate",
    control_tokens="text",
    grad_accum_steps=1,
    remat="full",
    share_prefix=None,
    seed=0,
    save_every_seconds=120.0,
    max_checkpoints=2,
    best=None,
    eval_every_steps=None,
    patience=None,
)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as plain ones: {"training": {"max_steps": 3}} -> {"training.max_steps": 3}."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flattened


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; where both have a value, that of `above`.

    A value where a mapping belongs is kept, so that it is refused.
    """
    result = dict(below)
    for key, value in above.items():
        before = result.get(key)
        if isinstance(value, dict) and before is not None:
            result[key] = merged(before, value) if isinstance(before, dict) else before
        else:
            result[key] = value
    return result


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain lists, dicts and scalars, without the unset settings."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not UNSET}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(settings))


def from_dict(kind: type[Settings], values: Any, where: str = "config", default: Any = None) -> Settings:
    """Settings from a mapping of plain values, such as a parsed YAML file.

    where: prefix of the names in error messages; may be empty. default: an instance of the class whose values replace
    the class's own defaults. A nested mapping keeps the defaults of the settings that it leaves out.
    Raises UserError for an unknown key (with the closest known one), for a value of the wrong type or out of range, and
    for a required setting that is missing.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of settings, not {type(values).__name__}")
    prefix = f"{where}." if where else ""
    hints = hints_of(kind)
    defaults = defaults_of(kind) | implied_by(kind, values)
    if type(default) is kind:
        defaults |= {name: getattr(default, name) for name in hints}
    arguments = {name: value for name, value in defaults.items() if name in hints}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}: {suggestion(key, hints)}")
        arguments[key] = _with_settings(hints[key], value, f"{prefix}{key}", defaults.get(key))
    try:
        return kind(**arguments_of(kind, arguments, hints))
    except SettingError as error:
        raise SettingError(f"{prefix}{error.name}", error.problem) from None
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def settings_class(hint: Any) -> type | None:
    """The settings dataclass of a declared type such as `LoRA` or `LoRA | None`; None for other types."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    classes = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return classes[0] if len(classes) == 1 else None


def _with_settings(hint: Any, value: Any, where: str, default: Any) -> Any:
    """The value with settings dataclasses in place of mappings; everything else is left for `checks.check`."""
    nested = settings_class(hint)
    if nested is not None and (value is not None or hint is nested):
        return from_dict(nested, value, where, default)
    if typing.get_origin(hint) in (tuple, list) and isinstance(value, list | tuple):
        item = typing.get_args(hint)[0]
        return [_with_settings(item, each, f"{where}[{index}]", None) for index, each in enumerate(value)]
    return value


def load(kind: type[Settings], path: str | Path) -> Settings:
    """Settings from a YAML file, over those of the preset that it names, as on the command line.

    Raises UserError if it cannot be read, is not valid YAML, or has invalid settings.
    """
    return from_dict(kind, _over_preset(kind, read(path)), str(path))


def _over_preset(kind: Any, values: Any) -> Any:
    """The values of a file over those of the preset that it names (see `presets.preset_field`)."""
    for field in dataclasses.fields(kind) if isinstance(values, dict) else ():
        if "preset" in field.metadata and (found := field.metadata["preset"](values)) is not None:
            values = merged(dict(found[1]), values)
    return values


def read(path: str | Path) -> Any:
    """The content of a YAML file; an empty file is an empty mapping. Raises UserError if it cannot be read."""
    check_regular(path, max_bytes=_MAX_BYTES)
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read the config file {path} ({error.strerror}): check --config") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: check --config") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({str(error).splitlines()[0]})") from error
    except (ValueError, TypeError, OverflowError) as error:  # a date or a number that does not exist
        raise UserError(f"{path} has a value that is not valid YAML ({error})") from error
    _check_size(values, str(path))
    return {} if values is None else values


_MAX_BYTES = 2**20
"""Limit for a YAML file: PyYAML reads about 100 kB per second, comments and empty lines included."""
_MAX_VALUES = 100_000
"""Limit for the values of a YAML file, counted as often as aliases repeat them; grids have a few thousand."""
_MAX_DEPTH = 40
"""Limit for the nesting of a YAML file, in levels."""
_MAX_BITS = 1024
"""Limit for a whole number, in bits; no float has more."""


def _check_size(values: Any, path: str) -> None:
    """Raise UserError for values that a few aliases multiply without end, and for numbers of thousands of digits."""
    counts: dict[int, int] = {}
    begun: set[int] = set()

    def count(value: Any) -> int:
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise UserError(f"{path} has a whole number of {value.bit_length():,} bits: no setting takes such a number")
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in counts:
            if id(value) in begun:
                raise UserError(f"{path} has a value that contains itself: write the value out")
            begun.add(id(value))
            counts[id(value)] = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
        return counts[id(value)]

    if count(values) > _MAX_VALUES:
        raise UserError(f"{path} has more than {_MAX_VALUES:,} values with aliases expanded: settings have fewer")


class Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys, of which PyYAML silently keeps the last, and numbers that look decimal and are
    not (010, 1:30); reads 1e-3 as a number."""

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._level > _MAX_DEPTH:  # before thousands of levels take seconds and then the stack
            raise yaml.composer.ComposerError(None, None, f"it is nested deeper than {_MAX_DEPTH} levels")
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"line {key.start_mark.line + 1}: {key.value!r} is given twice"
                    )
                seen.add(key.value)
        return node


def _number(construct: Callable[[Loader, yaml.ScalarNode], Any]) -> Callable[[Loader, yaml.ScalarNode], Any]:
    def constructed(loader: Loader, node: yaml.ScalarNode) -> Any:
        if re.match(r"[-+]?0[0-9_]", node.value) or ":" in node.value:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"line {node.start_mark.line + 1}: {node.value} is an octal number or one of base 60 in YAML 1.1, and "
                "something else in YAML 1.2: write it as a decimal number, or as text in quotes",
            )
        return construct(loader, node)

    return constructed


Loader.add_constructor("tag:yaml.org,2002:int", _number(Loader.construct_yaml_int))
Loader.add_constructor("tag:yaml.org,2002:float", _number(Loader.construct_yaml_float))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def save(settings: Any, path: str | Path) -> None:
    """Write all settings to a YAML file that `load` and `--config` read back."""
    with atomic_file(path) as staging:
        staging.write_text(yaml.safe_dump(to_dict(settings), sort_keys=False))
