"""Progress lines for the public functions, in terminals and notebooks.

`sv.align`, `sv.train_vectors`, `sv.finetune` and `sv.generate` show one line that is overwritten at each update, unless
the caller passes a progress callback. Nothing is shown if the output goes to a file or a pipe. The line is plain text
because a rich progress bar needs ipywidgets in a notebook.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from secvec_jax.distributed import is_main_process
from secvec_jax.printable import printable

_EVERY = 0.2
"""Minimum seconds between two updates."""

OnStep = Callable[[int, int, dict[str, float]], None]


@contextlib.contextmanager
def step_progress(activity: str, on_step: OnStep | None) -> Iterator[OnStep]:
    """Yield the caller's `on_step`, or one that shows the step, the loss and the remaining time."""
    if on_step is not None:
        yield on_step
        return
    with _line() as show:
        start, first = time.monotonic(), 0

        def step_shown(step: int, steps: int, metrics: dict[str, float]) -> None:
            nonlocal first
            first = first or step
            seconds = (time.monotonic() - start) / (step - first + 1) * (steps - step)
            text = f"{activity}: step {step}/{steps}, loss {metrics['loss']:.3f}"
            show(f"{text}, {seconds:.0f} s left" if step < steps else text, step == steps)

        yield step_shown


@contextlib.contextmanager
def reply_progress(total: int, progress: Callable[[int], None] | None) -> Iterator[Callable[[int], None]]:
    """Yield the caller's `progress`, or one that shows how many replies are done."""
    if progress is not None:
        yield progress
        return
    with _line() as show:
        yield lambda done: show(f"generate: {done}/{total} replies", done == total) if total > 1 else None


@contextlib.contextmanager
def _line() -> Iterator[Callable[[str, bool], None]]:
    """Yield a function that overwrites the current line; the line is terminated when the block ends."""
    watched, updated, width = is_main_process() and _is_watched(), 0.0, 0

    def show(text: str, last: bool) -> None:
        nonlocal updated, width
        text = printable(text)
        now = time.monotonic()
        if watched and (last or now - updated >= _EVERY):
            print(f"\r{text.ljust(width)}", end="", file=sys.stderr, flush=True)
            updated, width = now, len(text)

    try:
        yield show
    finally:
        if width:
            print(file=sys.stderr, flush=True)


def _is_watched() -> bool:
    """Return whether standard error goes to a terminal or a notebook."""
    notebook = "ipykernel" in sys.modules and "IPython" in sys.modules
    return notebook or (sys.stderr is not None and sys.stderr.isatty())
