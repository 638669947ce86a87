"""Command-line flags from a settings dataclass.

A flag is the path of its setting in a config file, with dashes: `--lora.rank`, `--align-training.max-steps`. The groups
in `UNPREFIXED` leave the path out: `--learning-rate`. A switch takes no value: `--overwrite`, `--no-overwrite`. The
docstring below a field is its help text.

A field with the metadata `variants` (see `Variants`) is a choice among classes of settings, whose name is the flag's
value: `--defense vaccine --defense.rho 5`. A field with the metadata `listing` is a choice of a name: without a value,
the flag shows that text.

Parsing converts text to numbers and nothing else. Values become a nested mapping, as from a config file, and are
checked by the settings themselves, so that a mistake has the same message wherever it is made.
"""

import argparse
import contextlib
import dataclasses
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from simple_parsing.docstring import get_attribute_docstring

from secvec_jax.checks import complete, defaults_of, hints_of, is_settings
from secvec_jax.config import settings_class
from secvec_jax.errors import UserError

UNPREFIXED = frozenset({"training", "phase1", "sizes", "asking"})
"""Groups whose flags are the plain names of their settings."""

REQUIRED = dataclasses.MISSING
"""The default of a setting that must be given."""


@dataclasses.dataclass(frozen=True)
class Variants:
    """Settings of the choice above; each applies to the choices that its help names.

    classes: the settings of each choice, by its name. listing: the text that describes them all, which the flag shows
    without a value, or with the value list.
    """

    classes: Mapping[str, type]
    listing: Callable[[], str]


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting as it is given on the command line.

    path: where the setting is in a config file. name: the flag, or None for a positional argument. hint: its declared
    type. default: REQUIRED if there is none. help: what it does. listing: the text that it shows without a value.
    """

    path: tuple[str, ...]
    name: str | None
    hint: Any
    default: Any
    help: str
    listing: Callable[[], str] | None = None

    @property
    def key(self) -> str:
        """The setting in a config file: `training.max_steps`."""
        return ".".join(self.path)

    @property
    def is_switch(self) -> bool:
        return _scalar(self.hint) is bool or settings_class(self.hint) is not None

    @property
    def takes_several(self) -> bool:
        return typing.get_origin(_plain(self.hint)) is tuple

    @property
    def metavar(self) -> str:
        """The placeholder for the value in help texts: N or X for a number, the choices, or the setting's name."""
        kind = _scalar(self.hint)
        if typing.get_origin(kind) is Literal:
            return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
        name = self.path[-1].upper()
        if self.takes_several:
            name = name.rpartition("_")[2].removesuffix("S")
        return {int: "N", float: "X"}.get(kind, name)

    @property
    def shown_default(self) -> str:
        """The default as it would be given; empty if there is none to give."""
        if self.default is REQUIRED or self.default is None or isinstance(self.default, bool):
            return ""
        if dataclasses.is_dataclass(self.default):
            return ""
        several = self.default if isinstance(self.default, tuple) else (self.default,)
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in several)


@dataclasses.dataclass(frozen=True)
class Group:
    """Flags that are shown together: those of a settings class, or of one that is nested in it."""

    path: tuple[str, ...]
    settings: type
    flags: tuple[Flag, ...]


def groups(settings: type) -> list[Group]:
    """The flags of a settings class, and those of each class nested in it, in the order of their fields."""
    all_groups = list(_groups(settings, None, ()))
    names = [flag.name for group in all_groups for flag in group.flags if flag.name is not None]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{settings.__name__} has two settings for {', '.join(sorted(twice))}")
    return all_groups


