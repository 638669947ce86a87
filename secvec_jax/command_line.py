"""Runs a verb from the command line: what train.py, eval.py and the console command `secvec` share.

A verb is a dataclass of settings and a function that takes them. `--config FILE` reads settings from YAML; flags (see
`flags`) override them, and the dataclass checks the result. The devices to run on (`distributed.Cluster`) are not
settings of a run, and may change when it is resumed. A user's mistake is reported in one line, with exit code 2.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax

import secvec_jax
from secvec_jax.assets import cache_dir
from secvec_jax.distributed import begin_ending, is_clustered, lost_process, report_failure, start_cluster
from secvec_jax.errors import UserError
from secvec_jax.files import system_error
from secvec_jax.printable import one_line, printable
from secvec_jax.redaction import redact
from secvec_jax.suggestions import suggestion
from secvec_jax.terminal import Console, open_standard_streams, print_any_character
from secvec_jax.verb_arguments import (
    HelpFormatter,
    Parser,
    Verbs,
    by_flag,
    filled,
    parse,
    typed_command,
    with_default_preset,
)

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def program(description: str, verbs: Verbs, elsewhere: Mapping[str, str] | None = None) -> NoReturn:
    """Run the verb that the process was started with, and end the process with its exit code.

    elsewhere: other verbs, with the script that has each.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:  # a resumed run need not compile again
        with contextlib.suppress(UserError):  # without a home folder it must
            jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    open_standard_streams()
    print_any_character()
    _show_log()
    caught = _catch_ctrl_c()
    try:
        code = main(description, verbs, interrupted=lambda: bool(caught), elsewhere=elsewhere)
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
    elsewhere: Mapping[str, str] | None = None,
) -> int:
    """Run the verb that the arguments name and return the exit code (2: a mistake of the user, 130: interrupted).

    A verb that returns an int sets the code itself.

    interrupted: whether Ctrl-C was pressed, for errors that libraries raise instead of KeyboardInterrupt. elsewhere:
    other verbs, with the script that has each.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # transformers is only used for its tokenizers and need not warn that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        _refuse_credentials(arguments)
        verb = verbs[_verb_of(description, verbs, arguments, elsewhere or {})]
        settings_class, function = verb.load()
        settings, cluster = parse(verb, settings_class, arguments)
        if cluster is not None:
            start_cluster(cluster, {"the command": arguments[0], **by_flag(settings)})
        settings = with_default_preset(verb, settings, arguments)
        code = function(settings, shlex.join([*typed_command(), *arguments]))
        return code if isinstance(code, int) else 0
    except Exception as error:
        if interrupted():
            return _stopped()
        if isinstance(error, UserError):
            return _fail(str(error), getattr(error, "__notes__", ()))
        if is_clustered() and (lost := lost_process()) is not None:  # the error is only how JAX noticed
            return _fail(lost)
        if system_error(error) is not None:
            return _fail(_system_error_line(error))
        if _is_out_of_memory(error):
            return _fail(f"out of memory ({error}): {_SMALLER}")
        raise
    except KeyboardInterrupt:
        return _stopped()


_SMALLER = "choose smaller sizes (--batch-size, --max-seq-len, the rank of a LoRA), or a device with more memory"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or a device could not provide the memory that was asked for."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def _stopped() -> int:
    begin_ending()
    Console(stderr=True).print("stopped: rerun the same command to resume")
    report_failure("it was interrupted", interrupted=True)
    return INTERRUPTED


class _ScreenHandler(logging.Handler):
    """Shows the package's log messages on the screen, warnings marked as such."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print(mark + printable(record.getMessage(), keep="\n"), file=sys.stderr)


def _show_log() -> None:
    log = logging.getLogger("secvec_jax")
    log.setLevel(logging.INFO)
    log.addHandler(_ScreenHandler())
    log.propagate = False  # else other packages' handlers would show it again
    # Orbax and its tasks log the traceback of an error before it is raised here.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)


def _system_error_line(error: Exception) -> str:
    """A line for an error of the system, such as a full disk, with the file that it is about, if that is known."""
    name = getattr(error, "filename", None)
    about = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
    return f"{about}{system_error(error)}: correct that and rerun the same command; no partial files were kept"


def _fail(message: str, notes: Sequence[str] = ()) -> int:
    """Report an error in one line, after its notes, and return the exit code."""
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


def _verb_of(description: str, verbs: Verbs, arguments: list[str], elsewhere: Mapping[str, str]) -> str:
    """The verb that the arguments begin with. Raises UserError without a known one, and SystemExit after --help."""
    program = " ".join(typed_command())
    width = max(map(len, verbs))
    listed = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in verbs.items())
    overview = Parser(
        prog=program,
        usage="%(prog)s VERB [options]",
        description=filled(description),
        formatter_class=HelpFormatter,
        epilog=f"verbs:\n{listed}\n\nRun `{program} VERB --help` for all options of a verb.".replace("%", "%%"),
    )
    overview.add_argument("--version", action="version", version=f"secvec_jax {secvec_jax.__version__}",
                          help="show the version and exit")  # fmt: skip
    overview.add_argument("verb", nargs="?", metavar="VERB", help="what to do: one of the verbs below")
    verb = overview.parse_args(arguments[:1]).verb
    if verb is None:
        overview.error(f"no verb: use one of {', '.join(verbs)}")
    if verb not in verbs and verb in elsewhere:
        overview.error(f"{verb} is a verb of {elsewhere[verb]}: run python {elsewhere[verb]} {verb}")
    if verb not in verbs:
        overview.error(f"unknown verb {verb!r}: {suggestion(verb, verbs)}")
    return verb
