"""The vectors of `train.py protect`: given, from the cache, or trained; and their gate."""

import contextlib
import dataclasses
import random
from collections.abc import Sequence
from typing import Any, cast

from secvec_jax.defenses.base import Need
from secvec_jax.defenses.gate import Gate, measure_gate, num_gate_rows
from secvec_jax.defenses.inputs import choose_held_out, row_keys
from secvec_jax.defenses.security_vectors import Phase1, train_vectors
from secvec_jax.distributed import is_clustered
from secvec_jax.errors import UserError
from secvec_jax.inference import as_vectors
from secvec_jax.recipes.protect_work import Work
from secvec_jax.vectors.kinds import Vectors
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.store import load_vectors, save_vectors
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.vector_cache import key_of, locked_entry


def make_vectors(work: Work) -> Vectors:
    """The vectors: given, from the cache, or trained; they have passed the gate."""
    request, file = work.request, work.vectors_file

    def run(stage: Stage) -> dict[str, Any]:
        if request.vectors is not None:
            vectors, gate = _given_vectors(work, stage)
        elif is_clustered():
            vectors, gate = _trained_vectors(work, stage)
        else:
            vectors, gate = _cached_vectors(work, stage)
        save_vectors(vectors, file, work.model)
        work.note(str(gate))
        return dataclasses.asdict(gate)

    gate = Gate(**work.stage("vectors", run, makes={"the vectors": file}))
    work.facts["gate"] = gate.as_dict()
    if gate.failure is not None:
        fix = "train them on more rows, or pass harmful rows of their own behavior" if request.vectors else (
            "give more harmful rows, or different ones, or pass vectors that you trained with other settings"
        )  # fmt: skip
        raise UserError(f"{gate.failure}; {fix}")
    return load_vectors(file, work.model)


def _given_vectors(work: Work, stage: Stage) -> tuple[Vectors, Gate]:
    """The user's vectors, and their gate on the rows that the user gives, else on packaged ones."""
    adapters = as_vectors(work.request.vectors, work.model)
    if len(adapters) != 1:
        raise UserError(f"{len(adapters)} vectors are given: pass one, which is also used to screen the rows")
    stage.say("testing the vectors")
    needs_given = {kind: need for kind, need in _KINDS.items() if need in work.request.given}
    # The packaged rows may be longer than the maximum length that was chosen for the user's.
    unseen = work.packaged.held_out() if len(needs_given) < len(_KINDS) else {}
    rows = {kind: work.rows_for(needs_given[kind]) if kind in needs_given else unseen[kind] for kind in _KINDS}
    gate = measure_gate(work.model, adapters[0], harmful=rows["harmful"], benign=rows["benign"])
    return cast(Vectors, adapters[0]), gate


_KINDS: dict[str, Need] = {"harmful": "harmful rows", "benign": "benign rows"}


def _cached_vectors(work: Work, stage: Stage) -> tuple[Vectors, Gate]:
    """The vectors for this model, rows and settings from the cache; trained and cached if it has none."""
    rows = {"harmful rows": work.rows_for("harmful rows"), "benign rows": work.rows_for("benign rows")}
    key = key_of(work.model, rows, work.vectors_training, LoRA(), Phase1())
    with contextlib.ExitStack() as stack:
        try:
            entry = stack.enter_context(locked_entry(key, work.note))
        except UserError as error:
            work.note(f"the vectors are not cached ({error})")
            return _trained_vectors(work, stage)
        cached = entry.read(work.model, work.note)
        if cached is not None:
            work.note("vectors: from the cache, trained before for this model and these rows")
            return cached[0], Gate(**cached[1])
        vectors, gate = _trained_vectors(work, stage)
        if gate.failure is None:
            try:
                entry.write(vectors, work.model, dataclasses.asdict(gate))
            except UserError as error:
                work.note(f"the vectors are not cached ({error})")
        return vectors, gate


def _trained_vectors(work: Work, stage: Stage) -> tuple[Vectors, Gate]:
    """New vectors from all but a tenth of the harmful and of the benign rows, and their gate on these."""
    harmful, harmful_held_out = _without_tenth(work.rows_for("harmful rows"), "harmful")
    benign, benign_held_out = _without_tenth(work.rows_for("benign rows"), "benign")
    vectors = train_vectors(
        work.model,
        harmful,
        LoRA(),
        benign=benign,
        phase1=Phase1(),
        training=work.vectors_training,
        checkpoints=work.checkpoints("vectors"),
        on_step=stage.on_step(),
    )
    stage.say("testing the vectors")
    return vectors, measure_gate(work.model, vectors, harmful_held_out, benign_held_out)


def _without_tenth(rows: Sequence[Any], kind: str) -> tuple[list[Any], list[Any]]:
    """The rows to train vectors on, and those that test them, of which none has a copy among the former.

    Raises UserError if there are too few, or too few different ones.
    """
    order = random.Random(0).sample(range(len(rows)), len(rows))
    held_out = set(choose_held_out(row_keys(rows), order, num_gate_rows(len(rows)), set()))
    if len(held_out) < 2:
        raise UserError(
            f"{len(rows)} {kind} rows, or the different ones among them, are too few to train vectors on and to test "
            "them: give about 100"
        )
    return [rows[i] for i in order if i not in held_out], [rows[i] for i in order if i in held_out]