def _groups(settings: type, default: Any, path: tuple[str, ...]) -> Iterator[Group]:
    hints, flags, nested_groups = hints_of(settings), [], []
    defaults = defaults_of(settings)
    for field in dataclasses.fields(settings):
        hint, value = hints[field.name], defaults.get(field.name, REQUIRED)
        if default is not None:
            value = getattr(default, field.name)
        if is_settings(value):
            value = complete(value)
        here = (*path, field.name)
        variants = field.metadata.get("variants")
        if variants is not None:
            flags.append(Flag((*here, "name"), _flag(here), str, None, help_of(settings, field.name), variants.listing))
            nested_groups.append(Group(here, Variants, tuple(_variant_flags(variants, here))))
            continue
        nested = settings_class(hint)
        if nested is not hint:  # a value, or optional settings, which have a separate switch
            name = None if field.metadata.get("positional") else _flag(here)
            listing = field.metadata.get("listing")
            flags.append(Flag(here, name, hint, value, help_of(settings, field.name), listing))
        if nested is not None:
            nested_default = value if is_settings(value) else complete(nested())
            nested_groups += list(_groups(nested, nested_default, here))
    yield Group(path, settings, tuple(flags))
    yield from nested_groups


def _variant_flags(variants: Variants, path: tuple[str, ...]) -> Iterator[Flag]:
    """A flag for each setting that any of the classes has; its help names these classes, with their defaults."""
    hints: dict[str, Any] = {}
    meanings: dict[str, dict[str, list[str]]] = {}
    for name, settings in variants.classes.items():
        defaults = defaults_of(settings)
        for setting, hint in hints_of(settings).items():
            if _scalar(hints.setdefault(setting, hint)) is not _scalar(hint):
                raise ValueError(f"{setting} has two types: of {name} and of another of {', '.join(variants.classes)}")
            shown = Flag((setting,), None, hint, defaults[setting], help_of(settings, setting))
            default = f" (default: {shown.shown_default})" if shown.shown_default else ""
            meanings.setdefault(setting, {}).setdefault(shown.help + default, []).append(name)
    for setting, hint in hints.items():
        text = "; ".join(f"{', '.join(names)}: {meaning}" for meaning, names in meanings[setting].items())
        yield Flag((*path, setting), _flag((*path, setting)), hint, None, text)


def _flag(path: tuple[str, ...]) -> str:
    shown = [part for part in path[:-1] if part not in UNPREFIXED] + [path[-1]]
    return "--" + ".".join(shown).replace("_", "-")


def help_of(settings: type, field: str) -> str:
    """The docstring below a field, on one line."""
    return " ".join(get_attribute_docstring(settings, field).docstring_below.split())


