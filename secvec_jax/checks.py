"""Settings that check themselves: types, ranges and names, declared with the setting. Imports no JAX.

    @checked
    @dataclasses.dataclass(frozen=True)
    class Steps:
        count: PositiveInt = 3
        rate: PositiveFloat = 1e-3

`Steps(count=0)`, `Steps(rate="fast")` and `Steps(cuont=3)` raise a one-line UserError, whether the values come from
Python, a YAML file or the command line. `checked` also decorates functions, whose arguments it checks on each call.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from secvec_jax.arguments import shown
from secvec_jax.errors import UserError
from secvec_jax.suggestions import suggestion

Checked = TypeVar("Checked", bound=Callable[..., Any])


class SettingError(UserError):
    """An invalid setting: its name, which callers that read nested settings extend to a path, and the problem."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}{problem}")
        self.name, self.problem = name, problem


class Unset:
    """The type of `UNSET`, the value of a setting that was not set and is inherited (see `inherit`)."""

    def __repr__(self) -> str:
        return "UNSET"

    def __copy__(self) -> "Unset":
        return self

    def __deepcopy__(self, memo: Any) -> "Unset":
        return self


UNSET: Any = Unset()

MISSING = " is required"
"""The problem of a `SettingError` for a setting that was not given and has no default."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of a number; whatever its bounds, a number must be finite."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    other_than: float | None = None

    def hold(self, value: float) -> bool:
        """Whether the value is within the range."""
        return self.at_least <= value <= self.at_most and value > self.above and value != self.other_than

    def __str__(self) -> str:
        parts = []
        if self.above > -math.inf:
            parts.append(f"greater than {self.above:g}")
        if self.at_least > -math.inf:
            parts.append(f"at least {self.at_least:g}")
        if self.at_most < math.inf:
            parts.append(f"at most {self.at_most:.12g}")
        if self.other_than is not None:
            parts.append(f"other than {self.other_than:g}")
        return " and ".join(parts)


class NonEmpty:
    """A text or a list that must not be empty."""

    def hold(self, value: Any) -> bool:
        """Whether the value has any items."""
        return len(value) > 0

    def __str__(self) -> str:
        return "non-empty"


PositiveInt = Annotated[int, Bounds(at_least=1)]
NonNegativeInt = Annotated[int, Bounds(at_least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0)]
NonZeroFloat = Annotated[float, Bounds(other_than=0)]
Fraction = Annotated[float, Bounds(at_least=0, at_most=1)]
PositiveFraction = Annotated[float, Bounds(above=0, at_most=1)]
Seed = Annotated[int, Bounds(at_least=0, at_most=2**31)]
"""The range that JAX, NumPy and grain accept, with room for the offsets that parallel data streams add."""
Text = Annotated[str, NonEmpty()]
Texts = Annotated[tuple[str, ...], NonEmpty()]
"""At least one."""


def inherit(settings: Any, *bases: Any) -> Any:
    """The settings with each unset one taken from the first of `bases`, of the same class, that sets it."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if not any(value is UNSET for value in values.values()):
        return settings
    for base in bases:
        values = {name: getattr(base, name) if value is UNSET else value for name, value in values.items()}
    return type(settings)(**values)


def checked(target: Checked) -> Checked:
    """Decorate a dataclass or a function so that its arguments are checked against the declared types and bounds.

    NumPy numbers become Python numbers, and lists become tuples where tuples are declared. A nested settings object
    that leaves settings unset inherits them from the default of its field or argument, unless that is None. Types other
    than settings (models, rows, callables) are not checked. The decorated callable raises UserError.
    """
    return _checked_class(target) if isinstance(target, type) else _checked_function(target)


def hints_of(kind: Any) -> dict[str, Any]:
    """The declared types of a checked dataclass's settings, with their bounds."""
    checked_bases = [base for base in reversed(kind.__mro__) if "_hints" in vars(base)]
    if not checked_bases:
        return typing.get_type_hints(kind, include_extras=True)
    return {name: hint for base in checked_bases for name, hint in vars(base)["_hints"].items()}


