"""Runs of two processes that are killed, stopped, or resumed in another layout; and a disk that fills up."""

import dataclasses
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from secvec_jax import command_line
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import fit
from secvec_jax.trees import fingerprint
from secvec_jax.verb_arguments import Verb
from tests.processes import Program, cluster, outputs
from tests.training.tiny_fit import PHASE, STEPS, make_streams, parameters, tiny_step

ONE = (1, "")
LAYOUTS = {"one": ONE, "fsdp": (2, "fsdp=2"), "tensor": (2, "tensor=2")}
"""Name -> how many processes, and their mesh."""


def tiny_fit(folder: Path, layout: tuple[int, str], *options: object):
    """The processes of one start of the run in `folder`."""
    processes, mesh = layout
    command = ("-m", "tests.training.tiny_fit", folder, "--batch-size", 4, "--mesh", mesh, *options)
    return cluster(*command, processes=processes)


def finish(folder: Path, layout: tuple[int, str]) -> list[str]:
    """The lines of a start that must end well; only the first process may speak."""
    with tiny_fit(folder, layout) as running:
        (out, err), *others = outputs(running, 300)
        assert all(process.returncode == 0 for process in running), err
        # Gloo, which carries the arrays between processes on a CPU, speaks for itself.
        assert not any(line for out, _ in others for line in out.splitlines() if "[Gloo]" not in line)
    return spoken(out)


def spoken(out: str) -> list[str]:
    return [line for line in out.splitlines() if "[Gloo]" not in line]


def first_line(running: list[Program]) -> str:
    """The next line of the first process; empty at its end."""
    while "[Gloo]" in (line := running[0].stdout.readline()):
        pass
    return line.rstrip()


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory) -> dict[str, list[str]]:
    """Layout -> the lines of a run that was never killed."""
    return {name: finish(tmp_path_factory.mktemp(name), layout) for name, layout in LAYOUTS.items()}


def batches(lines: list[str]) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("end")]


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[2]) for line in lines if not line.startswith("end")]


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(item.name) for item in folder.iterdir() if item.name.isdigit())


@pytest.mark.slow
def test_every_layout_takes_the_same_batches_and_has_the_same_losses(unkilled):
    assert [line.split()[0] for line in unkilled["one"]] == [*map(str, range(1, STEPS + 1)), "end"]
    for lines in unkilled.values():
        assert batches(lines) == batches(unkilled["one"])
        np.testing.assert_allclose(losses(lines), losses(unkilled["one"]), rtol=1e-5)
    # Sums over fsdp are taken in another order, so the last bits differ; tensor=2 sums nothing here.
    assert unkilled["tensor"] == unkilled["one"]


# Kills --------------------------------------------------------------------------------------------


def kill(running: list[Program], rng: random.Random) -> None:
    for process in rng.sample(running, len(running)):
        process.kill()
        time.sleep(rng.uniform(0.0, 0.005))