def summary_of(settings: type) -> str:
    """The first sentence of a settings class's docstring, without its period."""
    return (settings.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add the flags of a settings class to the parser, in titled groups.

    A class that was added before, such as the training of another phase, is described in one line.
    """
    shown: dict[type, Group] = {}
    for group in groups(settings):
        first = shown.setdefault(group.settings, group)
        title = group.path[-1].replace("_", " ") if group.path else "settings"
        description = summary_of(group.settings) if group.path else None
        if first is not group:
            description = textwrap.fill(_difference(group, first), 100)
        section = parser.add_argument_group(title, description)
        _add_group(section, group, hidden=first is not group)


def add_group(section: Any, settings: type) -> None:
    """Add the flags of a settings class, one without nested settings, to a group of a parser."""
    for group in groups(settings):
        _add_group(section, group, hidden=False)


def _add_group(section: Any, group: Group, hidden: bool) -> None:
    for flag in sorted(group.flags, key=lambda flag: flag.default is not REQUIRED):
        _add(section, flag, hidden)


def _difference(group: Group, first: Group) -> str:
    """The description of a group whose settings are those of another, with other defaults."""
    changed = [f"{flag.name} {flag.shown_default or flag.default}" for flag, before in zip(group.flags, first.flags)
               if flag.default != before.default]  # fmt: skip
    prefixes = [(_flag((*each.path, "x")).removesuffix("x")) for each in (group, first)]
    defaults = f", with these defaults: {', '.join(changed)}" if changed else ""
    return f"{prefixes[0]}NAME: the same settings as {prefixes[1]}NAME{defaults}"


def _add(section: Any, flag: Flag, hidden: bool) -> None:
    default = f" (default: {flag.shown_default})" if flag.shown_default else ""
    options: dict[str, Any] = {
        "dest": flag.key,
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS if hidden else (flag.help + default).replace("%", "%%").strip(),
    }
    if flag.listing is not None:
        section.add_argument(flag.name, metavar="NAME", nargs="?", action=_Choice, listing=flag.listing, **options)
    elif settings_class(flag.hint) is not None:
        section.add_argument(flag.name, action=_Group, **options)
    elif flag.is_switch:
        section.add_argument(flag.name, action=argparse.BooleanOptionalAction, **options)
    elif flag.name is None:
        del options["dest"]
        section.add_argument(flag.key, metavar=flag.metavar, nargs=None if flag.default is REQUIRED else "?", **options)
    else:
        several: dict[str, Any] = {"nargs": "+", "action": _Several} if flag.takes_several else {}
        section.add_argument(flag.name, metavar=flag.metavar, type=_converter(flag.hint), **several, **options)


class _Choice(argparse.Action):
    """The name of a choice; without one, or with the word list, all choices are shown and the program ends."""

    def __init__(self, *arguments: Any, listing: Callable[[], str], **options: Any):
        super().__init__(*arguments, **options)
        self._listing = listing

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values in (None, "list"):
            with contextlib.suppress(BrokenPipeError):  # as where it is shown by `head`
                print(self._listing(), flush=True)
            parser.exit()
        setattr(namespace, self.dest, values)


class _Several(argparse.Action):
    """The values of a list. A second flag of the name is refused: it would replace the first one's values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"{option_string} is given twice: give all values after one, {option_string} ONE TWO")
        setattr(namespace, self.dest, values)


class _Group(argparse.BooleanOptionalAction):
    """A switch for settings that may be left out: `--task-lora` takes their defaults, `--no-task-lora` none of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, None if str(option_string).startswith("--no-") else {})


def _converter(hint: Any) -> Any:
    """Convert the text of a value: `none` where a setting may be None, and numbers; other text stays as it is."""
    kind = _scalar(hint)
    optional = type(None) in typing.get_args(_plain(hint))

    def convert(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        for number in (int, float) if kind is int else (float,) if kind is float else ():
            try:
                return number(text)
            except ValueError:
                continue
        return text

    return convert


def _plain(hint: Any) -> Any:
    """A declared type without its bounds."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _scalar(hint: Any) -> Any:
    """The type of one value: int for `tuple[PositiveInt, ...]` and for `PositiveInt | None`."""
    hint = _plain(hint)
    if typing.get_origin(hint) is Literal or not typing.get_args(hint):
        return hint
    options = [option for option in typing.get_args(hint) if option not in (type(None), Ellipsis)]
    return _scalar(options[0])


def mapping(given: argparse.Namespace) -> dict[str, Any]:
    """The parsed flags as a nested mapping: {"training": {"max_steps": 3}}.

    Raises UserError if a group of settings is both switched off and set.
    """
    values: dict[str, Any] = {}
    for key, value in sorted(vars(given).items()):  # a group before its settings
        *path, name = key.split(".")
        group = values
        for part in path:
            group = group.setdefault(part, {})
            if group is None:
                raise UserError(f"--no-{part.replace('_', '-')} and {_flag(tuple(key.split('.')))} exclude each other")
        group[name] = value
    return values


def spelled_out(settings: type, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Values from a file in the form that flags are merged with: a choice given as a name becomes {"name": NAME}.

    If the flags name another choice, the settings of the file's choice are left out.
    """
    spelled = dict(values)
    for field in dataclasses.fields(settings):
        if "variants" in field.metadata and field.name in values:
            chosen = values[field.name]
            chosen = {"name": chosen} if isinstance(chosen, str) else chosen
            another = given.get(field.name, {}).get("name")
            is_another = another is not None and isinstance(chosen, dict) and chosen.get("name") != another
            spelled[field.name] = {} if is_another else chosen
    return spelled


def required(settings: type) -> Sequence[Flag]:
    """The flags that must be given."""
    return [flag for group in groups(settings) for flag in group.flags if flag.default is REQUIRED]
