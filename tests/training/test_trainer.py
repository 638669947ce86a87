"""A run that is stopped at any moment and restarted ends like one that never stopped."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from secvec_jax.errors import UserError
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import TrainStep, make_train_step
from secvec_jax.training.trainer import fit
from secvec_jax.trees import fingerprint
from tests.processes import Program
from tests.training.tiny_fit import PHASE, STEPS, Table, loss, make_streams, parameters, spied, tiny_step


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def train_step():
    return tiny_step()


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(item.name) for item in folder.iterdir() if item.name.isdigit())


def run(train_step, *, folder=None, every=0.0, stop_at=None, streams=None, keep=2, best=None, **options):
    """(fingerprint, steps reported, batches seen); the fingerprint is None for a run that was stopped."""
    reported, batches = [], []

    def on_step(step, steps, metrics):
        if step == stop_at:
            raise Stop
        assert steps == options.get("steps", STEPS)
        reported.append((step, metrics["loss"]))

    checkpoints = None if folder is None else Checkpoints(folder, every, keep, best)
    options = {"steps": STEPS} | options
    try:
        after = fit(
            parameters(),
            PHASE,
            spied(train_step, batches, []),
            streams or make_streams(),
            checkpoints=checkpoints,
            on_step=on_step,
            **options,
        )
    except Stop:
        return None, reported, batches
    return fingerprint(after), reported, batches


@pytest.fixture(scope="module")
def whole(train_step):
    """A run that was never stopped and never saved."""
    return run(train_step)


NEVER = 3600.0
"""Seconds between two checkpoints of a run whose checkpoints nothing reads."""


@pytest.fixture(scope="module")
def stopped_once(train_step, tmp_path_factory):
    """The folder of a run that was stopped in its step 6, with the checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(train_step, folder=folder, stop_at=6)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "run")


def test_every_step_is_reported_once_with_its_loss(whole):
    _, reported, batches = whole
    assert [step for step, _ in reported] == list(range(1, STEPS + 1))
    assert len(batches) == STEPS == len(set(batches))
    assert reported[-1][1] < 0.9 * reported[0][1]


def test_parameters_in_the_callers_hands_stay_as_they_are(train_step):
    params = parameters()
    before = fingerprint(params)
    after = fit(params, PHASE, train_step, make_streams(), steps=3)
    assert fingerprint(params) == before != fingerprint(after)
    assert fingerprint(params["backbone"]) == fingerprint(after["backbone"])


def test_saving_changes_nothing(train_step, whole, tmp_path):
    assert run(train_step, folder=tmp_path) == whole


@pytest.mark.parametrize(
    "stops",
    [
        [1],
        [STEPS],
        [3, 4, 9],
        *(pytest.param(s, marks=pytest.mark.release) for s in ([2], [7], [5, 5, 5], [11, 12, 12])),
    ],
)
def test_a_stopped_run_ends_as_if_never_stopped(train_step, whole, tmp_path, stops):
    fingerprint_of_whole, all_reported, all_batches = whole
    for stop_at in stops:
        result, reported, batches = run(train_step, folder=tmp_path, stop_at=stop_at)
        assert result is None
        first = all_batches.index(batches[0])  # the data goes on where it was
        assert batches == all_batches[first : first + len(batches)]
        assert reported == all_reported[first : first + len(reported)]
    result, reported, batches = run(train_step, folder=tmp_path)
    assert result == fingerprint_of_whole
    assert batches == all_batches[-len(batches) :]
    assert reported == all_reported[-len(batches) :]
    if max(stops) > 2:
        assert len(batches) < STEPS, "nothing was resumed"


def test_without_a_checkpoint_in_time_a_run_starts_anew(train_step, whole, tmp_path):
    assert run(train_step, folder=tmp_path, every=3600, stop_at=8)[0] is None
    assert run(train_step, folder=tmp_path, every=3600) == whole


@pytest.mark.parametrize("keep", [1, 3])
def test_only_as_many_checkpoints_are_kept_as_asked(train_step, tmp_path, keep):
    run(train_step, folder=tmp_path, stop_at=9, keep=keep)
    assert steps_kept(tmp_path) == list(range(9 - keep, 9))


def test_accumulation_takes_as_many_batches_a_step_and_resumes(train_step, tmp_path):
    whole = run(train_step, grad_accum_steps=3)
    assert run(train_step, folder=tmp_path, stop_at=6, grad_accum_steps=3)[0] is None
    assert run(train_step, folder=tmp_path, every=NEVER, grad_accum_steps=3)[0] == whole[0] != run(train_step)[0]


