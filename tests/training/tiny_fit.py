"""A training of milliseconds whose result depends on the order of the data and the optimizer's state.

Also a program, for tests that kill it: `python -m tests.training.tiny_fit FOLDER` prints for each step its number, a
fingerprint of its batch and its loss, and in the end fingerprints of the parameters and of the optimizer's state.
Several of them with --cluster HOST:PORT --processes N --process I train together; the first one speaks.
"""

import argparse
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from secvec_jax.data.pipeline import Stream
from secvec_jax.distributed import Cluster, is_main_process, start_cluster
from secvec_jax.sharding import replicate, shard
from secvec_jax.training import checkpoints, trainer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import TrainStep, make_train_step
from secvec_jax.trees import fingerprint
from tests.toys import random_examples

STEPS, VOCABULARY = 12, 8
PHASE = Phase({"backbone": "freeze", "vectors": "train"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """What is trained, `[VOCABULARY, 2]`, spread over any mesh of up to 16 devices."""

    table: jax.Array

    def axes(self) -> "Table":
        return Table(("vocab", "embed"))


def loss(params, batch, totals):
    learn = batch["learn"]
    guess = params["vectors"].table[learn["tokens"]] @ jnp.array([1.0, 0.3]) + params["backbone"]
    error = (guess - learn["targets"] / 2) ** 2 * learn["weights"]
    return error.sum() / totals["learn"], {"loss/all": (error.sum(), learn["weights"].sum())}


def parameters():
    return {"backbone": jnp.ones(()), "vectors": Table(jnp.zeros((VOCABULARY, 2)))}


def tiny_step() -> TrainStep:
    return make_train_step(loss, PHASE.optimizer(optax.adam(optax.cosine_decay_schedule(0.2, STEPS)), parameters()))


def make_streams(lines: int = 1) -> dict[str, Stream]:
    rows = random_examples(30, vocabulary=VOCABULARY)
    return {"learn": Stream({"all": rows}, batch_size=lines, seq_len=24, seed=3, epochs=None)}


def spied(train_step: TrainStep, batches: list[str], states: list[Any]) -> TrainStep:
    """The method, with a fingerprint of every batch that it is given appended to `batches`, the state to `states`."""

    def step(trained, state, frozen, batch):
        batches.append(fingerprint(replicate(batch)))
        trained, state, metrics = train_step.step(trained, state, frozen, batch)
        states[:] = [state]
        return trained, state, metrics

    return TrainStep(train_step.init, step)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--kill-in-save", nargs=2, type=float, default=(0, 0), metavar=("STEP", "SECONDS"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--mesh", default="")
    parser.add_argument("--cluster", default="")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    options = parser.parse_args()
    start_cluster(Cluster(options.mesh, options.cluster, options.processes, options.process))
    batches, states = [], []
    train_step = spied(tiny_step(), batches, states)

    def say(*words) -> None:
        if is_main_process():
            print(*words, flush=True)

    def on_step(step, steps, metrics):
        say(step, batches[step - first], repr(metrics["loss"]))
        time.sleep(options.pause)

    save, load = checkpoints.Store.save, checkpoints.Store.restore
    first = 1

    def restore(store, run):
        nonlocal first
        load(store, run)
        first = run.step + 1

    def dying_save(store, run, metrics, **more):
        step, seconds = options.kill_in_save
        if 0 < step <= run.step:
            threading.Thread(target=_die_in_a_write, args=(options.folder, seconds), daemon=True).start()
        save(store, run, metrics, **more)
        if 0 < step <= run.step:
            time.sleep(60)

    checkpoints.Store.save, checkpoints.Store.restore = dying_save, restore
    after = trainer.fit(
        shard(parameters()),
        PHASE,
        train_step,
        make_streams(options.batch_size),
        steps=STEPS,
        checkpoints=trainer.Checkpoints(options.folder, save_every_seconds=0.0),
        on_step=on_step,
    )
    end = f"{fingerprint(after)} {fingerprint(states[-1])}"
    say("end", end)


def _die_in_a_write(folder: Path, seconds: float) -> None:
    """Kill this process so many seconds after a checkpoint has begun to be written."""
    while not any(folder.glob("*tmp*")):
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
