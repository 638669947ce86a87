"""Profiler traces of chosen training steps, for XProf.

    with profiled("10:15", folder) as profile:
        ...                     # every `fit` in here traces its steps 10 to 15
    profile.trainings           # how many trainings were traced

The request is ambient, like JAX's mesh: it changes no result, and no defense need pass it on.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import jax

from secvec_jax.errors import UserError
from secvec_jax.files import writing

Result = TypeVar("Result")


@dataclasses.dataclass
class Profile:
    """The steps to trace of each training, first and last included, and where to write them.

    folder: XProf's `--logdir`; each process of a cluster writes into a separate folder there. trainings: how many have
    traced at least one step.
    """

    first: int
    last: int
    folder: Path
    trainings: int = 0


_requested: ContextVar[Profile | None] = ContextVar("profile", default=None)


def parse_steps(text: str) -> tuple[int, int]:
    """Parse "10:15" into (10, 15), the first and the last step. Raises UserError for any other form."""
    match = re.fullmatch(r"([1-9][0-9]{0,8}):([1-9][0-9]{0,8})", text.strip())
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--profile is {text!r}: use FIRST:LAST, such as 10:15; steps count from 1")
    return int(match[1]), int(match[2])


def check_steps(text: str | None) -> None:
    """Raise UserError for steps that `parse_steps` does not take."""
    if text is not None:
        parse_steps(text)


@contextlib.contextmanager
def profiled(steps: str | None, folder: Path) -> Iterator[Profile | None]:
    """Have all trainings inside the block trace these steps; None: no trace."""
    profile = None if steps is None else Profile(*parse_steps(steps), folder)
    token = _requested.set(profile)
    try:
        yield profile
    finally:
        _requested.reset(token)


class StepTracer:
    """Starts and stops the trace of one training."""

    def __init__(self, profile: Profile | None):
        self._profile = profile
        self._is_running = False

    def run(self, number: int, step: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `step(*arguments)`, the training's step of this number, traced if it was requested.

        The first one starts when the steps before it have ended, and the trace ends when the last one has.
        """
        profile = self._profile
        if profile is None or not profile.first <= number <= profile.last:
            return step(*arguments)
        if not self._is_running:
            jax.block_until_ready(arguments)
            self._start(profile)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = step(*arguments)
        if number == profile.last:
            jax.block_until_ready(result)
            self.stop()
        return result

    def _start(self, profile: Profile) -> None:
        folder, index = profile.folder, jax.process_index()
        with writing(folder):
            target = folder if jax.process_count() == 1 else folder / f"process-{index}"
            target.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(target)
        profile.trainings += 1
        self._is_running = True

    def stop(self) -> None:
        """End the trace, if there is one, and write it. Raises WriteError if the disk is full."""
        if self._is_running and self._profile is not None:
            self._is_running = False
            with writing(self._profile.folder):
                jax.profiler.stop_trace()


@contextlib.contextmanager
def step_tracer() -> Iterator[StepTracer]:
    """The tracer for one training; an interrupted training still writes its trace."""
    tracer = StepTracer(_requested.get())
    try:
        yield tracer
    finally:
        tracer.stop()
