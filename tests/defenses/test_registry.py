"""Every defense says where it acts and what it needs, and is read from a grid file as it is written."""

import dataclasses
import inspect
import typing

import jax
import pytest
import yaml
from simple_parsing.docstring import get_attribute_docstring

from secvec_jax import checks
from secvec_jax.config import Training
from secvec_jax.data.rows import row
from secvec_jax.defenses import explained_away, finetuning
from secvec_jax.defenses.base import Defended, Defense, DefenseStage, Need
from secvec_jax.defenses.explained_away import ExplainedAwayFilter
from secvec_jax.defenses.registry import DEFENSES, as_mapping, evidence_of, read_defense
from secvec_jax.defenses.security_vectors import SecurityVectors
from secvec_jax.defenses.vaccine import Vaccine
from secvec_jax.errors import UserError
from secvec_jax.vectors.lora import LoRA
from tests.defenses.toy_inputs import ToyInputs
from tests.toys import tiny_model

EVERY = pytest.mark.parametrize("defense", DEFENSES.values(), ids=lambda defense: defense.name)
TRAINING = Training(learning_rate=1e-2, max_steps=1, batch_size=1, max_seq_len=128, share_prefix=False)


def rows(count: int, reply: str) -> list:
    return [row(f"What is {number} + 1?", f"{reply} {number}.") for number in range(count)]


@EVERY
def test_it_says_what_it_is(defense):
    assert defense.stage in typing.get_args(DefenseStage)
    assert set(defense.needs) <= set(typing.get_args(Need)) and len(set(defense.needs)) == len(defense.needs)
    assert DEFENSES[defense.name] is defense and defense().label == defense.name
    assert defense.__module__.startswith("secvec_jax.defenses.") and "apply" in vars(defense)
    assert all(isinstance(getattr(defense, fact), str) and getattr(defense, fact) for fact in ("cost", "source"))
    assert len(evidence_of(defense)) > 10 and "|" not in defense.cost + defense.source + evidence_of(defense)
    first_line = (defense.__doc__ or "").splitlines()[0]
    assert first_line.endswith(".") and not first_line.startswith(defense.__name__ + "(")
    for field in dataclasses.fields(defense):
        assert get_attribute_docstring(defense, field.name).docstring_below, field.name


@EVERY
def test_it_is_a_frozen_value_that_checks_itself(defense):
    assert "_hints" in vars(defense) and defense() == defense() and hash(defense()) == hash(defense())
    with pytest.raises(dataclasses.FrozenInstanceError):
        defense().name = "another"
    with pytest.raises(UserError, match="no setting 'unheard_of'"):
        defense(unheard_of=1)


def another(hint: typing.Any, default: typing.Any) -> typing.Any:
    """A value of the type that is not the default."""
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if typing.get_origin(plain) is typing.Literal:
        return next(value for value in typing.get_args(plain) if value != default)
    if plain is bool:
        return not default
    if plain is float:
        return default / 2 or 0.25
    return "capitals" if plain is str else default + 1


@EVERY
def test_its_label_has_the_settings_that_are_not_defaults_and_is_read_as_yaml(defense):
    defaults = checks.defaults_of(defense)
    for name, hint in checks.hints_of(defense).items():
        changed = defense(**{name: another(hint, defaults[name])})
        assert changed != defense()
        words = changed.label.removeprefix(defense.name).split()
        assert len(words) == 1 and words[0].startswith(f"{name}=")
        assert (
            read_defense(yaml.safe_load(f"{{name: {defense.name}, {name}: {words[0].partition('=')[2]}}}")) == changed
        )
        assert read_defense(as_mapping(changed)) == changed
    assert read_defense(defense.name) == read_defense({"name": defense.name}) == defense()
    assert read_defense(defense.name.replace(" ", "-")) == defense()


def test_labels_are_short_and_exact():
    assert Vaccine(rho=5, every=2).label == "vaccine rho=5 every=2"
    assert Vaccine(rho=2).label == "vaccine", "a default that is written out is still the default"
    assert SecurityVectors(objective="min_min", inner=True).label == "security vectors objective=min_min inner=true"
    assert Vaccine(rho=0.12345678).label == "vaccine rho=0.12345678", "two values never share a label"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("vacine", "no defense is named 'vacine': did you mean 'vaccine'"),
        ("vaccine rho=5", r"did you mean 'vaccine'\? \(settings are written as a mapping"),
        ({"name": "vaccine", "roh": 1}, "'vaccine' has no setting 'roh': its settings are rho=2, every=1"),
        ({"name": "vaccine", "rho": -1}, "'vaccine': rho is -1.0: it must be at least 0"),
        ({"name": "replay", "share": 1}, "'replay' has no setting 'share': it has none"),
        ({"name": "replay", "stage": "data"}, "no setting 'stage'"),
        ({"rho": 1}, "write its name, or a mapping"),
        (None, "write its name, or a mapping"),
    ],
)
def test_what_names_no_defense_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        read_defense(value)


@pytest.fixture
def inputs(monkeypatch) -> ToyInputs:
    """All that a defense may need, where training ends before its first step."""
    monkeypatch.setattr(finetuning, "fit", lambda params, *_, **__: params)
    monkeypatch.setattr(explained_away, "known_scale", lambda *_: explained_away.Scale(benign=-99.0, threshold=99.0))
    model = tiny_model()
    vectors = LoRA(rank=2).init(model.architecture, jax.random.key(0))
    return ToyInputs(
        model,
        {"attack": rows(3, "Bad"), "task": rows(3, "Good")},
        training=TRAINING,
        vectors=jax.tree.map(lambda leaf: leaf + 0.1, vectors),
        safe=rows(8, "Safe"),
        harmful=rows(3, "Bad"),
        benign=rows(3, "Well"),
        contrast=rows(3, "No"),
    )


@EVERY
def test_it_asks_for_what_it_says_it_needs(defense, inputs):
    defended = defense().apply(inputs)
    assert isinstance(defended, Defended) and defended.model.architecture == inputs.aligned.architecture
    assert inputs.asked == set(defense.needs) == set(defense().reads)
    assert (defended.system is not None) == (defense.stage == "inference")


@pytest.mark.parametrize("defense", [SecurityVectors(safe=0.5), ExplainedAwayFilter(safe=0.5)])
def test_a_share_of_safe_rows_needs_them(defense, inputs):
    defense.apply(inputs)
    assert inputs.asked == set(defense.reads) == {"safe rows", *defense.needs}


def test_the_registry_has_every_defense():
    def subclasses(kind: type) -> set[type]:
        return {kind, *(found for below in kind.__subclasses__() for found in subclasses(below))}

    made = {kind for kind in subclasses(Defense) if not inspect.isabstract(kind)}
    assert {kind for kind in made if kind.__module__.startswith("secvec_jax.")} == set(DEFENSES.values())
