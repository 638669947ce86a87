"""The settings of a verb from its arguments: flags over a YAML file over a preset over the defaults."""

import argparse
import contextlib
import dataclasses
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from secvec_jax import config, flags, presets
from secvec_jax.checks import MISSING, SettingError
from secvec_jax.distributed import Cluster
from secvec_jax.errors import UserError
from secvec_jax.printable import printable
from secvec_jax.suggestions import suggestion


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    summary: one line for the list of verbs. load: imports and returns the class of its settings and the function that
    takes them and the command as it was typed. examples: arguments that follow the verb, shown by --help.
    on_devices: whether it takes the flags of `Cluster`.
    """

    summary: str
    load: Callable[[], tuple[type, Callable[[Any, str], Any]]]
    examples: tuple[str, ...] = ()
    on_devices: bool = True


Verbs = Mapping[str, Verb]


def typed_command() -> list[str]:
    """The words that start this program: `python train.py`, or `secvec` where it is installed."""
    script = sys.argv[0]
    return ["python", script] if script.endswith(".py") else [Path(script).name or "python"]


def parse(verb: Verb, settings: type, arguments: Sequence[str]) -> tuple[Any, Cluster | None]:
    """The settings of the verb, and its devices, which are None if it takes none.

    Raises UserError for a mistake in the flags or in the file that --config names, and SystemExit after --help.
    """
    name, *rest = arguments
    parser = _parser(name, verb, settings)
    _refuse_switch_values(parser, rest)
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        parser.refuse(unknown)
    path = given.config
    del given.config
    names = {flag.key: flag.name for group in flags.groups(Cluster) for flag in group.flags}
    devices = {key: value for key, value in vars(given).items() if verb.on_devices and key in names}
    for key in devices:
        delattr(given, key)
    values = flags.mapping(given)
    if path is not None:
        values = _with_file(path, values, settings)
    values_without_preset = values
    if (preset_and_settings := presets.preset_of(settings, values)) is not None:
        preset, below = preset_and_settings
        values = config.merged(dict(below), values)
        devices = ({"mesh": preset.mesh} if verb.on_devices and preset.mesh else {}) | devices
    try:
        checked_settings = _checked(settings, values, given, path)
    except UserError as error:
        if preset_and_settings is None or not _are_valid(settings, values_without_preset):
            raise
        preset_name = values["preset"]
        raise UserError(
            f"--preset {preset_name} does not fit the other settings ({error}): use --preset none"
        ) from error
    cluster = _checked(Cluster, devices, argparse.Namespace(**devices), None) if verb.on_devices else None
    return checked_settings, cluster


def with_default_preset(verb: Verb, settings: Any, arguments: Sequence[str]) -> Any:
    """The settings with the default preset applied, if they name none (see `recipes.preset_choice`).

    A preset that contradicts what was asked for, such as a task LoRA when training all weights, or that would change
    nothing, is not used. Raises UserError if a named preset is not for the model's size.
    """
    choose = getattr(settings, "default_preset", None)
    chosen = None if choose is None else choose()
    if chosen is None:
        return settings
    with contextlib.suppress(UserError):
        under_preset = parse(verb, type(settings), [*arguments, "--preset", chosen])[0]
        if presets.holds(under_preset) and not presets.set_otherwise(under_preset)[1]:
            return under_preset
    return settings


def by_flag(settings: Any) -> dict[str, Any]:
    """The settings by the names of their flags, as plain values."""
    names = {flag.key: flag.name or flag.metavar for group in flags.groups(type(settings)) for flag in group.flags}
    return {names.get(key, key): value for key, value in config.flat(config.to_dict(settings)).items()}


def _parser(name: str, verb: Verb, settings: type) -> "Parser":
    prog = " ".join([*typed_command(), name])
    needed = [f"{flag.name} {flag.metavar}{' ...' if flag.takes_several else ''}" if flag.name else flag.metavar
              for flag in flags.required(settings)]  # fmt: skip
    examples = "".join(f"\n  {prog} {example}" for example in verb.examples)
    parser = Parser(
        prog=prog,
        usage=" ".join([prog, *needed, "[options]"]),
        description=filled(settings.__doc__ or verb.summary),
        epilog=f"examples:{examples}".replace("%", "%%") if examples else None,
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # a flag of a later version would change what an abbreviation means
    )
    parser.add_argument(
        "--config", metavar="FILE", action=_Once, help="read settings from a YAML file, such as a run's config.yaml"
    )
    flags.add_flags(parser, settings)
    if verb.on_devices:
        devices = parser.add_argument_group("devices", flags.summary_of(Cluster))
        flags.add_group(devices, Cluster)
    return parser


class _Once(argparse.Action):
    """A value that may be given once: of two files, argparse would read the last alone."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice, and one file is read: put all settings into one file")
        setattr(namespace, self.dest, values)


def _with_file(path: str, values: dict[str, Any], settings: type) -> dict[str, Any]:
    """The values, merged over those of the YAML file. Raises UserError if the file is not a mapping."""
    read = config.read(path)
    if not isinstance(read, dict):
        raise UserError(f"{path} must be a mapping of settings, not {type(read).__name__}")
    return config.merged(flags.spelled_out(settings, read, values), values)


def _are_valid(settings: type, values: dict[str, Any]) -> bool:
    with contextlib.suppress(UserError):
        config.from_dict(settings, values)
        return True
    return False


def _checked(settings: type, values: dict[str, Any], given: argparse.Namespace, path: str | None) -> Any:
    """The settings, checked. Raises UserError that names the flag, or the file and the key, of an invalid value."""
    try:
        return config.from_dict(settings, values, where=path or "")
    except SettingError as error:
        key = error.name.removeprefix(f"{path}.")
        for group in flags.groups(settings):
            for flag in group.flags:
                if flag.key != re.sub(r"\[\d+\].*", "", key):
                    continue
                if error.problem == MISSING:
                    raise UserError(f"{flag.name or flag.metavar}{MISSING}: {flag.help}") from None
                if flag.key in vars(given):
                    raise UserError(f"{flag.name or flag.metavar}{error.problem}") from None
        raise


def _refuse_switch_values(parser: "Parser", arguments: Sequence[str]) -> None:
    """Raise UserError for a value after a switch, as in `--overwrite true`, which other programs accept."""
    switches = {name for action in parser._actions if isinstance(action, argparse.BooleanOptionalAction)
                for name in action.option_strings}  # fmt: skip
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, _ = argument.partition("=")
        if name in switches and (equals or following.lower() in ("true", "false")):
            positive = name.replace("--no-", "--", 1)
            raise UserError(f"{name} takes no value: write {positive}, or --no-{positive.removeprefix('--')}")


def filled(text: str) -> str:
    """Paragraphs wrapped to the width of a help text."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
    return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs).replace("%", "%%")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's help, its column of flags wide enough for most."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=32, **options)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError and suggests the closest flag."""

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Show the usage and raise UserError for arguments that the parser does not know."""
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        flag = next((argument for argument in unknown if argument.startswith("-")), None)
        if flag is None:
            self.error(f"unknown argument {unknown[0]!r}: use --NAME VALUE, and --NAME for a switch")
        name = flag.partition("=")[0]
        closest = suggestion(name, known)
        self.error(f"unknown flag {name}: {closest if closest.startswith('did') else 'see --help for all flags'}")

    def error(self, message: str) -> NoReturn:
        print(printable(self.format_usage(), keep="\n"), end="", file=sys.stderr)
        raise UserError(message)