def defaults_of(kind: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields; fields without one are required, and left out."""
    defaults = {}
    for field in dataclasses.fields(kind):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def implied_by(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of nested settings that depend on what is given: those of the class's static method `implied`."""
    implied = getattr(kind, "implied", None)
    return {} if implied is None else implied(given)


def arguments_of(kind: Any, given: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a dataclass, checked, and with its nested default settings completed.

    Raises SettingError for an invalid setting, and for one that is required and missing.
    """
    given, defaults = dict(given), defaults_of(kind) | implied_by(kind, given)
    for name, hint in hints.items():
        default = defaults.get(name)
        if name in given:
            if not (given[name] is UNSET and default is UNSET):
                given[name] = check(hint, given[name], name, default)
        elif is_settings(default):
            given[name] = complete(default)
        elif name not in defaults:
            raise SettingError(name, MISSING)
    return given


def _checked_class(kind: Any) -> Any:
    declared = {field.name for field in dataclasses.fields(kind)} & set(inspect.get_annotations(kind))

    def resolved(include_extras: bool) -> dict[str, Any]:
        hints = typing.get_type_hints(kind, localns={kind.__name__: kind}, include_extras=include_extras)
        return {name: hint for name, hint in hints.items() if name in declared}

    kind._hints, plain = resolved(True), resolved(False)
    kind.__annotations__ |= plain  # the argument parser and its help read plain types
    for field in dataclasses.fields(kind):
        field.type = plain.get(field.name, field.type)
    init, names = kind.__init__, [field.name for field in dataclasses.fields(kind) if field.init]
    all_hints = hints_of(kind)

    @functools.wraps(init)
    def checked_init(self: Any, *values: Any, **named: Any) -> None:
        given = dict(zip(names, values)) | named
        for name in named:
            if name not in all_hints:
                raise SettingError(kind.__name__, f" has no setting {name!r}: {suggestion(name, names)}")
        given = arguments_of(kind, given, all_hints)
        rest = [given.pop(name) for name in names[: len(values)]]
        init(self, *rest, *values[len(names) :], **given)

    kind.__init__ = checked_init
    return kind


def _checked_function(function: Callable[..., Any]) -> Any:
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    checked_hints = {
        name: hints[name] for name, parameter in signature.parameters.items()
        if name in hints and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }  # fmt: skip

    @functools.wraps(function)
    def checked_call(*values: Any, **named: Any) -> Any:
        bound = signature.bind(*values, **named)
        for name, hint in checked_hints.items():
            if name in bound.arguments:
                default = signature.parameters[name].default
                bound.arguments[name] = check(hint, bound.arguments[name], name, default)
        return function(*bound.args, **bound.kwargs)

    return checked_call


def is_settings(value: Any) -> bool:
    return hasattr(type(value), "_hints") and dataclasses.is_dataclass(value)


def complete(settings: Any, default: Any = None) -> Any:
    """The settings with each unset one taken from `default`, or else from the `base` of their class, if it has one."""
    bases = [base for base in (default, getattr(type(settings), "base", None)) if type(base) is type(settings)]
    return inherit(settings, *bases)


_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def check(hint: Any, value: Any, name: str, default: Any = None) -> Any:
    """The value, converted to its declared type. Raises SettingError if it has another type or is out of range."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = check(options[0], value, name, default)
        for bounds in options[1:]:
            if isinstance(bounds, Bounds | NonEmpty) and value is not None and not bounds.hold(value):
                given = shown(value) if isinstance(value, int) else repr(value)  # Python prints no huge number
                raise SettingError(name, f" is {given}: it must be {bounds}")
        return value
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in options):
            near = difflib.get_close_matches(str(value).lower(), [str(option).lower() for option in options], n=1)
            hint_text = f"did you mean {near[0]!r}? " if near else ""
            raise SettingError(name, f" is {value!r}: {hint_text}use one of {', '.join(map(str, options))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _one_of(options, value, name, default)
    if origin in (tuple, list) and options:
        return _items(origin, options, value, name)
    if hint in _NAMES:
        return _scalar(hint, value, name)
    if isinstance(hint, type) and hasattr(hint, "_hints"):
        if not isinstance(value, hint):
            raise SettingError(
                name, f" is {shown(value)}: pass {hint.__name__}(...), or a mapping of settings in a file"
            )
        return complete(value, default)
    if origin is not None and isinstance(value, str) and isinstance(origin, type) and issubclass(origin, Sequence):
        raise SettingError(name, f" is {value!r}: pass a list")
    return value


def _one_of(options: Sequence[Any], value: Any, name: str, default: Any) -> Any:
    if value is None and type(None) in options:
        return None
    others = [option for option in options if option is not type(None)]
    if default is None and len(others) < len(options) and is_settings(value) and type(value) in others:
        return value  # what it leaves unset depends on what else the function is given
    if len(others) == 1:
        return check(others[0], value, name, default)
    return value  # a choice among types that are not settings


def _items(kind: type, options: Sequence[Any], value: Any, name: str) -> Any:
    item = typing.get_args(options[0])[0] if typing.get_origin(options[0]) is Annotated else options[0]
    if isinstance(value, str | os.PathLike) and item is str:
        value = [value]
    if not isinstance(value, list | tuple):
        raise SettingError(name, f" is {shown(value)}: pass a list")
    several = kind is list or options[-1] is Ellipsis
    if not several and len(value) != len(options):
        raise SettingError(name, f" has {len(value)} items: pass {len(options)}")
    hints = [options[0]] * len(value) if several else options
    return kind(check(hint, each, f"{name}[{index}]") for index, (hint, each) in enumerate(zip(hints, value)))


def _scalar(kind: type, value: Any, name: str) -> Any:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is bool and type(value).__name__ in ("bool", "bool_"):  # NumPy's among them, without importing it
        return bool(value)
    if kind is int and number and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and number:
        return _finite(value, name)
    if kind is str and isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if "\0" in text:
            raise SettingError(name, f" is {shown(value)}: it cannot contain a null character")
        return text
    raise SettingError(name, f" is {shown(value)}: it must be {_NAMES[kind]}")


_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
"""Anything larger is infinite where it is used."""


def _finite(value: Any, name: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _LARGEST_FLOAT32:
        raise SettingError(name, f" is {shown(value)}: it must be a finite number")
    return number
