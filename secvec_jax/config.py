"""Settings as small dataclasses that check themselves (see `checks`), and their files. Knows no JAX.

The comment under a field is its help text on the command line.
"""

import dataclasses
import typing
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
    inherit,
    suggestion,
)
from secvec_jax.errors import UserError
from secvec_jax.files import whole_file

Settings = TypeVar("Settings")


@checked
@dataclasses.dataclass(frozen=True, repr=False)
class Training:
    """How parameters are trained.

    What is not set is inherited from the verb that the settings are given to: `Training(max_steps=15)` for
    `train_vectors` is its own default training, ended after 15 steps. `Training.base` has what a verb without other
    defaults takes.
    Raises UserError for a value of the wrong type or out of range.
    """

    optimizer: Literal["sgd", "adamw"] = UNSET
    """sgd keeps small gradients small, which security vectors rely on; adamw rescales them to full steps"""
    learning_rate: PositiveFloat = UNSET
    """the peak of the schedule"""
    schedule: Literal["cosine", "linear", "constant"] = UNSET
    """how the learning rate falls after the warm-up, to a tenth of the peak"""
    warmup_steps: NonNegativeInt = UNSET
    """steps in which the learning rate rises from zero"""
    momentum: Fraction = UNSET
    """of sgd"""
    weight_decay: NonNegativeFloat = UNSET
    """of all weights except norms and biases: decoupled with adamw, added to the gradient with sgd"""
    max_grad_norm: NonNegativeFloat = UNSET
    """the largest gradient norm; 0 does not clip"""
    epochs: PositiveInt = UNSET
    """passes over the rows"""
    max_steps: PositiveInt | None = UNSET
    """optimizer steps, in place of epochs"""
    batch_size: PositiveInt = UNSET
    """packed sequences in a batch, on all devices together"""
    max_seq_len: PositiveInt | None = UNSET
    """tokens of a packed sequence, and the longest row; left out: 256, 512, 1024 or 2048, as the longest row needs"""
    long_rows: Literal["truncate", "drop", "refuse"] = UNSET
    """for rows longer than max_seq_len: truncate the answer, drop the row, or refuse the data; what is cut or dropped
    is counted and reported"""
    control_tokens: Literal["text", "tokens", "refuse"] = UNSET
    """for control tokens that a row spells, such as <|im_end|>: text: learn the characters; tokens: learn the tokens;
    refuse: an error that names the row"""
    grad_accum_steps: PositiveInt = UNSET
    """batches per optimizer step"""
    remat: Literal["none", "dots", "attention", "full"] = UNSET
    """what the backward pass recomputes to save memory: none: nothing; dots: all but matrix products; attention: all
    but a fused attention kernel; full: whole layers"""
    share_prefix: bool | None = UNSET
    """whether tokens with which all rows begin are computed once per sequence; left out: yes, but not on TPUs, whose
    fused attention does not support it"""
    seed: Seed = UNSET
    """of the order of rows and of fresh vectors"""
    save_every_seconds: PositiveFloat = UNSET
    """time between two checkpoints"""
    max_checkpoints: PositiveInt = UNSET
    """how many of the newest are kept while training"""
    best: str | None = UNSET
    """a metric of metrics.jsonl, such as loss/all: keep the checkpoint where it was lowest, and end with that one; left
    out: the last one, or, with validation rows, the one with the lowest eval/loss"""
    eval_every_steps: PositiveInt | None = UNSET
    """steps between two evaluations of the validation rows, if there are any; left out: an epoch"""
    patience: PositiveInt | None = UNSET
    """end the training after so many evaluations without a new lowest eval/loss; left out: never"""

    base: ClassVar["Training"]

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"Training({', '.join(f'{name}={value!r}' for name, value in values if value is not UNSET)})"

    def over(self, default: "Training") -> "Training":
        """These settings, complete: what is not set is that of `default`, or else of `Training.base`."""
        return inherit(self, default, Training.base)


Training.base = Training(
    optimizer="sgd",
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=3,
    momentum=0.9,
    weight_decay=0.0,
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


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain lists, dicts and scalars, complete but for what is unset."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not UNSET}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(settings))


def from_dict(kind: type[Settings], values: dict[str, Any], where: str = "config", default: Any = None) -> Settings:
    """The settings that `values` spell; what is left out is that of `default`, of the same class, or the class's own.

    A mapping inside `values` leaves out what the default of its key has. Raises UserError for an unknown key (naming
    the nearest known one) and for a value of the wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of settings, not {type(values).__name__}")
    hints = hints_of(kind)
    defaults = defaults_of(kind)
    if type(default) is kind:
        defaults |= {name: getattr(default, name) for name in hints}
    given = {name: value for name, value in defaults.items() if name in hints}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}: {suggestion(key, hints)}")
        given[key] = _made(hints[key], value, f"{where}.{key}", defaults.get(key))
    try:
        return kind(**arguments_of(kind, given, hints))
    except SettingError as error:
        raise SettingError(f"{where}.{error.name}", error.problem) from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _made(hint: Any, value: Any, where: str, default: Any) -> Any:
    """The value with settings dataclasses in place of mappings; everything else is for `checks.check` to judge."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, default)
    if typing.get_origin(hint) in (tuple, list) and isinstance(value, list | tuple):
        kind = typing.get_args(hint)[0]
        return [_made(kind, item, f"{where}[{index}]", None) for index, item in enumerate(value)]
    return value


def load(kind: type[Settings], path: str | Path) -> Settings:
    """Settings from a YAML file. Raises UserError if it is missing, no YAML, or does not fit."""
    try:
        values = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        raise UserError(f"cannot read the config file {path} ({error.strerror}): check --config") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: check --config") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({str(error).splitlines()[0]})") from error
    return from_dict(kind, {} if values is None else values, str(path))


class _Loader(yaml.SafeLoader):
    """YAML without a key given twice, of which the first value would silently not count."""

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


def save(settings: Any, path: str | Path) -> None:
    """Write settings as YAML, every one of them, so that the run can be done again."""
    with whole_file(path) as staging:
        staging.write_text(yaml.safe_dump(to_dict(settings), sort_keys=False))
