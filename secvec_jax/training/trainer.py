"""The training loop `fit`, with checkpoints and exact resume.

A run that is killed at any moment and started again resumes from its newest checkpoint and ends bit-identical to an
uninterrupted one, on any mesh. Ctrl-C and SIGTERM finish the step in flight, even the last one, save, and raise
KeyboardInterrupt; in a cluster, whichever process they reach.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

from secvec_jax.data.pipeline import Batches, Stream
from secvec_jax.distributed import Consensus, all_max
from secvec_jax.errors import UserError, WriteError
from secvec_jax.limits import unlimited_address_space
from secvec_jax.memory import return_freed_memory
from secvec_jax.training.checkpoints import Checkpoints, Store
from secvec_jax.training.phase import Phase, combine
from secvec_jax.training.profiling import step_tracer
from secvec_jax.training.step import TrainStep
from secvec_jax.training.validation import EVAL_LOSS, EarlyStopping, Validation
from secvec_jax.trees import Tree

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called with the step, counted from 1, the number of steps, and the metrics as numbers."""

_GO, _SAVE, _STOP = range(3)


def fit(
    params: Tree,
    phase: Phase,
    train_step: TrainStep,
    streams: dict[str, Stream],
    *,
    steps: int,
    grad_accum_steps: int = 1,
    validation: Validation | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: OnStep = lambda step, steps, metrics: None,
    until: Callable[[dict[str, float]], bool] = lambda metrics: False,
) -> Tree:
    """The parameters after `steps` steps of `phase`; `params` themselves are unchanged.

    train_step: as `training.step.make_train_step` makes it. streams: name -> stream of batches; each step reads
    `grad_accum_steps` batches of each stream that it takes. validation: its losses are among the metrics of the steps
    that it follows, and early stopping may end the training. on_step is called once for every step, counted from 1,
    while a later one runs; after a resume it continues after the checkpoint's step (at the end it reports the last step
    again). until(metrics) ends the training one step after it holds. Raises UserError if the loss is not finite, naming
    the checkpoint that is kept, and if the checkpoints are those of another training.
    """
    trained, frozen = phase.split(params)
    trained = jax.tree.map(lambda leaf: leaf.copy(), trained)  # the step donates it
    run = _Run(trained, train_step.init(trained), {name: stream.local_batches() for name, stream in streams.items()})
    with (
        _store(checkpoints, run) as store,
        _interruptible() as interrupted,
        step_tracer() as tracer,
        unlimited_address_space(),
    ):
        if store is not None:
            store.restore(run)
            if run.step > steps and checkpoints is not None:
                raise UserError(
                    f"the training in {checkpoints.folder} is at step {run.step}, and only {steps} are asked for: "
                    "train in another folder, or delete that one to train from the start"
                )
        consensus = Consensus()
        pending: dict[str, Any] = {}
        last = dict(run.metrics)
        resumed = run.step
        while run.step < steps and not run.ended:
            taken = run.batches if train_step.takes is None else train_step.takes(run.step)
            batch = {name: run.batches[name].take(grad_accum_steps) for name in taken}
            run.trained, run.state, metrics = tracer.run(
                run.step + 1, train_step.step, run.trained, run.state, frozen, batch
            )
            run.step += 1
            # One step late, so that the device never waits for a number to be read.
            if pending:
                reported = _report(pending, run.step - 1, steps, on_step, store)
                last |= reported
                run.ending = run.ending or until(reported)
            pending, run.ended = metrics, run.ending
            due = store is not None and store.due()
            request = consensus(_STOP if interrupted() else _SAVE if due else _GO)
            at_end = run.ended or run.step == steps
            evaluates = validation is not None and (validation.is_due(run.step) or at_end)
            if request or evaluates or at_end:
                if validation is not None and evaluates:
                    pending = pending | validation.evaluate(run.trained, frozen)
                reported = _report(pending, run.step, steps, on_step, store)
                last |= reported
                run.ending = run.ending or until(reported)
                pending = {}
                is_lowest = False
                if validation is not None and evaluates:
                    is_lowest = run.stopping.note(reported[EVAL_LOSS])
                    run.ended = run.ended or run.stopping.since == validation.patience
                if run.ended or run.step == steps:
                    break
                keeps = is_lowest and checkpoints is not None and checkpoints.best == EVAL_LOSS
                if store is not None and (request or keeps):
                    store.save(run, last, evaluated=evaluates)
                if request == _STOP:
                    raise KeyboardInterrupt
        if run.step == resumed and last:
            on_step(run.step, steps, last)
        stop = all_max(int(interrupted()))  # of all processes: no later step would notice it
        if store is not None and checkpoints is not None and (stop or checkpoints.keep_end) and run.step > resumed:
            store.save(run, last, evaluated=validation is not None)
        if stop:
            raise KeyboardInterrupt
        if store is not None and checkpoints is not None and checkpoints.best is not None and run.step:
            store.restore_best(run, last)
    return_freed_memory()
    return combine(run.trained, frozen)


@dataclasses.dataclass
class _Run:
    """Everything that a resumed run needs."""

    trained: Tree
    state: Tree
    batches: dict[str, Batches]
    step: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The last value of each, when the run was saved."""
    ending: bool = False
    """`until` held: the training ends after one more step."""
    ended: bool = False
    """The last step was taken, or validation ended the training."""
    stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)


def _report(metrics: dict[str, Any], step: int, steps: int, on_step: OnStep, store: Store | None) -> dict[str, float]:
    """The metrics as numbers, (sum, count) pairs divided; waits for the step. Raises UserError if not finite."""
    values = {}
    for name, value in jax.device_get(metrics).items():
        if isinstance(value, tuple):
            if value[1] > 0:
                values[name] = float(value[0] / value[1])
        else:
            values[name] = float(value)
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        problem = f"the loss is {values['loss']} and the gradient norm {values['grad_norm']} at step {step}"
        no_store = f"{problem}: lower the learning rate; no checkpoint is kept"
        raise UserError(no_store if store is None else store.diverged(step, problem))
    if store is not None:
        store.note(step, values)
    on_step(step, steps, values)
    return values


@contextlib.contextmanager
def _store(settings: Checkpoints | None, run: _Run) -> Iterator[Store | None]:
    if settings is None:
        yield None
        return
    store = Store(settings, run)
    try:
        yield store
    except BaseException:
        with contextlib.suppress(WriteError):  # the first error says more
            store.close()
        raise
    store.close()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function: whether SIGINT or SIGTERM was received; a second one interrupts at once.

    Outside the main thread nothing is caught.
    """
    received: list[int] = []
    noticed = False

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    def interrupted() -> bool:
        nonlocal noticed
        noticed = noticed or bool(received)
        return noticed

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and not noticed and jax.process_count() == 1:  # after the last check; a cluster stops together
        raise KeyboardInterrupt