# Ends ---------------------------------------------------------------------------------------------


def test_until_ends_a_run_one_step_after_it_holds(train_step, whole, tmp_path):
    losses = [value for _, value in whole[1]]
    target = next(i for i in range(3, STEPS - 3) if losses[i] < min(losses[:i]))

    def until(metrics):
        return metrics["loss"] <= losses[target]

    result, reported, batches = run(train_step, until=until)
    assert len(batches) == len(reported) == target + 2
    assert result == run(train_step, steps=target + 2)[0]
    # Checkpoints and stops do not move the end.
    assert run(train_step, until=until, folder=tmp_path / "saved")[0] == result
    for stop_at in (target, target + 2):
        folder = tmp_path / str(stop_at)
        assert run(train_step, until=until, folder=folder, stop_at=stop_at)[0] is None
        assert run(train_step, until=until, folder=folder, every=NEVER)[0] == result


def failing(train_step: TrainStep, at: int, name: str) -> TrainStep:
    """The method, whose `name` is not a number from its step `at` on."""
    calls = []

    def step(trained, state, frozen, batch):
        calls.append(None)
        trained, state, metrics = train_step.step(trained, state, frozen, batch)
        return trained, state, metrics | ({name: jnp.float32(jnp.nan)} if len(calls) >= at else {})

    return TrainStep(train_step.init, step)


@pytest.mark.parametrize(
    ("at", "name"),
    [
        (1, "loss"),
        (5, "grad_norm"),
        (STEPS, "loss"),
        *(pytest.param(*c, marks=pytest.mark.release) for c in ((1, "grad_norm"), (5, "loss"), (STEPS, "grad_norm"))),
    ],
)
def test_a_loss_that_is_no_number_stops_and_names_the_checkpoint_that_is_kept(train_step, whole, tmp_path, at, name):
    kept = "there is no checkpoint" if at == 1 else f"the checkpoint of step {at - 1} is kept"
    with pytest.raises(UserError, match=f"at step {at}: {kept} in .*: lower the learning rate, and train in another"):
        run(failing(train_step, at, name), folder=tmp_path)
    result, reported, _ = run(train_step, folder=tmp_path, every=NEVER)
    assert result == whole[0]
    assert reported[0][0] == at


def test_a_restart_that_diverges_at_the_same_step_says_that_it_did_before(train_step, tmp_path):
    for again in ("", ", as at an earlier start with these settings"):
        with pytest.raises(UserError, match=f"at step 5{again}: the checkpoint of step 4 is kept") as caught:
            run(failing(train_step, 1 if again else 5, "loss"), folder=tmp_path)  # a restart begins with step 5
        assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "diverged.json").read_text())["step"] == 5


def overflowing(train_step: TrainStep, at: int) -> TrainStep:
    """The method, whose parameters are infinite after its step `at`, of which no metric tells."""
    calls = []

    def step(trained, state, frozen, batch):
        calls.append(None)
        trained, state, metrics = train_step.step(trained, state, frozen, batch)
        return jax.tree.map(lambda leaf: leaf / (len(calls) != at), trained), state, metrics

    return TrainStep(train_step.init, step)


def test_parameters_that_are_not_finite_are_never_saved(train_step, whole, tmp_path):
    problem = r"the parameters .*table.* are not finite after step 5: the checkpoint of step 4 is kept"
    with pytest.raises(UserError, match=problem):
        run(overflowing(train_step, 5), folder=tmp_path)
    assert steps_kept(tmp_path) == [3, 4]
    assert run(train_step, folder=tmp_path, every=NEVER)[0] == whole[0]


@pytest.mark.parametrize("at", [3, STEPS])
def test_a_loss_that_is_no_number_is_found_without_checkpoints(train_step, at):
    with pytest.raises(UserError, match=f"the loss is nan .* at step {at}:"):
        run(failing(train_step, at, "loss"))


# Validation ----------------------------------------------------------------------------------------


class Distance:
    """Validation that measures how far the table is from a point that training passes by."""

    def __init__(self, every_steps=2, patience=None):
        self.every_steps, self.patience, self.seen = every_steps, patience, []

    def is_due(self, step):
        return step % self.every_steps == 0

    def evaluate(self, trained, frozen):
        self.seen.append(fingerprint(trained))
        return {"eval/loss": (float(abs(abs(trained["vectors"].table).sum() - PASSED)), 1.0)}


