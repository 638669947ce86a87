"""`--profile`: a trace of those steps that XProf opens, and the same result."""

import jax
import pytest

from secvec_jax.errors import UserError
from secvec_jax.training.profiling import profiled
from secvec_jax.training.trainer import fit
from secvec_jax.trees import fingerprint
from tests.training.tiny_fit import PHASE, STEPS, make_streams, parameters, tiny_step


@pytest.fixture(scope="module")
def train_step():
    return tiny_step()


def trained(train_step, steps: int = STEPS, **options) -> str:
    return fingerprint(fit(parameters(), PHASE, train_step, make_streams(), steps=steps, **options))


def test_the_steps_are_traced_and_the_result_is_bit_identical(train_step, tmp_path):
    plain = trained(train_step)
    with profiled("3:5", tmp_path) as profile:
        assert trained(train_step) == plain
    assert profile.trainings == 1
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    steps = {
        value
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    }
    assert steps == {3, 4, 5}


def test_an_interrupted_training_writes_what_it_has_and_a_short_one_says_so(train_step, tmp_path):
    def stop(step, steps, metrics):
        if step == 4:
            raise ZeroDivisionError

    with profiled("3:5", tmp_path / "stopped") as profile, pytest.raises(ZeroDivisionError):
        trained(train_step, on_step=stop)
    assert profile.trainings == 1 and list((tmp_path / "stopped").rglob("*.xplane.pb"))
    with profiled("10:15", tmp_path / "short") as profile:
        trained(train_step, steps=2)
    assert profile.trainings == 0 and not (tmp_path / "short").exists()
    trained(train_step)  # outside, nothing is traced
    assert profile.trainings == 0


@pytest.mark.parametrize("steps", ["", "10", "15:10", "0:3", "1:x", "1:2:3"])
def test_other_forms_are_refused_in_one_line(steps):
    with pytest.raises(UserError, match="use FIRST:LAST, such as 10:15") as error, profiled(steps, "unused"):
        pass
    assert "\n" not in str(error.value)
