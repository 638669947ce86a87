"""Runs a verb from the command line: what train.py, eval.py and the console command `secvec` share.

A verb is a dataclass of settings and a function that takes them. `--config FILE` reads settings from YAML; flags (see
`flags`) override them, and the dataclass checks the result. The devices to run on (`distributed.Cluster`) are not
settings of a run, and may change when it is resumed. A user's mistake is reported in one line, with exit code 2.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import re
import shlex
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

import secvec_jax
from secvec_jax import config, flags, presets
from secvec_jax.assets import cache_dir
from secvec_jax.checks import MISSING, SettingError
from secvec_jax.distributed import Cluster, begin_ending, is_clustered, lost_process, report_failure, start_cluster
from secvec_jax.errors import UserError
from secvec_jax.files import system_error
from secvec_jax.printable import one_line, printable
from secvec_jax.redaction import redact
from secvec_jax.suggestions import suggestion
from secvec_jax.terminal import Console, open_standard_streams, print_any_character

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


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


def program(description: str, verbs: Verbs) -> NoReturn:
    """Run the verb that the process was started with, and end the process with its exit code."""
    if jax.config.values["jax_compilation_cache_dir"] is None:  # a resumed run need not compile again
        with contextlib.suppress(UserError):  # without a home folder it must
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    open_standard_streams()
    print_any_character()
    _show_log()
    caught = _catch_ctrl_c()
    try:
        code = main(description, verbs, interrupted=lambda: bool(caught))
    except Exception as error:
        if not is_clustered():
            raise
        begin_ending()
        traceback.print_exc()
        report_failure(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        code = 1
    if code == INTERRUPTED or (code and is_clustered()):
        # Everything is saved by now, and with JAX loaded the interpreter's shutdown was seen to crash (SIGSEGV). In a
        # cluster it would wait for the other processes, which have ended or never will.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _catch_ctrl_c() -> list[int]:
    """Make Ctrl-C raise KeyboardInterrupt and add to the list, since some libraries turn it into another error.

    Where it is ignored, as in a background job of a shell, it stays ignored.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, note)
    return caught


def main(
    description: str,
    verbs: Verbs,
    arguments: Sequence[str] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> int:
    """Run the verb that the arguments name and return the exit code (2: a mistake of the user, 130: interrupted).

    A verb that returns an int sets the code itself.

    interrupted: whether Ctrl-C was pressed, for errors that libraries raise instead of KeyboardInterrupt.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # transformers is only used for its tokenizers and need not warn that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        _refuse_credentials(arguments)
        verb = verbs[_verb_of(description, verbs, arguments)]
        settings_class, function = verb.load()
        settings, cluster = parse(verb, settings_class, arguments)
        if cluster is not None:
            start_cluster(cluster, {"the command": arguments[0], **_by_flag(settings)})
        settings = _with_default_preset(verb, settings, arguments)
        code = function(settings, shlex.join([*_command(), *arguments]))
        return code if isinstance(code, int) else 0
    except Exception as error:
        if interrupted():
            return _stopped()
        if isinstance(error, UserError):
            return _fail(str(error), getattr(error, "__notes__", ()))
        if is_clustered() and (lost := lost_process()) is not None:  # the error is only how JAX noticed
            return _fail(lost)
        if system_error(error) is not None:
            return _fail(_of_the_system(error))
        if _is_out_of_memory(error):
            return _fail(f"out of memory ({error}): {_SMALLER}")
        raise
    except KeyboardInterrupt:
        return _stopped()


_SMALLER = "choose smaller sizes (--batch-size, --max-seq-len, the rank of a LoRA), or a device with more memory"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or a device could not provide the memory that was asked for."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def _command() -> list[str]:
    """The words that start this program: `python train.py`, or `secvec` where it is installed."""
    script = sys.argv[0]
    return ["python", script] if script.endswith(".py") else [Path(script).name or "python"]


def _stopped() -> int:
    begin_ending()
    Console(stderr=True).print("stopped: rerun the same command to resume")
    report_failure("it was interrupted", interrupted=True)
    return INTERRUPTED


class _Shown(logging.Handler):
    """Shows the package's log messages on the screen, warnings marked as such."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print(mark + printable(record.getMessage(), keep="\n"), file=sys.stderr)


def _show_log() -> None:
    log = logging.getLogger("secvec_jax")
    log.setLevel(logging.INFO)
    log.addHandler(_Shown())
    log.propagate = False  # else other packages' handlers would show it again
    # Orbax and its tasks log the traceback of an error before it is raised here.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)


def _of_the_system(error: Exception) -> str:
    """A line for an error of the system, such as a full disk, with the file that it is about, if that is known."""
    name = getattr(error, "filename", None)
    about = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
    return f"{about}{system_error(error)}: correct that and rerun the same command; no partial files were kept"


def _fail(message: str, notes: Sequence[str] = ()) -> int:
    """Report an error in one line, after the notes that it has, and return the exit code."""
    line = redact(one_line(message))
    begin_ending()
    with contextlib.suppress(OSError):  # the exit code still says so where no line can be written
        for note in notes:
            print(redact(one_line(note)), file=sys.stderr)
        print(f"error: {line}", file=sys.stderr, flush=True)
    report_failure(line)
    return 2


def _refuse_credentials(arguments: Sequence[str]) -> None:
    """Raise UserError before an argument with a password or a key is shown or written to a run's files."""
    for argument in arguments:
        if redact(argument) != argument:
            raise UserError(
                f"{redact(argument)} contains a password or a key, and runs record their command: use an environment "
                "variable instead (for a judge's key: OPENAI_API_KEY)"
            )


def _verb_of(description: str, verbs: Verbs, arguments: list[str]) -> str:
    """The verb that the arguments begin with. Raises UserError if they do not, and SystemExit after --help."""
    program = " ".join(_command())
    width = max(map(len, verbs))
    listed = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in verbs.items())
    overview = _Parser(
        prog=program,
        usage="%(prog)s VERB [options]",
        description=_filled(description),
        formatter_class=_HelpFormatter,
        epilog=f"verbs:\n{listed}\n\nRun `{program} VERB --help` for all options of a verb.".replace("%", "%%"),
    )
    overview.add_argument("--version", action="version", version=f"secvec_jax {secvec_jax.__version__}",
                          help="show the version and exit")  # fmt: skip
    overview.add_argument("verb", nargs="?", metavar="VERB", help="what to do: one of the verbs below")
    verb = overview.parse_args(arguments[:1]).verb
    if verb is None:
        overview.error(f"no verb: use one of {', '.join(verbs)}")
    if verb not in verbs:
        overview.error(f"unknown verb {verb!r}: {suggestion(verb, verbs)}")
    return verb