TRAINING, WRITING, ONE_ALONE = "training", "writing", "one alone"
"""Kinds of kills: of all processes at a random moment, of the first in the midst of a checkpoint's write, and of one
process of two."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed", "kills"),
    [
        pytest.param("one", 0, [TRAINING, WRITING], marks=pytest.mark.release),  # see test_trainer and test_quickstart
        ("fsdp", 4, [TRAINING, ONE_ALONE]),
        pytest.param("one", 0, [TRAINING, WRITING, *[TRAINING] * 5], marks=pytest.mark.release),
        pytest.param("one", 1, [TRAINING, WRITING, *[TRAINING] * 4], marks=pytest.mark.release),
        pytest.param("fsdp", 2, [TRAINING, WRITING, ONE_ALONE, *[TRAINING] * 4], marks=pytest.mark.release),
    ],
)
def test_a_run_killed_again_and_again_ends_as_one_never_killed(unkilled, tmp_path, name, seed, kills):
    rng = random.Random(seed)
    expected = unkilled[name]
    for number, kind in enumerate(kills, 1):
        kept = steps_kept(tmp_path)
        begun = max(kept, default=0) + 1
        in_save = ("--kill-in-save", begun, rng.uniform(0.0, 0.03)) if kind == WRITING else ()
        with tiny_fit(tmp_path, LAYOUTS[name], "--pause", 0.1, *in_save) as running:
            lines = [first_line(running)]
            if number in (1, 4):  # of these starts, a checkpoint must stay
                while steps_kept(tmp_path) == kept:
                    assert all(process.poll() is None for process in running), "no step was kept"
                    time.sleep(0.01)
            if in_save:
                running[0].wait(timeout=300)
                assert steps_kept(tmp_path) == kept, "the write had ended"
            else:
                time.sleep(rng.uniform(0.0, 0.2))
            if kind == ONE_ALONE:
                rng.choice(running).kill()
                time.sleep(1.0)
            kill(running, rng)
            lines += spoken(outputs(running, 300)[0][0])
            assert all(process.returncode != 0 for process in running), (
                number,
                begun,
                lines,
                [p.returncode for p in running],
            )
            assert any(process.returncode == -signal.SIGKILL for process in running)
        whole = [line for line in lines if line in expected]
        assert whole and whole == lines[: len(whole)] and len(lines) - len(whole) <= 1  # one may be torn
        assert whole[0] == expected[begun - 1]
    lines = finish(tmp_path, LAYOUTS[name])
    assert lines == expected[-len(lines) :]
    assert 1 < len(lines) < len(expected), "nothing was resumed"


# Other layouts, signals ---------------------------------------------------------------------------


def stop(folder: Path, layout: tuple[int, str], number: int, whom: int, after: int = 2) -> list[str]:
    """The lines of a start that one of its processes' signal ends; all processes must end by it."""
    with tiny_fit(folder, layout, "--pause", 0.1) as running:
        lines = [first_line(running) for _ in range(after)]
        running[whom].send_signal(number)
        told = outputs(running, 300)
        for process, (_, err) in zip(running, told, strict=True):
            assert process.returncode in (1, 130, -signal.SIGINT) and "KeyboardInterrupt" in err, err
    lines += spoken(told[0][0])
    assert steps_kept(folder)[-1] == len(lines) + (int(lines[0].split()[0]) - 1)
    return lines


@pytest.mark.release  # by default, the test below signals each of two processes
@pytest.mark.parametrize(("number", "whom"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_process_stops_both_at_the_same_step(unkilled, tmp_path, number, whom):
    lines = stop(tmp_path, LAYOUTS["fsdp"], number, whom)
    assert 2 <= len(lines) < STEPS
    assert lines + finish(tmp_path, LAYOUTS["fsdp"]) == unkilled["fsdp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        ("fsdp", "tensor", "one"),
        *(pytest.param(pair, marks=pytest.mark.release) for pair in (("one", "fsdp"), ("fsdp", "one"))),
    ],
    ids=" to ".join,
)
def test_a_run_goes_on_in_another_layout(unkilled, tmp_path, layouts):
    lines = []
    for whom, name in enumerate(layouts[:-1]):  # the first process of the first layout, the second of the second
        lines += stop(tmp_path, LAYOUTS[name], signal.SIGTERM, whom)
    assert len(lines) < STEPS
    lines += finish(tmp_path, LAYOUTS[layouts[-1]])
    assert batches(lines) == batches(unkilled["one"])
    np.testing.assert_allclose(losses(lines), losses(unkilled["one"]), rtol=1e-5)


# A full disk --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No settings."""


def test_a_full_disk_costs_no_older_checkpoint_and_is_reported_in_words(small_disk, capsys):
    train_step, seen = tiny_step(), []

    def run(on_step) -> int:
        def verb(settings, command):
            checkpoints = Checkpoints(small_disk / "run", save_every_seconds=0.0)
            seen.append(fingerprint(fit(parameters(), PHASE, train_step, make_streams(), steps=STEPS,
                                        checkpoints=checkpoints, on_step=on_step)))  # fmt: skip

        return command_line.main("", {"train": Verb("", lambda: (Nothing, verb))}, ["train"])

    def filling(step, steps, metrics):
        steps_begun.append(step)
        if step == 5:
            fill(small_disk)

    steps_begun: list[int] = []
    assert run(filling) == 2 and not seen
    assert capsys.readouterr().err.startswith(
        f"error: cannot write {small_disk / 'run'}/5 (No space left on device): free some space and rerun the same"
    )
    assert steps_begun[-1] == 5 and steps_kept(small_disk / "run")[-1] == 4
    (small_disk / "ballast").unlink()
    steps_begun.clear()
    assert run(lambda step, steps, metrics: steps_begun.append(step)) == 0
    assert steps_begun == list(range(5, STEPS + 1))
    assert seen == [fingerprint(fit(parameters(), PHASE, train_step, make_streams(), steps=STEPS))]