PASSED = 8.4


def evaluations(train_step, **options):
    """(step, loss) of every evaluation of a run, and what the run ends with."""
    found = {}

    def on_step(step, steps, metrics):
        if "eval/loss" in metrics:
            found[step] = metrics["eval/loss"]

    after = fit(parameters(), PHASE, train_step, make_streams(), on_step=on_step, **({"steps": STEPS} | options))
    return found, fingerprint(after)


def test_validation_changes_no_bit_of_the_training(train_step, whole):
    for every_steps in (1, 5):
        validation = Distance(every_steps)
        assert run(train_step, validation=validation) == whole
        assert len(set(validation.seen)) == len(validation.seen) == -(-STEPS // every_steps)


def test_an_evaluation_follows_its_step_and_the_last_one(train_step):
    found, _ = evaluations(train_step, validation=Distance(5))
    assert list(found) == [5, 10, STEPS]
    trees = {}
    spied_step = watched(train_step, lambda step, trained: trees.update({step: jax.tree.map(jnp.copy, trained)}))
    fit(parameters(), PHASE, spied_step, make_streams(), steps=STEPS)
    assert found == {step: Distance().evaluate(trees[step], None)["eval/loss"][0] for step in found}


def test_patience_ends_a_run_and_a_stopped_one_ends_the_same(train_step, tmp_path):
    everything, _ = evaluations(train_step, validation=Distance(1))
    losses = list(everything.values())
    lowest = losses.index(min(losses)) + 1
    assert 2 < lowest < STEPS - 3, "the toy no longer passes its point in time"
    found, end = evaluations(train_step, validation=Distance(1, patience=2))
    assert list(found) == list(range(1, lowest + 3))
    assert end == run(train_step, steps=STEPS, validation=Distance(1, patience=2))[0]
    for stop_at in (lowest, lowest + 1, lowest + 2):
        folder = tmp_path / str(stop_at)
        assert run(train_step, folder=folder, stop_at=stop_at, validation=Distance(1, patience=2))[0] is None
        assert run(train_step, folder=folder, every=NEVER, validation=Distance(1, patience=2))[0] == end


@pytest.mark.parametrize("stop_at", [None, 4, pytest.param(9, marks=pytest.mark.release)])
def test_the_best_of_a_validated_run_is_where_it_was_evaluated(train_step, tmp_path, stop_at):
    validation = {"validation": Distance(3)}
    found, _ = evaluations(train_step, **validation)
    best = min(found, key=found.get)
    assert best < STEPS
    options = {"folder": tmp_path, "keep": 1, "best": "eval/loss"} | validation
    if stop_at is not None:
        assert run(train_step, stop_at=stop_at, **options)[0] is None
    expected = []
    spy = lambda step, trained: expected.append(fingerprint(trained)) if step == best else None  # noqa: E731
    fit(parameters(), PHASE, watched(train_step, spy), make_streams(), steps=STEPS)
    after = fit(parameters(), PHASE, train_step, make_streams(), steps=STEPS,
                checkpoints=Checkpoints(tmp_path, 0.0, 1, "eval/loss"), **validation)  # fmt: skip
    assert [fingerprint({"backbone": None, "vectors": after["vectors"]})] == expected
    # Without checkpoints in time, those of evaluations are enough.
    rare = Checkpoints(tmp_path / "rare", 1e9, 1, "eval/loss")
    again = fit(parameters(), PHASE, train_step, make_streams(), steps=STEPS, checkpoints=rare, **validation)
    assert fingerprint(again) == fingerprint(after)


def watched(train_step, look) -> TrainStep:
    """The train step, after which `look(step, trained)` is called."""
    count = 0

    def step(trained, state, frozen, batch):
        nonlocal count
        count += 1
        trained, state, metrics = train_step.step(trained, state, frozen, batch)
        look(count, trained)
        return trained, state, metrics

    return TrainStep(train_step.init, step)


# Checkpoints that cannot be read -------------------------------------------------------------------


def truncate(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def garbage(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\xff\x00garbage" * 20)


def half(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_every_file(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            flip(path, path.stat().st_size * 4)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)


def lose(name: str):
    def damage(folder: Path) -> None:
        (part,) = [item for item in folder.rglob(name) if item.is_dir()]
        shutil.rmtree(part)

    damage.__name__ = f"lose_{name}"
    return damage


DAMAGES = [truncate, lose("trained"), lose("state"), lose("data")]
DAMAGES += [pytest.param(damage, marks=pytest.mark.release) for damage in (garbage, half, flip_every_file)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_costs_that_checkpoint_only_and_is_reported(train_step, whole, stopped, damage, caplog):
    assert steps_kept(stopped) == [4, 5]
    damage(stopped / "5")
    result, reported, _ = run(train_step, folder=stopped, every=NEVER)
    assert result == whole[0]
    assert reported[0][0] == 5
    assert "checkpoint of step 5" in caplog.text and "resuming from the one before it" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_that_cannot_be_read_name_their_folder(train_step, stopped, damage):
    for step in steps_kept(stopped):
        damage(stopped / str(step))
    with pytest.raises(UserError, match="delete that folder to start this stage from the beginning") as caught:
        run(train_step, folder=stopped)
    assert str(stopped) in str(caught.value) and "\n" not in str(caught.value)


ALL = pytest.param("*", 0.5, marks=pytest.mark.release), pytest.param("*", 0.9, marks=pytest.mark.release)


@pytest.mark.parametrize(("files", "place"), [("data.json", 0.5), *ALL])
def test_a_flipped_bit_in_any_file_of_a_checkpoint_never_changes_the_result(
    train_step, whole, stopped_once, tmp_path, files, place, caplog
):
    """It costs the checkpoint, or is in a place that restoring does not read."""
    told = []
    for file in sorted(path for path in (stopped_once / "5").rglob(files) if path.is_file() and path.stat().st_size):
        folder = tmp_path / "flipped"
        shutil.copytree(stopped_once, folder)
        flipped = folder / file.relative_to(stopped_once)
        flip(flipped, 8 * int(place * flipped.stat().st_size) + 1)
        caplog.clear()
        assert run(train_step, folder=folder, every=NEVER)[0] == whole[0], flipped
        told.append("the checkpoint of step 5" in caplog.text)
        shutil.rmtree(folder)
    assert any(told), "nothing was noticed"


@pytest.mark.parametrize("file", ["5/_CHECKPOINT_METADATA", "5/trained/manifest.ocdbt", "run.lock"])
def test_what_is_no_file_in_a_checkpoint_is_reported_at_once(train_step, stopped, file):
    """Orbax would wait for a pipe without end, and read a device without end."""
    (stopped / file).unlink()
    os.mkfifo(stopped / file)
    with pytest.raises(UserError, match=rf"{file} is a named pipe"):
        run(train_step, folder=stopped)


@pytest.mark.parametrize("part", ["trained", "state"])
def test_a_restored_number_that_differs_by_one_bit_is_noticed(train_step, whole, stopped, monkeypatch, caplog, part):
    """Whatever the files' own format notices."""
    load = ocp.training.Checkpointer.load_checkpointables

    def flipped(checkpointer, step, items):
        loaded = load(checkpointer, step, items)
        if step == 5:
            name, leaf = max(loaded[part].items(), key=lambda item: item[1].size)
            bits = np.array(leaf).view(np.uint32)
            bits.flat[-1] ^= 1
            loaded[part][name] = jnp.asarray(bits.view(np.float32))
        return loaded

    monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", flipped)
    result, reported, _ = run(train_step, folder=stopped, every=NEVER)
    assert result == whole[0] and reported[0][0] == 5
    assert f"the checkpoint of step 5 in {stopped} is damaged (the checksum of {part}" in caplog.text


def test_a_checkpoint_of_other_parameters_names_its_folder(train_step, stopped):
    shutil.rmtree(stopped / "4")
    other = {"backbone": jnp.ones(()), "vectors": Table(jnp.zeros((400, 2)))}
    with pytest.raises(UserError, match="delete that folder"):
        fit(other, PHASE, train_step, make_streams(), steps=STEPS, checkpoints=Checkpoints(stopped))


def test_a_checkpoint_holds_the_trained_part_and_not_the_frozen_one(train_step, tmp_path):
    size = 1 << 20
    params = {"backbone": jnp.ones(()), "more": jnp.ones(size), "vectors": parameters()["vectors"]}
    phase = Phase({"backbone": "freeze", "more": "freeze", "vectors": "train"})
    train_step = make_train_step(loss, phase.optimizer(optax.adam(0.1), params))
    stop = Stop()

    def on_step(step, steps, metrics):
        if step == 5:
            raise stop

    with pytest.raises(Stop):
        fit(params, phase, train_step, make_streams(), steps=9, checkpoints=Checkpoints(tmp_path, 0.0), on_step=on_step)
    assert sum(item.stat().st_size for item in tmp_path.rglob("*") if item.is_file()) < size


@pytest.mark.parametrize("stops", [[], [9], pytest.param([4], marks=pytest.mark.release)])
def test_a_run_may_end_with_its_best_checkpoint(train_step, whole, tmp_path, stops):
    losses = [value for _, value in whole[1]]
    best = min(range(STEPS), key=losses.__getitem__) + 1
    assert best < STEPS
    for stop_at in stops:
        run(train_step, folder=tmp_path, stop_at=stop_at, keep=1, best="loss")
    result, *_ = run(train_step, folder=tmp_path, keep=1, best="loss")
    assert result == run(train_step, steps=best)[0] != whole[0]


def test_a_best_step_without_a_checkpoint_is_reported(train_step, whole, tmp_path, caplog):
    losses = [value for _, value in whole[1]]
    lowest = min(range(STEPS), key=losses.__getitem__) + 1
    result, *_ = run(train_step, folder=tmp_path, every=1e9, best="loss")
    assert result == whole[0]
    assert f"loss was lowest at step {lowest} ({min(losses):.4g}), of which there is no checkpoint" in caplog.text
    caplog.clear()
    run(train_step, folder=tmp_path / "each", keep=1, best="loss")
    assert "lowest" not in caplog.text


def test_the_best_is_found_though_some_steps_lack_its_metric(train_step, whole, tmp_path):
    """As Lisa's steps on other rows do, or a batch without a row of the kind."""
    losses = [value for _, value in whole[1]]
    best = min(range(1, STEPS, 2), key=losses.__getitem__) + 1

    def now_and_then(trained, state, frozen, batch):
        step, state = state
        trained, state, metrics = train_step.step(trained, state, frozen, batch)
        seen = {"loss/rare": metrics["loss"]} if step % 2 else {}
        return trained, (step + 1, state), metrics | seen

    rare = TrainStep(lambda trained: (jnp.int32(0), train_step.init(trained)), now_and_then)
    result, *_ = run(rare, folder=tmp_path, keep=1, best="loss/rare")
    assert result in {run(train_step, steps=steps)[0] for steps in (best, best + 1)}  # which has the same last value


def test_a_metric_that_no_step_has_is_reported(train_step, tmp_path):
    with pytest.raises(UserError, match="'lose', which no step reported: use one of grad_norm, loss"):
        run(train_step, folder=tmp_path, best="lose")


def test_files_of_others_in_the_folder_do_no_harm(train_step, whole, stopped):
    (stopped / "notes.txt").write_text("mine")
    (stopped / "7.orbax-checkpoint-tmp").mkdir()  # what a killed write leaves behind
    assert run(train_step, folder=stopped)[0] == whole[0]


# Signals -------------------------------------------------------------------------------------------


def start(folder, *options) -> Program:
    return Program("-m", "tests.training.tiny_fit", folder, *options)


def finish(folder, *options) -> list[str]:
    """The lines of a run that must end well."""
    process = start(folder, *options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.splitlines()


def interrupted_at(step: int, raised: list[int]):
    """Ctrl-C while the step after this one is in flight."""

    def on_step(number, steps, metrics):
        raised.append(number)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def fitted(train_step, folder, on_step, **options):
    checkpoints = Checkpoints(folder, 1e9, **options.pop("checkpoints", {}))
    options = {"steps": STEPS} | options
    return fit(parameters(), PHASE, train_step, make_streams(), checkpoints=checkpoints, on_step=on_step, **options)


@pytest.mark.parametrize("step", [4, STEPS - 1, STEPS])
def test_ctrl_c_saves_in_the_last_step_as_in_any_other(train_step, whole, tmp_path, step):
    """At `STEPS` it comes when the last step has been reported."""
    seen, again = [], []
    with pytest.raises(KeyboardInterrupt):
        fitted(train_step, tmp_path, interrupted_at(step, seen))
    assert steps_kept(tmp_path) == [min(step + 1, STEPS)] == [seen[-1]]
    after = fitted(train_step, tmp_path, interrupted_at(0, again))
    assert fingerprint(after) == whole[0]
    # One that has nothing left to do reports its last step, whose metrics its caller may need.
    assert again == list(range(seen[-1] + 1, STEPS + 1)) or (seen[-1] == STEPS and again == [STEPS])


def test_ctrl_c_in_the_step_that_until_ends_with_saves_the_end(train_step, whole, tmp_path):
    losses = [value for _, value in whole[1]]
    target = next(i for i in range(3, STEPS - 3) if losses[i] < min(losses[:i]))
    until = {"until": lambda metrics: metrics["loss"] <= losses[target]}
    expected = run(train_step, **until)[0]
    for step in (target + 1, target + 2):
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            fitted(train_step, folder, interrupted_at(step, []), **until)
        assert fingerprint(fitted(train_step, folder, interrupted_at(0, []), **until)) == expected


def test_a_training_goes_on_with_its_own_inputs_only(train_step, whole, tmp_path):
    mine = {"inputs": {"rows 'all'": "sha256:1", "training.momentum": 0.9}}
    with pytest.raises(KeyboardInterrupt):
        fitted(train_step, tmp_path, interrupted_at(4, []), checkpoints=mine)
    for changed, words in (({"rows 'all'": "sha256:2"}, "rows 'all' has changed"),
                           ({"training.momentum": 0.5}, "training.momentum was 0.9, is now 0.5")):  # fmt: skip
        with pytest.raises(UserError, match=f"{words} since the training in .* was started") as caught:
            fitted(train_step, tmp_path, interrupted_at(0, []), checkpoints={"inputs": mine["inputs"] | changed})
        assert "\n" not in str(caught.value)
    assert fingerprint(fitted(train_step, tmp_path, interrupted_at(0, []), checkpoints=mine)) == whole[0]


@pytest.mark.parametrize("damage", [b"[" * 100_000, b"[]", b"\xff"])
def test_damaged_records_next_to_checkpoints_are_reported(train_step, tmp_path, damage):
    mine = {"inputs": {"rows 'all'": "sha256:1"}}
    with pytest.raises(KeyboardInterrupt):
        fitted(train_step, tmp_path, interrupted_at(4, []), checkpoints=mine)
    (tmp_path / "inputs.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"inputs\.json is damaged.*: delete .* to train from the start"):
        fitted(train_step, tmp_path, interrupted_at(0, []), checkpoints=mine)
    (tmp_path / "inputs.json").unlink()
    for path in tmp_path.rglob("_CHECKPOINT_METADATA"):
        path.write_text("3")
    with pytest.raises(UserError, match=r"are damaged .*: delete that folder"):
        fitted(train_step, tmp_path, interrupted_at(0, []), checkpoints=mine)


def test_a_training_whose_end_is_kept_can_be_extended_and_not_shortened(train_step, whole, tmp_path):
    fitted(train_step, tmp_path, interrupted_at(0, []), steps=5, checkpoints={"keep_end": True})
    seen = []
    assert fingerprint(fitted(train_step, tmp_path, interrupted_at(0, seen))) == whole[0]
    assert seen == list(range(6, STEPS + 1))
    with pytest.raises(UserError, match="is already at step 5, and only 3 are asked for"):
        fitted(train_step, tmp_path, interrupted_at(0, []), steps=3)


def step_of(line: str) -> int:
    return int(line.split()[0])


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("unkilled"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.release)])
def test_ctrl_c_finishes_the_step_saves_and_the_next_start_goes_on(unkilled, tmp_path, number):
    process = start(tmp_path, "--pause", 0.2)
    seen = [process.stdout.readline() for _ in range(4)]
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    told = [line.rstrip() for line in seen] + out.splitlines()
    assert step_of(told[-1]) < STEPS
    assert told + finish(tmp_path) == unkilled


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.003, *(pytest.param(s, marks=pytest.mark.release) for s in (0.0, 0.01, 0.03))])
def test_a_kill_during_a_write_leaves_the_older_checkpoint(unkilled, tmp_path, delay):
    process = start(tmp_path, "--kill-in-save", 7, delay)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    lines = finish(tmp_path)
    assert step_of(lines[0]) in (7, 8)
    assert lines == unkilled[-len(lines) :]


def test_numpy_and_jax_agree_on_fingerprints():
    tree = {"a": jnp.arange(3.0), "b": None}
    assert fingerprint(tree) == fingerprint(jax.tree.map(np.asarray, tree))