def parse(verb: Verb, settings: type, arguments: Sequence[str]) -> tuple[Any, Cluster | None]:
    """The settings, of this class, and the devices that the verb and its flags name; None if it takes no devices.

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
    if (found := presets.preset_of(settings, values)) is not None:
        preset, below = found
        values = flags.merged(dict(below), values)
        devices = ({"mesh": preset.mesh} if verb.on_devices and preset.mesh else {}) | devices
    checked_settings = _checked(settings, values, given, path)
    cluster = _checked(Cluster, devices, argparse.Namespace(**devices), None) if verb.on_devices else None
    return checked_settings, cluster


def _with_default_preset(verb: Verb, settings: Any, arguments: Sequence[str]) -> Any:
    """The settings under the preset that they choose themselves where none is named (see `recipes.preset_choice`).

    A preset that contradicts what was asked for, such as a task LoRA where all weights are to be trained, is not taken.
    Raises UserError if the preset that is named is not for the model.
    """
    choose = getattr(settings, "default_preset", None)
    chosen = None if choose is None else choose()
    if chosen is None:
        return settings
    with contextlib.suppress(UserError):
        under_preset = parse(verb, type(settings), [*arguments, "--preset", chosen])[0]
        if presets.holds(under_preset):
            return under_preset
    return settings


def _by_flag(settings: Any) -> dict[str, Any]:
    """The settings by the names of their flags, as plain values."""
    names = {flag.key: flag.name or flag.metavar for group in flags.groups(type(settings)) for flag in group.flags}
    return {names.get(key, key): value for key, value in config.flat(config.to_dict(settings)).items()}


def _parser(name: str, verb: Verb, settings: type) -> "_Parser":
    prog = " ".join([*_command(), name])
    needed = [f"{flag.name} {flag.metavar}{' ...' if flag.takes_several else ''}" if flag.name else flag.metavar
              for flag in flags.required(settings)]  # fmt: skip
    examples = "".join(f"\n  {prog} {example}" for example in verb.examples)
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *needed, "[options]"]),
        description=_filled(settings.__doc__ or verb.summary),
        epilog=f"examples:{examples}".replace("%", "%%") if examples else None,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,  # a flag of a later version would change what an abbreviation means
    )
    parser.add_argument("--config", metavar="FILE", help="read settings from a YAML file, such as a run's config.yaml")
    flags.add_flags(parser, settings)
    if verb.on_devices:
        devices = parser.add_argument_group("devices", flags.summary_of(Cluster))
        flags.add_group(devices, Cluster)
    return parser


def _with_file(path: str, values: dict[str, Any], settings: type) -> dict[str, Any]:
    """The values, over those of the YAML file. Raises UserError if the file holds no mapping."""
    read = config.read(path)
    if not isinstance(read, dict):
        raise UserError(f"{path} must be a mapping of settings, not {type(read).__name__}")
    return flags.merged(flags.spelled_out(settings, read, values), values)


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


def _refuse_switch_values(parser: "_Parser", arguments: Sequence[str]) -> None:
    """Raise UserError for a value after a switch, as in `--overwrite true`, which other programs accept."""
    switches = {name for action in parser._actions if isinstance(action, argparse.BooleanOptionalAction)
                for name in action.option_strings}  # fmt: skip
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, _ = argument.partition("=")
        if name in switches and (equals or following.lower() in ("true", "false")):
            positive = name.replace("--no-", "--", 1)
            raise UserError(f"{name} takes no value: write {positive}, or --no-{positive.removeprefix('--')}")


def _filled(text: str) -> str:
    """Paragraphs wrapped to the width of a help text."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
    return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs).replace("%", "%%")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's help, its column of flags wide enough for most."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=32, **options)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError and suggests the closest flag."""

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Show the usage and raise UserError for arguments that the parser does not know."""
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        flag = next((argument for argument in unknown if argument.startswith("-")), None)
        if flag is None:
            self.error(f"unknown argument {unknown[0]!r}: settings are given as --NAME VALUE")
        name = flag.partition("=")[0]
        closest = suggestion(name, known)
        self.error(f"unknown flag {name}: {closest if closest.startswith('did') else 'see --help for all flags'}")

    def error(self, message: str) -> NoReturn:
        print(printable(self.format_usage(), keep="\n"), end="", file=sys.stderr)
        raise UserError(message)
