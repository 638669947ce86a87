"""Settings as small dataclasses that check themselves, and their files. Knows no JAX.

The comment under a field is its help text on the command line.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from secvec_jax.errors import UserError
from secvec_jax.files import whole_file

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Training:
    """How parameters move."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd keeps small gradients small, which security vectors rely on; adamw rescales them to full steps"""
    learning_rate: float = 1e-3
    """the peak of the schedule"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls after the warm-up, to a tenth of the peak"""
    warmup_steps: int = 3
    """steps in which the learning rate rises from zero"""
    momentum: float = 0.9
    """of sgd"""
    weight_decay: float = 0.0
    """of adamw"""
    clip: float = 0.0
    """the largest gradient norm; 0 does not clip"""
    epochs: int = 1
    """passes over the rows"""
    steps: int | None = None
    """optimizer steps, in place of epochs"""
    lines: int = 2
    """packed lines in a batch"""
    length: int | None = None
    """tokens in a packed line, and the most of a row; left out: 256, 512, 1024 or 2048, as the longest row needs"""
    long_rows: Literal["truncate", "drop", "refuse"] = "truncate"
    """of rows longer than a line: truncate the answer, drop the row, or refuse the data; what is cut or dropped is
    counted and reported"""
    control_tokens: Literal["text", "tokens", "refuse"] = "text"
    """of control tokens that a row spells, such as <|im_end|>: text: learn the characters; tokens: learn the tokens, as
    the rows' author must have meant; refuse: an error that names the row"""
    accumulate: int = 1
    """batches per optimizer step"""
    remat: Literal["none", "dots", "attention", "full"] = "full"
    """what the backward pass computes again to save memory: none: nothing; dots: all but matrix products; attention:
    all but a fused attention kernel; full: whole layers"""
    share_beginnings: bool | None = None
    """whether tokens with which all rows begin stand once in a line; TPUs' fused attention cannot, so: not on TPUs"""
    seed: int = 0
    """of the order of rows and of fresh vectors"""
    save_every_seconds: float = 120.0
    """time between two checkpoints"""
    keep_checkpoints: int = 2
    """how many of the newest are kept while the training runs"""
    best: str | None = None
    """a metric of metrics.jsonl, such as loss/all: keep the checkpoint where it was lowest, and end with that one"""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "lines", "length", "accumulate", "save_every_seconds",
                     "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be greater than 0")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}: give at least 1, or leave it out to count epochs")


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain lists, dicts and scalars, complete."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(settings))


def from_dict(kind: type[Settings], values: dict[str, Any], where: str = "config") -> Settings:
    """The settings that `values` spell; what is left out keeps its default.

    Raises UserError for an unknown key (naming the nearest known one) and for a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of settings, not {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    given = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(hints)}"
            raise UserError(f"{where}: unknown key {key!r}: {hint}")
        given[key] = _typed(hints[key], value, f"{where}.{key}")
    try:
        return kind(**given)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise UserError(f"{where} is {value!r}: use one of {', '.join(map(str, options))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        return _typed(next(option for option in options if option is not type(None)), value, where)
    if origin in (tuple, list):
        if isinstance(value, str) and options[0] is str:
            value = [value]
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}: give a list")
        return origin(_typed(options[0], item, where) for item in value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}: it must be {hint.__name__}")
    return value


def load(kind: type[Settings], path: str | Path) -> Settings:
    """Settings from a YAML file. Raises UserError if it is missing, no YAML, or does not fit."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the config file {path} ({error.strerror}): check --config") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: check --config") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML ({str(error).splitlines()[0]})") from error
    return from_dict(kind, values or {}, str(path))


def save(settings: Any, path: str | Path) -> None:
    """Write settings as YAML, every one of them, so that the run can be done again."""
    with whole_file(path) as staging:
        staging.write_text(yaml.safe_dump(to_dict(settings), sort_keys=False))
