"""Verbs from settings dataclasses: what train.py and eval.py share.

A verb is a dataclass of settings and a function that takes it. `--config FILE` fills in the settings from YAML; what
is given on the command line counts more. All of them are checked by the dataclasses themselves (see `checks`), so that
a mistake is refused in the same words wherever it is made. Which machines and devices do the work
(`distributed.Cluster`) is no setting of a run: it may change from one start to the next. A user's mistake is told in
one line and ends with exit code 2.
"""

import argparse
import dataclasses
import errno
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import jax
from rich.console import Console
from simple_parsing import ArgumentParser, DashVariant

from secvec_jax import config
from secvec_jax.assets import cache_dir
from secvec_jax.checks import check, suggestion
from secvec_jax.distributed import Cluster, start_cluster
from secvec_jax.errors import UserError
from secvec_jax.redaction import redact

Verb = tuple[type, Callable[[Any, str], Any]]
"""The settings of a verb, and the function that takes them and the command line as it was given."""

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def program(description: str, verbs: dict[str, Verb]) -> NoReturn:
    """Run the verb that the process was started with and end the process with its exit code."""
    if jax.config.values["jax_compilation_cache_dir"] is None:  # a run that goes on need not compile again
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    _show_log()
    caught = _catch_ctrl_c()
    code = main(description, verbs, interrupted=lambda: bool(caught))
    if code == INTERRUPTED:
        # Everything is saved by now, and with JAX loaded the interpreter's own end was seen to crash (SIGSEGV).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _catch_ctrl_c() -> list[int]:
    """From now on Ctrl-C raises KeyboardInterrupt, and is noted in the list: some libraries raise another error then.

    Where it is ignored, as in a job of a shell's background, it stays so.
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
    verbs: dict[str, Verb],
    arguments: Sequence[str] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> int:
    """Run the verb that the arguments name; returns the exit code (2: a mistake of the user, 130: interrupted).

    interrupted: whether Ctrl-C came, for errors that others make of it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # transformers reads tokenizers for us and need not say that it found no torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        _refuse_credentials(arguments)
        settings, cluster, function = _parse(description, verbs, arguments)
        if cluster is not None:
            start_cluster(cluster)
        function(settings, shlex.join(["python", *sys.argv]))
        return 0
    except Exception as error:
        if interrupted():
            return _stopped()
        if isinstance(error, UserError):
            return _fail(str(error))
        if not _disk_is_full(error):
            raise
        return _fail("the disk is full: free some space and give the same command again; nothing half-written is kept")
    except KeyboardInterrupt:
        return _stopped()


def _stopped() -> int:
    Console(stderr=True).print("stopped: the same command goes on from here")
    return INTERRUPTED


class _Shown(logging.Handler):
    """The package's log on the screen: what is notable as it is, and warnings as such."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print(mark + record.getMessage(), file=sys.stderr)


def _show_log() -> None:
    log = logging.getLogger("secvec_jax")
    log.setLevel(logging.INFO)
    log.addHandler(_Shown())
    log.propagate = False  # other packages' handlers would show it once more


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says so; only Python's own carry a number."""
    if error is None:
        return False
    told = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    return told or _disk_is_full(error.__cause__ or error.__context__)


def _fail(message: str) -> int:
    print(f"error: {redact(' '.join(message.split()))}", file=sys.stderr)
    return 2


def _refuse_credentials(arguments: Sequence[str]) -> None:
    """Raises UserError before an argument with a password or a key is shown, or written into a run's files."""
    for argument in arguments:
        if redact(argument) != argument:
            raise UserError(
                f"{redact(argument)} carries a password or a key, and runs record their command: leave it out, and use "
                "an environment variable (a judge's key: OPENAI_API_KEY)"
            )


def _parse(
    description: str, verbs: dict[str, Verb], arguments: list[str]
) -> tuple[Any, Cluster | None, Callable[[Any, str], Any]]:
    parser = _Parser(description=description, add_option_string_dash_variants=DashVariant.DASH)
    choices = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    given = _config_of(verbs, arguments)
    for name, (kind, _) in verbs.items():
        summary = (kind.__doc__ or "").strip()
        verb = choices.add_parser(
            name,
            help=summary.splitlines()[0],
            description=summary,
            add_option_string_dash_variants=DashVariant.DASH,
            allow_abbrev=False,  # a flag that comes with a later version would change what a shortened one means
        )
        verb.add_argument("--config", metavar="FILE", help="a YAML file of settings, such as a run's config.yaml")
        verb.add_arguments(kind, dest="settings", default=given.get(name, kind()))
        if not _has_mesh(kind):
            verb.add_arguments(Cluster, dest="cluster")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        choices.choices[parsed.verb].refuse(unknown)
    kind, function = verbs[parsed.verb]
    return parsed.settings, None if _has_mesh(kind) else parsed.cluster, function


class _Parser(ArgumentParser):
    """An argument parser that leaves it to the settings to judge values, and that knows the nearest flag.

    The methods with an underscore are argparse's own, and have been the same since it came to Python.
    """

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Show the usage and raise UserError for arguments that the parser does not know."""
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        flag = next((argument for argument in unknown if argument.startswith("-")), None)
        if flag is None:
            self.error(f"unknown argument {unknown[0]!r}: settings are given as --NAME VALUE")
        name = flag.partition("=")[0]
        nearest = suggestion(name, known)
        self.error(f"unknown flag {name}: {nearest if nearest.startswith('did') else 'see --help for all flags'}")

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise UserError(message)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            return text

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"unknown verb {value!r}: {suggestion(value, action.choices)}")
        if action.choices is not None and value not in action.choices:
            check(Literal[tuple(action.choices)], value, action.dest.rpartition(".")[2])


def _has_mesh(kind: type) -> bool:
    """Whether a verb's mesh is a setting of its own, of devices that are not here."""
    return any(field.name == "mesh" for field in dataclasses.fields(kind))


def _config_of(verbs: dict[str, Verb], arguments: list[str]) -> dict[str, Any]:
    """The settings in the file that --config names, by verb."""
    verb = next((argument for argument in arguments if argument in verbs), None)
    for index, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            path = argument.partition("=")[2] or (arguments[index + 1 : index + 2] or [""])[0]
            if verb is not None and path:
                return {verb: config.load(verbs[verb][0], path)}
    return {}
