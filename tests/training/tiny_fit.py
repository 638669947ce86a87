"""A training of milliseconds, whose end depends on the order of the data and the optimizer's memory.

Also a program, for tests that kill it: `python -m tests.training.tiny_fit FOLDER` prints each step and in the end
a fingerprint of the result.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from secvec_jax.data.pipeline import Stream
from secvec_jax.training import trainer
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import Method, descent
from secvec_jax.trees import fingerprint
from tests.toys import random_examples

STEPS, VOCABULARY = 12, 8
PHASE = Phase({"backbone": "freeze", "vectors": "train"})


def loss(params, batch, totals):
    learn = batch["learn"]
    guess = params["vectors"]["table"][learn["tokens"]] + params["backbone"]
    error = (guess - learn["targets"] / 2) ** 2 * learn["weights"]
    return error.sum() / totals["learn"], {"loss/all": (error.sum(), learn["weights"].sum())}


def parameters():
    return {"backbone": jnp.ones(()), "vectors": {"table": jnp.zeros(VOCABULARY)}}


def make_method() -> Method:
    return descent(loss, PHASE.optimizer(optax.adam(optax.cosine_decay_schedule(0.2, STEPS)), parameters()))


def make_streams() -> dict[str, Stream]:
    rows = random_examples(30, vocabulary=VOCABULARY)
    return {"learn": Stream({"all": rows}, lines=1, length=24, seed=3, epochs=None)}


def spied(method: Method, batches: list[str]) -> Method:
    """The method, with a fingerprint of every batch that it is given appended to `batches`."""

    def step(trained, state, frozen, batch):
        batches.append(fingerprint({name: {k: np.asarray(v) for k, v in p.items()} for name, p in batch.items()}))
        return method.step(trained, state, frozen, batch)

    return Method(method.init, step)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--kill-in-save", nargs=2, type=float, default=(0, 0))
    options = parser.parse_args()

    def on_step(step, steps, metrics):
        print(step, flush=True)
        time.sleep(options.pause)

    save = trainer._Store.save

    def dying_save(store, run):
        save(store, run)
        if run.step == options.kill_in_save[0]:
            time.sleep(options.kill_in_save[1])
            os.kill(os.getpid(), signal.SIGKILL)

    trainer._Store.save = dying_save
    after = trainer.fit(
        parameters(),
        PHASE,
        make_method(),
        make_streams(),
        steps=STEPS,
        checkpoints=trainer.Checkpoints(options.folder, every_seconds=0.0),
        on_step=on_step,
    )
    print(fingerprint(after), flush=True)


if __name__ == "__main__":
    main()
