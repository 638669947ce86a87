"""Settings check themselves, survive their file, and guard a run's folder."""

import dataclasses
import time
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.checks import checked
from secvec_jax.config import Training, from_dict, load, save, to_dict
from secvec_jax.defenses.security_vectors import Phase1
from secvec_jax.defenses.training_settings import PHASE2, PHASE2_LORA
from secvec_jax.errors import UserError
from secvec_jax.recipes.plan import PlanRun
from secvec_jax.recipes.protect import Protect
from secvec_jax.vectors.lora import LoRA


@checked
@dataclasses.dataclass(frozen=True)
class Experiment:
    """Settings of every kind that a config may hold."""

    name: str = "recipe"
    seeds: tuple[int, ...] = (0, 1)
    weights: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    verbose: bool = False
    folder: str | None = None
    training: Training = Training()
    vectors: LoRA = LoRA()
    phase1: Phase1 = Phase1()


positive = st.floats(1e-9, 1e6, allow_nan=False)
count = st.integers(1, 10_000)
trainings = st.builds(
    Training,
    optimizer=st.sampled_from(["sgd", "adamw"]),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    learning_rate=positive,
    warmup_steps=st.integers(0, 99),
    momentum=st.floats(0, 1),
    max_grad_norm=st.floats(0, 10),
    epochs=count,
    max_steps=st.none() | count,
    batch_size=count,
    remat=st.sampled_from(["none", "dots", "full"]),
    seed=st.integers(0, 2**31),
    save_every_seconds=positive,
)
recipes = st.builds(
    Experiment,
    name=st.text(st.characters(exclude_characters="\0"), max_size=20),
    seeds=st.lists(st.integers(), max_size=4).map(tuple),
    weights=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=4),
    verbose=st.booleans(),
    folder=st.none() | st.text(st.characters(exclude_characters="\0"), max_size=20),
    training=trainings,
    vectors=st.builds(LoRA, rank=count, alpha=positive, targets=st.sampled_from([("*",), ("q_proj", "*_proj")])),
    phase1=st.builds(
        Phase1, objective=st.sampled_from(["cross_entropy", "kl", "min_min"]), kl_weight=st.floats(0, 1e6)
    ),
)


def test_what_a_task_lora_implies_is_the_same_from_python_and_from_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text("data: [alpaca]\ntask_lora: {rank: 4}\ntraining: {max_steps: 5}\n")
    expected = Training(max_steps=5).over(PHASE2_LORA)
    assert load(Protect, tmp_path / "config.yaml").training == expected
    assert Protect(data=("alpaca",), task_lora=LoRA(4), training=Training(max_steps=5)).training == expected
    assert Protect(data=("alpaca",), task_lora=LoRA(4)).training == PHASE2_LORA
    assert Protect(data=("alpaca",)).training == PHASE2
    planned = PlanRun(phase="protect", task_lora=LoRA(4)).training
    assert planned == dataclasses.replace(PlanRun.training, optimizer="adamw")


@given(recipes)
def test_settings_survive_being_spelled(experiment):
    assert from_dict(Experiment, to_dict(experiment)) == experiment


@settings(max_examples=50)
@given(experiment=recipes)
def test_settings_survive_their_file(tmp_path_factory, experiment):
    path = tmp_path_factory.mktemp("config") / "new" / "config.yaml"
    save(experiment, path)
    assert load(Experiment, path) == experiment
    assert yaml.safe_load(path.read_text()) == to_dict(experiment)
    assert [item.name for item in path.parent.iterdir()] == ["config.yaml"]


def test_a_file_holds_every_setting_and_may_leave_out_any(tmp_path):
    save(Experiment(), tmp_path / "c.yaml")
    spelled = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert set(spelled) == {field.name for field in dataclasses.fields(Experiment)}
    assert set(spelled["training"]) == {field.name for field in dataclasses.fields(Training)}
    (tmp_path / "c.yaml").write_text("training: {epochs: 7}\n")
    assert load(Experiment, tmp_path / "c.yaml") == Experiment(training=Training(epochs=7))
    (tmp_path / "c.yaml").write_text("")
    assert load(Experiment, tmp_path / "c.yaml") == Experiment()


@given(st.data())
def test_a_misspelled_key_names_the_nearest(data):
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(Training) if len(f.name) > 5]))
    at = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:at] + name[at + 1 :]
    with pytest.raises(UserError, match=rf"config.training: unknown key '{wrong}': did you mean '{name}'\?"):
        from_dict(Experiment, {"training": {wrong: 1}})


def test_a_key_like_no_other_lists_all():
    with pytest.raises(UserError, match=r"unknown key 'zzz': known are name, seeds, .*phase1"):
        from_dict(Experiment, {"zzz": 1})


