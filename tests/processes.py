"""Python programs in separate processes, for tests that kill, interrupt and join them.

An interpreter takes seconds to import JAX and transformers. These programs are forked instead, from one process a
session that has imported both and started nothing (`multiprocessing`'s fork server): each has its own devices, signals,
standard streams and end, as if it had been started from a shell.
"""

import atexit
import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pytest

from secvec_jax import command_line

ROOT = Path(__file__).parents[1]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.preload"])


class Program:
    """`python COMMAND...` in a process of its own, from the project's root; of the interface of `subprocess.Popen`.

    command: `-m MODULE ARG...`, `-c CODE ARG...` or `FILE ARG...`. environment: variables that it has besides ours;
    those that JAX reads when it is imported are too late. stdout and stderr are open text files until `communicate`.
    """

    def __init__(self, *command: object, **environment: str):
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        words = [str(word) for word in command]
        self._process = _FORKS.Process(target=_run, args=(words, environment, DupFd(out_end), DupFd(err_end)))
        self._process.start()
        os.close(out_end)
        os.close(err_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it still writes to both streams; waits for its end. Raises subprocess.TimeoutExpired."""
        if self.stdout.closed:
            return "", ""
        if not hasattr(self, "_readers"):
            self._read: dict[str, str] = {}
            self._readers = [
                threading.Thread(target=lambda name=name: self._read.update({name: getattr(self, name).read()}))
                for name in ("stdout", "stderr")
            ]
            for reader in self._readers:
                reader.start()
        self.wait(timeout)
        for reader in self._readers:
            reader.join()
        self.stdout.close()
        self.stderr.close()
        return self._read["stdout"], self._read["stderr"]


def _run(command: list[str], environment: dict[str, str], out: Any, err: Any) -> None:
    """The forked process: Python's own start of a program, with JAX imported already."""
    os.dup2(out.detach(), 1)
    os.dup2(err.detach(), 2)
    os.chdir(ROOT)
    os.environ |= environment
    if devices := environment.get("JAX_NUM_CPU_DEVICES"):
        import jax  # by the fork server, long before

        jax.config.update("jax_num_cpu_devices", int(devices))
    kind, *arguments = command
    code = 0
    try:
        if kind == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = command
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(*command: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """A program from its start to its end. Raises subprocess.TimeoutExpired, having killed it."""
    program = Program(*command, **environment)
    try:
        out, err = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess([str(word) for word in command], program.returncode, out, err)


def call(script: str, *arguments: str) -> tuple[int, str, str]:
    """A verb of train.py or eval.py in this process: its exit code and what it writes, (stdout, stderr)."""
    module = importlib.import_module(script.removesuffix(".py"))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [script, *arguments])
        code = command_line.main(module.__doc__, module.VERBS)
    return code, out.getvalue(), err.getvalue()


def call_in_a_process(function: Callable[[], None], **environment: str) -> None:
    """Call a module's function in a process of its own."""
    code = f"from {function.__module__} import {function.__name__}; {function.__name__}()"
    done = run("-c", code, **environment)
    assert done.returncode == 0, done.stderr


def call_as_compiled_for_users(function: Callable[[], None]) -> None:
    """Call a module's function in a process without the flags of conftest, under which two programs round alike."""
    call_in_a_process(function, XLA_FLAGS="")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cluster_flags(processes: int) -> list[list[str]]:
    """For each of so many processes the flags with which they meet as a cluster; none for one."""
    meet = ["--cluster", f"127.0.0.1:{free_port()}", "--processes", str(processes), "--process"]
    return [[*meet, str(process)] if processes > 1 else [] for process in range(processes)]


def cluster(*command: object, processes: int = 2) -> contextlib.AbstractContextManager[list[Program]]:
    """So many processes of a program that meet as a cluster; see `started`."""
    return started([(*command, *flags) for flags in cluster_flags(processes)])


@contextlib.contextmanager
def started(commands: Sequence[Sequence[object]]) -> Iterator[list[Program]]:
    """Programs that run together; those that still run in the end are killed."""
    running: list[Program] = []
    try:
        for command in commands:
            running.append(Program(*command, COLUMNS="160"))
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def outputs(running: Sequence[Program], timeout: float) -> list[tuple[str, str]]:
    """What each process still writes, (stdout, stderr), once all have ended; all must do so in `timeout` seconds."""
    until = time.monotonic() + timeout
    return [process.communicate(timeout=max(until - time.monotonic(), 0.1)) for process in running]
