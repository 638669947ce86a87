"""The training loop `fit`, with checkpoints and exact resume.

A run that is killed at any moment and started again resumes from its newest checkpoint and ends bit-identical to an
uninterrupted one, on any mesh. Ctrl-C and SIGTERM finish the step in flight, even the last one, save, and raise
KeyboardInterrupt; in a cluster, whichever process they reach.
"""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

from secvec_jax.data.pipeline import Stream
from secvec_jax.distributed import Consensus, all_max
from secvec_jax.errors import UserError, WriteError
from secvec_jax.limits import unlimited_address_space
from secvec_jax.memory import return_freed_memory
from secvec_jax.training.checkpoints import Checkpoints, Store
from secvec_jax.training.phase import Phase, combine
from secvec_jax.training.profiling import step_tracer
from secvec_jax.training.state import TrainingState
from secvec_jax.training.step import TrainStep
from secvec_jax.training.validation import EVAL_LOSS, Validation
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
    batches = {name: stream.local_batches() for name, stream in streams.items()}
    state = TrainingState(trained, train_step.init(trained), batches)
    with (
        _store(checkpoints, state) as store,
        _interruptible() as interrupted,
        step_tracer() as tracer,
        unlimited_address_space(),
    ):
        if store is not None:
            store.restore(state)
            if state.step > steps and checkpoints is not None:
                raise UserError(
                    f"the training run in {checkpoints.folder} is already at step {state.step}, and only {steps} "
                    "are asked for: train in another folder, or delete that one to train from the start"
                )
        consensus = Consensus()
        pending: dict[str, Any] = {}
        last = dict(state.metrics)
        resumed = state.step
        while state.step < steps and not state.finished:
            taken = state.batches if train_step.takes is None else train_step.takes(state.step)
            batch = {name: state.batches[name].take(grad_accum_steps) for name in taken}
            state.trained, state.opt_state, metrics = tracer.run(
                state.step + 1, train_step.step, state.trained, state.opt_state, frozen, batch
            )
            state.step += 1
            # One step late, so that the device never waits for a number to be read.
            if pending:
                reported = _report(pending, state.step - 1, steps, on_step, store)
                last |= reported
                state.stops_after_next_step = state.stops_after_next_step or until(reported)
            pending, state.finished = metrics, state.stops_after_next_step
            due = store is not None and store.due()
            request = consensus(_STOP if interrupted() else _SAVE if due else _GO)
            at_end = state.finished or state.step == steps
            evaluates = validation is not None and (validation.is_due(state.step) or at_end)
            if request or evaluates or at_end:
                if validation is not None and evaluates:
                    pending = pending | validation.evaluate(state.trained, frozen)
                reported = _report(pending, state.step, steps, on_step, store)
                last |= reported
                state.stops_after_next_step = state.stops_after_next_step or until(reported)
                pending = {}
                is_lowest = False
                if validation is not None and evaluates:
                    is_lowest = state.stopping.note(reported[EVAL_LOSS])
                    state.finished = state.finished or state.stopping.since == validation.patience
                if state.finished or state.step == steps:
                    break
                keeps = is_lowest and checkpoints is not None and checkpoints.best == EVAL_LOSS
                if store is not None and (request or keeps):
                    store.save(state, last, evaluated=evaluates)
                if request == _STOP:
                    raise KeyboardInterrupt
        if state.step == resumed and last:
            on_step(state.step, steps, last)
        stop = all_max(int(interrupted()))  # of all processes: no later step would notice it
        if store is not None and checkpoints is not None and (stop or checkpoints.keep_end) and state.step > resumed:
            store.save(state, last, evaluated=validation is not None)
        if stop:
            raise KeyboardInterrupt
        if store is not None and checkpoints is not None and checkpoints.best is not None and state.step:
            store.restore_best(state, last)
    return_freed_memory()
    return combine(state.trained, frozen)


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
def _store(settings: Checkpoints | None, state: TrainingState) -> Iterator[Store | None]:
    if settings is None:
        yield None
        return
    store = Store(settings, state)
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