@pytest.mark.parametrize("spelled", ["1e-3", "1E-3", "10e-4", "1.e-3", "0.001", "+1e-03"])
def test_numbers_that_pyyaml_reads_as_text_are_numbers(tmp_path, spelled):
    (tmp_path / "c.yaml").write_text(f"learning_rate: {spelled}\n")
    assert load(Training, tmp_path / "c.yaml").learning_rate == 0.001


@pytest.mark.parametrize("spelled", ["'1e-3'", "1e", "e-3", "1e-3 per step", "1-3"])
def test_text_is_not_a_number(tmp_path, spelled):
    (tmp_path / "c.yaml").write_text(f"learning_rate: {spelled}\nwarmup_steps: 3\n")
    with pytest.raises(UserError, match=r"learning_rate is .*: it must be a number"):
        load(Training, tmp_path / "c.yaml")


def test_a_whole_number_is_a_float_too():
    rate = from_dict(Training, {"learning_rate": 2}).learning_rate
    assert (rate, type(rate)) == (2.0, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"epochs": "3"}}, "config.training.epochs is '3': it must be an integer"),
        ({"training": {"epochs": 1.5}}, "epochs is 1.5: it must be an integer"),
        ({"training": {"epochs": True}}, "epochs is True: it must be an integer"),
        ({"training": {"learning_rate": True}}, "learning_rate is True: it must be a number"),
        ({"training": {"learning_rate": "fast"}}, "learning_rate is 'fast': it must be a number"),
        ({"training": {"learning_rate": None}}, "learning_rate is None"),
        ({"training": {"optimizer": "adam"}}, "optimizer is 'adam': did you mean 'adamw'\\? use one of sgd, adamw"),
        ({"training": {"optimizer": []}}, "optimizer is \\[\\]: use one of sgd, adamw"),
        ({"training": {"max_steps": "many"}}, "max_steps is 'many': it must be an integer"),
        ({"training": 3}, "config.training must be a mapping of settings, not int"),
        ({"training": None}, "config.training must be a mapping of settings, not NoneType"),
        ([], "config must be a mapping of settings, not list"),
        ({"seeds": 3}, "config.seeds is 3: pass a list"),
        ({"seeds": ["a"]}, "config.seeds\\[0\\] is 'a': it must be an integer"),
        ({"seeds": "01"}, "config.seeds is '01': pass a list"),
        ({"name": 3}, "config.name is 3: it must be text"),
        ({"verbose": 1}, "config.verbose is 1: it must be true or false"),
        ({3: 1}, "unknown key 3"),
        ({"training": {"epochs": 0}}, "epochs is 0: it must be at least 1"),
        ({"training": {"learning_rate": -1}}, "learning_rate is -1.0: it must be greater than 0"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate is nan: it must be a finite number"),
        ({"training": {"max_steps": 0}}, "max_steps is 0: it must be at least 1"),
        ({"vectors": {"rank": 0}}, "rank is 0"),
        ({"vectors": {"targets": ["nothing"]}}, "'nothing' matches nothing"),
        ({"phase1": {"kl_weight": -1}}, "config.phase1.kl_weight is -1.0: it must be at least 0"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        from_dict(Experiment, values)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(list(typing.get_type_hints(Training))), json_values, max_size=3))
def test_any_values_are_settings_or_a_user_error(values):
    try:
        found = from_dict(Training, values)
    except UserError:
        return
    assert str(from_dict(Training, to_dict(found))) == str(found)  # as text, since nan is not itself


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [", "is not valid YAML"), (b"- 1\n", "must be a mapping of settings, not list"), (b"x", "not str")],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(Training, tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x80", b"a: \x00"])
def test_a_binary_file_is_named(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load(Training, tmp_path / "c.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config file .*c.yaml.*check --config"):
        load(Training, tmp_path / "c.yaml")


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested deeper than 40 levels"),
        ("a: " + "{a: " * 5_000, "nested deeper than 40 levels"),
        (ALIASES + "name: *a8", "has more than 100,000 values with aliases expanded"),
        ("name: &a [*a]", "contains itself"),
        ("seeds: [" + "9" * 5_000 + "]", "not valid YAML"),
        ("seeds: [0x" + "f" * 5_000 + "]", "a whole number of 20,000 bits"),
        ("name: 2026-99-99", "not valid YAML"),
        ("#\n" * 600_000, "has 1,200,000 bytes, more than the 1,048,576 that such a file may have"),
        ('name: "a\\0b"', "cannot contain a null character"),
        ('"na\\nme\\e[2J": 1', r"unknown key 'na\\nme\\x1b\[2J': did you mean 'name'"),
    ],
)
def test_a_hostile_file_is_reported_in_one_line_and_in_time(tmp_path, text, problem):
    path, start = tmp_path / "config.yaml", time.process_time()
    path.write_text(text)
    with pytest.raises(UserError, match=problem) as raised:
        load(Experiment, path)
    assert str(raised.value).isprintable() and time.process_time() - start < 3
