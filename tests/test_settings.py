"""Settings mean the same from Python, YAML and the command line; what cannot be is refused; the rest is inherited."""

import dataclasses
import importlib
import math
import pkgutil
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import secvec_jax as sv
from secvec_jax import checks, cli, command_line, config
from secvec_jax.checks import UNSET, SettingError
from secvec_jax.config import Training
from secvec_jax.data.pipeline import Stream
from secvec_jax.defenses import (
    aligned_kl,
    booster,
    constrained_sft,
    ema,
    ewc,
    finetuning,
    floor,
    forget_filter,
    guarded,
    lisa,
    mixing,
    persona,
    safegrad,
    sbr,
    security_vectors,
    vaccine,
)
from secvec_jax.defenses.advice import Advice
from secvec_jax.defenses.controls import PlainFinetuning
from secvec_jax.defenses.registry import read_defense
from secvec_jax.defenses.security_vectors import ALIGN, PHASE1, Phase1, align, finetune, train_vectors
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.evaluation.audit import Limits
from secvec_jax.grid.grid import GridConfig
from secvec_jax.grid.seed_workspace import GridExperiment
from secvec_jax.model.decoder import abstract_decoder, leaf_name
from secvec_jax.recipes.align import Align
from secvec_jax.recipes.finetune import Finetune
from secvec_jax.recipes.score import ScoreRun
from secvec_jax.recipes.vectors import Vectors, vectors
from secvec_jax.sharding import make_mesh
from secvec_jax.training.optimizers import decayed, make_optimizer
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.steering import Steering
from secvec_jax.verb_arguments import Verb
from secvec_jax.workspace.workspace import Experiment
from tests.toys import ARCHITECTURE, random_examples, tiny_model

FIELDS = checks.hints_of(Training)
VERBS = {"align": Align, "vectors": Vectors, "finetune": Finetune}
NEEDED = {Align: {"data": "x"}, Vectors: {"data": "x"}, Finetune: {"data": "x", "vectors": "none"}}
"""Of each verb, the settings that have no default."""


def settings_classes() -> list[type]:
    """Every checked settings dataclass of the package."""
    found = set()
    for module in pkgutil.walk_packages(sv.__path__, "secvec_jax."):
        if module.name != "secvec_jax.evaluation.lm_eval":  # needs the optional harness
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, type) and "_hints" in vars(value):
                    found.add(value)
    return sorted(found, key=lambda kind: kind.__qualname__)


# From Python, YAML and the command line alike -----------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 50),
    st.sampled_from([0.0, 0.5, 1.5, 3.0, -1.0, 1e-4, 1e9, math.nan, math.inf, -math.inf, 2**31, 2**40]),
)
others = st.sampled_from(["sgd", "SGD", "adam", "adamw", "cos", "linear", "full", "", "loss/all", True, False])
edits = st.dictionaries(st.sampled_from(list(FIELDS)), numbers | others, min_size=1, max_size=3)


def made(make):
    """What is made, or why it is refused, without quotation marks, and with the plain name of the setting."""
    try:
        return make()
    except UserError as error:
        named = re.sub(r"^--([a-z-]+) ", lambda match: match[1].replace("-", "_") + " ", str(error))
        return named.replace("config.", "").replace("training.", "").replace("'", "")


@pytest.fixture(scope="module")
def from_command_line():
    """The settings that a verb's arguments make."""

    def argument(name, value):
        flag = name.replace("_", "-")
        if FIELDS[name] == bool | None:
            return f"--{flag}" if value else f"--no-{flag}"
        return f"--{flag}={value}"

    def parse(verb, edit):
        required = [word for name, value in NEEDED[VERBS[verb]].items() for word in (f"--{name}", value)]
        arguments = [verb, *required, *(argument(name, value) for name, value in edit.items())]
        return command_line.parse(cli.TRAIN[verb], VERBS[verb], arguments)[0]

    return parse


@settings(max_examples=40)
@given(verb=st.sampled_from(list(VERBS)), edit=edits)
def test_all_three_ways_give_the_same_settings_or_the_same_refusal(from_command_line, verb, edit):
    edit = {name: value for name, value in edit.items() if name != "best" or isinstance(value, str)}
    kind = VERBS[verb]
    python = made(lambda: kind(**NEEDED[kind], training=Training(**edit)))
    text = yaml.safe_dump(NEEDED[kind] | {"training": edit}, sort_keys=False)
    assert made(lambda: config.from_dict(kind, yaml.safe_load(text))) == python
    if any(FIELDS[name] == bool | None and not isinstance(value, bool) for name, value in edit.items()):
        return  # a switch has no value that could be wrong
    if len(edit) == 1 or isinstance(python, kind):  # of several mistakes, each way may meet another one first
        assert made(lambda: from_command_line(verb, edit)) == python


REQUIRED = {"defense": PlainFinetuning(), "examples": {"all": [1]}, "batch_size": 2, "seq_len": 8, "prompts": (),
            "score": len, "refusals": (), "model": "x", "folder": Path("x"), "experiment": GridExperiment(), "out": "x",
            "data": "x", "vectors": "x", "grid": "x", "tasks": "x", "runs": "x", "before": "x", "after": "x",
            "models": {}, "rows_of": len, "system": None, "limits": Limits(), "max_prompts": 1,
            "reply_tokens": 1}  # fmt: skip
"""Of settings that have no default."""
ALSO = {Finetune: {"vectors": "none"}}
"""What a class asks for although it has a default."""


@pytest.mark.parametrize("kind", settings_classes(), ids=lambda kind: kind.__name__)
def test_every_number_is_checked_where_it_is_made(kind):
    defaults = checks.defaults_of(kind)
    required = {name: REQUIRED[name] for name in checks.hints_of(kind) if name not in defaults} | ALSO.get(kind, {})
    kind(**required)
    for name, hint in checks.hints_of(kind).items():
        scalar = hint
        while typing.get_origin(scalar) is not None and typing.get_origin(scalar) is not typing.Literal:
            scalar = typing.get_args(scalar)[0]
        listed = isinstance(defaults.get(name), tuple) and scalar in (int, float)
        wrong = {int: [1.5, "many", True, math.nan], float: ["fast", True, math.nan, math.inf, 1e39], bool: [1, "yes"]}
        for value in wrong.get(scalar, []) if isinstance(scalar, type) else []:
            with pytest.raises(UserError, match=name):
                kind(**required | {name: (value,) if listed else value})


def test_every_setting_that_counts_or_measures_has_bounds():
    free = {"Layout", "Judge", "Probe"}
    unbounded = [
        f"{kind.__name__}.{name}" for kind in settings_classes() if kind.__name__ not in free
        for name, hint in checks.hints_of(kind).items() if hint in (int, float, int | None, float | None)
    ]  # fmt: skip
    assert not unbounded


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Training(optimizer="SGD"), "optimizer is 'SGD': did you mean 'sgd'"),
        (lambda: Training(optimizer="adam"), "did you mean 'adamw'"),
        (lambda: Training(schedule="cos"), "did you mean 'cosine'"),
        (lambda: Training(max_grad_norm=-1), "max_grad_norm is -1.0: it must be at least 0"),
        (lambda: Training(weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: Training(momentum=1.5), "momentum is 1.5: it must be at least 0 and at most 1"),
        (lambda: Training(max_steps=0), "max_steps is 0"),
        (lambda: Training(seed=-1), "seed is -1"),
        (lambda: Training(lr=1e-3), "no setting 'lr': did you mean 'learning_rate'"),
        (lambda: Training(epoch=1), "did you mean 'epochs'"),
        (lambda: Training(warmup_steps=jnp.float32(2)), "warmup_steps is .*: it must be an integer"),
        (lambda: LoRA(rank=True), "rank is True"),
        (lambda: LoRA(alpha=0), "alpha is 0.0: it must be other than 0"),
        (lambda: LoRA(targets=3), "targets is 3: pass a list"),
        (lambda: Align("x", training={"max_steps": 3}), "training is .*: pass Training"),
        (lambda: ScoreRun(limit=0), "limit is 0"),
        (lambda: Finetune("x", "y", task_lora=LoRA(rank=-1)), "rank is -1"),
        (lambda: Finetune("x", "y", task_lora=8), "task_lora is 8: pass LoRA"),
        (lambda: Finetune("x"), "vectors is required"),
        (lambda: Finetune((), "y"), r"data is \(\): it must be non-empty"),
        (lambda: make_mesh(data=-1, fsdp=-1), "data is -1"),
        (lambda: lisa.lisa(1, 0), "user_steps is 0"),
        (lambda: vaccine.vaccine(rho=-1), "rho is -1.0"),
        (lambda: vaccine.random_perturbation(-0.1), "variance is -0.1"),
        (lambda: booster.booster(alpha=0), "alpha is 0.0"),
        (lambda: ewc.ewc(math.nan), "weight is nan"),
        (lambda: ema.ema(1.5), "decay is 1.5: it must be at least 0 and at most 1"),
        (lambda: safegrad.safegrad(-1), "weight is -1.0"),
        (lambda: sbr.sbr(-1), "weight is -1.0"),
        (lambda: aligned_kl.aligned_kl(-1), "weight is -1.0"),
        (lambda: guarded.guarded(math.inf), "weight is inf"),
        (lambda: constrained_sft.constrained(beta=0), "beta is 0.0"),
        (lambda: floor.floored(-1), "nats is -1.0"),
        (lambda: mixing.with_safe_rows([1], [1], share=-1), "share is -1.0"),
        (lambda: persona.persona_directions(None, [], [], scale=0), "scale is 0.0"),
        (lambda: read_defense({"name": "vaccine", "rho": -1}), "'vaccine': rho is -1.0"),
        (lambda: read_defense({"name": "vaccine", "roh": 1}), "its settings are rho"),
        (lambda: vaccine.Vaccine(roh=1), "did you mean 'rho'"),
        (lambda: read_defense({"name": "sequential", "steps": 2.5}), "steps is 2.5: it must be an integer"),
        (lambda: read_defense({"name": "security vectors", "inner": "perhaps"}), "inner is 'perhaps': it must be"),
        (lambda: read_defense("vacine"), "did you mean 'vaccine'"),
        (lambda: forget_filter.ForgetFilter(phi=1.5), "phi is 1.5: it must be at least -1 and at most 1"),
        (lambda: config.from_dict(GridConfig, {"blocks": [{}, {"poison": [0.1, 1.5]}]}),
         r"blocks\[1\].poison\[1\] is 1.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_paths_and_lists_are_taken(tmp_path):
    training = Training(learning_rate=np.float32(0.5), batch_size=np.int64(4), share_prefix=np.bool_(True))
    assert training == Training(learning_rate=0.5, batch_size=4, share_prefix=True)
    assert [type(v) for v in (training.learning_rate, training.batch_size)] == [float, int]
    assert hash(LoRA(targets=["q_proj"])) == hash(LoRA(targets=("q_proj",))) == hash(LoRA(targets="q_proj"))
    assert Align(data=tmp_path, out=tmp_path) == Align(data=(str(tmp_path),), out=str(tmp_path))


@pytest.mark.parametrize("number", ["010", "-012", "1:04", "1:30.5", "00"])
def test_a_number_that_only_looks_decimal_is_refused(tmp_path, number):
    path = tmp_path / "c.yaml"
    path.write_text(f"training:\n  max_steps: {number}\n")
    with pytest.raises(UserError, match=f"line 2: {number} is an octal number or one of base 60"):
        config.load(Align, path)
    path.write_text(f"out: '{number}'\ntraining:\n  learning_rate: 0.5\n  max_steps: 0x10\n  epochs: 1_0\n")
    loaded = config.load(Align, path)
    assert (loaded.out, loaded.training.learning_rate) == (number, 0.5)
    assert (loaded.training.max_steps, loaded.training.epochs) == (16, 10)


def test_a_key_given_twice_is_refused_and_a_merged_one_is_not(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(UserError, match="line 3: 'epochs' is given twice"):
        config.load(Align, path)
    path.write_text("blocks:\n  - defense: [none, {name: vaccine, rho: 1, rho: 2}]\n")
    with pytest.raises(UserError, match="line 2: 'rho' is given twice"):
        config.load(GridConfig, path)
    path.write_text(
        "blocks:\n  - &a {epochs: [1], samples: [7]}\n  - &b {<<: *a, epochs: [2]}\n  - {<<: *b, seed: [1]}\n"
    )
    assert [(b.epochs, b.samples, b.seed) for b in config.load(GridConfig, path).blocks] == [
        ((1,), (7,), (0,)), ((2,), (7,), (0,)), ((2,), (7,), (1,))
    ]  # fmt: skip


# The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "--lr", "1"], "unknown flag --lr: did you mean '--learning-rate'?"),
        (["align", "--epoch=3"], "unknown flag --epoch: did you mean '--epochs'?"),
        (["align", "--lines", "2"], "unknown flag --lines: did you mean '--batch-size'?"),
        (["align", "--clip", "1"], "unknown flag --clip: did you mean '--max-grad-norm'?"),
        (["align", "more"], "unknown argument 'more'"),
        (["align", "--keep-checkpoints", "1"], "unknown flag --keep-checkpoints: did you mean '--max-checkpoints'?"),
        (["align", "--gradient-accumulation-steps=2"], "did you mean '--grad-accum-steps'?"),
        (["align", "--task-rank", "8"], "unknown flag --task-rank: did you mean '--task-lora.rank'?"),
        (["align", "--lora-r", "8"], "did you mean '--task-lora.rank'?"),
        (["align", "--lora_alpha=8"], "did you mean '--task-lora.alpha'?"),
        (["align", "--task-lora-rank=8"], "did you mean '--task-lora.rank'?"),
        (["align", "--rank=8"], "did you mean '--task-lora.rank'?"),
        (["align", "--overwrite_output_dir"], "did you mean '--overwrite'?"),
        (["align", "--logging-steps", "1"], "unknown flag --logging-steps: see --help for all flags"),
        (["align", "--max-grad-norm"], "expected one argument"),
        (["alignn"], "unknown verb 'alignn': did you mean 'align'?"),
    ],
)
def test_an_unknown_flag_names_the_nearest_under_the_verbs_own_usage(capsys, arguments, message):
    table = {"align": Verb("", lambda: (Align, lambda *_: None))}
    assert command_line.main("verbs", table, arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("usage: ") and lines[-1].startswith("error: ") and message in lines[-1]
    if arguments[0] == "align":
        assert lines[0].endswith(" align [options]")


def test_the_kl_objective_needs_benign_rows_from_the_command_line_as_from_python(tmp_path, capsys):
    rows = random_examples(2)
    with pytest.raises(UserError) as caught:
        train_vectors(tiny_model(), rows)
    table = {"vectors": Verb("", lambda: (Vectors, vectors))}
    assert command_line.main("verbs", table, ["vectors", "--data", "x", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert not (tmp_path / "run").exists()


# What is not set ----------------------------------------------------------------------------------


def test_a_training_shows_what_is_set_and_inherits_the_rest():
    assert repr(Training(max_steps=15)) == "Training(max_steps=15)"
    assert config.to_dict(Training(max_steps=15)) == {"max_steps": 15}
    whole = Training(max_steps=15).over(PHASE1)
    assert whole == dataclasses.replace(PHASE1, max_steps=15)
    assert all(UNSET is not value for value in dataclasses.astuple(whole))
    assert Training(max_steps=None).over(Training(max_steps=3)).max_steps is None


@pytest.mark.parametrize(("kind", "default"), [(Align, ALIGN), (Vectors, PHASE1), (Finetune, PHASE2)])
def test_settings_of_a_verb_inherit_its_training_and_are_written_in_full(tmp_path, kind, default):
    expected = dataclasses.replace(default, max_steps=15)
    python = kind(**NEEDED[kind], training=Training(max_steps=15))
    config.save(python, tmp_path / "config.yaml")
    assert python.training == expected
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"] == dataclasses.asdict(expected)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(NEEDED[kind] | {"training": {"max_steps": 15}}))
    assert config.load(kind, tmp_path / "c.yaml") == python == config.load(kind, tmp_path / "config.yaml")


def test_nested_settings_in_a_file_keep_the_verbs_own_defaults():
    experiment = config.from_dict(Experiment, {"align_task": {"rank": 4}, "align_training": {"epochs": 2}})
    assert experiment.align_task == dataclasses.replace(Experiment().align_task, rank=4)
    assert experiment.align_training == dataclasses.replace(Experiment().align_training, epochs=2)


class Asked(Exception):
    """Ends a training before it begins."""


@pytest.mark.parametrize(
    ("run", "default"),
    [
        (lambda t: align(tiny_model(), ROWS, training=t), ALIGN),
        (lambda t: train_vectors(tiny_model(), ROWS, benign=ROWS, training=t), PHASE1),
        (lambda t: finetune(tiny_model(), ROWS, training=t), PHASE2),
        (lambda t: booster.align(tiny_model(), ROWS, harmful=ROWS, training=t), ALIGN),
        (lambda t: lisa.finetune(tiny_model(), ROWS, safe=ROWS, training=t), PHASE2),
        (lambda t: mixing.sequential(tiny_model(), ROWS, ROWS, training=t), PHASE2),
    ],
)
def test_what_a_call_does_not_set_is_the_verbs_own(monkeypatch, run, default):
    seen = []

    def spy(training, steps):
        seen.append(training)
        raise Asked

    monkeypatch.setattr(finetuning, "make_optimizer", spy)
    monkeypatch.setattr(security_vectors, "make_optimizer", spy)
    with pytest.raises(Asked):
        run(Training(max_steps=15, batch_size=1))
    assert seen == [dataclasses.replace(default, max_steps=15, batch_size=1)]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"kind": "steering", "lora": LoRA(4)}, "lora.rank is 4"),
        ({"steering": Steering(scale=2.0)}, "steering.scale is 2"),
        ({"phase1": Phase1("kl", inner_steps=8)}, "phase1.inner_steps is 8"),
    ],
)
def test_settings_of_other_vectors_than_are_trained_are_refused(given, name):
    with pytest.raises(UserError, match=f"^{name}, which is for"):
        Vectors(data="x", **given)
    assert Vectors(data="x", kind="steering", steering=Steering(scale=2.0)).kind == "steering"
    assert Vectors(data="x", phase1=Phase1("min_min", inner_steps=8)).phase1.inner_steps == 8


def test_settings_that_another_optimizer_or_objective_has_are_reported():
    other = Training("adamw", momentum=0.5, max_steps=1, max_seq_len=64)
    for asked in (
        lambda: finetune(tiny_model(), ROWS, vectors=None, training=other),
        lambda: train_vectors(tiny_model(), ROWS, benign=ROWS, training=Training(momentum=0.5)),  # adamw by default
        lambda: Vectors(data="x", training=other),
        lambda: Finetune(data=("x",), vectors=("none",), training=other),
    ):
        with pytest.raises(UserError, match=r"momentum is 0.5, which is for sgd, and the optimizer is adamw: leave"):
            asked()
    short = {"spec": LoRA(2), "training": Training(max_steps=1, max_seq_len=64)}
    with pytest.warns(Advice, match="inner_steps=8: not used by the objective kl; leave it out"):
        train_vectors(tiny_model(), ROWS, benign=ROWS[1:], phase1=Phase1("kl", inner_steps=8), **short)
    with pytest.warns(Advice, match="kl_weight=2: not used by the objective cross_entropy without benign rows"):
        train_vectors(tiny_model(), ROWS, phase1=Phase1("cross_entropy", kl_weight=2.0), **short)
    with pytest.warns(Advice, match=f"{len(ROWS) - 1} of the harmful rows are among the benign ones"):
        vectors = train_vectors(tiny_model(), ROWS, benign=ROWS[1:], **short)
    with pytest.raises(UserError, match="the task is also among the vectors"):
        finetune(tiny_model(), ROWS, vectors=[vectors], task=vectors, training=short["training"])


# Epochs -------------------------------------------------------------------------------------------

ROWS = random_examples(12)
ONCE = sum(len(row.tokens) - 1 for row in ROWS)
SHAPE = {"max_seq_len": 32, "batch_size": 2, "share_prefix": False}


def rows_read(stream, training):
    """Non-padding tokens in each step of a training, and how many steps it has."""
    read, steps, _ = finetuning.stream_and_steps(stream, training)
    feed = read.local_batches()
    taken = [feed.take(training.grad_accum_steps) for _ in range(steps)]
    shapes = {batch["tokens"].shape for batch in taken}
    assert shapes == {(training.grad_accum_steps, stream.batch_size, stream.seq_len)}
    return [int((batch["segments"] > 0).sum()) for batch in taken]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 1), (16, 1), (64, 1), (2, 2), (2, 5), (2, 64)])
def test_an_epoch_is_one_pass_however_many_rows_a_step_takes(batch_size, accumulate):
    stream = Stream({"all": ROWS}, batch_size, 32, epochs=2, share_prefix=False)
    tokens = rows_read(stream, Training(grad_accum_steps=accumulate, epochs=2).over(PHASE2))
    assert (len(tokens), sum(tokens)) == (math.ceil(stream.count() / accumulate), 2 * ONCE)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_can_be_extended_reads_what_the_longer_one_reads(accumulate):
    training = Training(schedule="constant", grad_accum_steps=accumulate).over(PHASE2)
    once, twice = (Stream({"all": ROWS}, 2, 32, epochs=epochs, share_prefix=False) for epochs in (1, 2))
    tokens = rows_read(once, training)
    assert tokens == rows_read(twice, training)[: len(tokens)]


def test_trainings_of_one_epoch_read_each_token_once_and_lisa_adds_its_steps(monkeypatch):
    read = {}

    def only_reads(params, phase, train_step, streams, *, steps, grad_accum_steps, **_):
        read.clear()
        feeds = {name: stream.local_batches() for name, stream in streams.items()}
        for step in range(steps):
            for name in feeds if train_step.takes is None else train_step.takes(step):
                read.setdefault(name, []).append(int((feeds[name].take(grad_accum_steps)["segments"] > 0).sum()))
        return params

    for module in (finetuning, security_vectors):
        monkeypatch.setattr(module, "fit", only_reads)
    steps = math.ceil(Stream({"all": ROWS}, 2, 32, share_prefix=False).count() / 3)
    training = Training(grad_accum_steps=3, epochs=1, **SHAPE)
    finetune(tiny_model(), ROWS, training=training)
    assert {name: (len(tokens), sum(tokens)) for name, tokens in read.items()} == {"learn": (steps, ONCE)}
    train_vectors(tiny_model(), ROWS, benign=ROWS, training=training)
    assert (len(read["learn"]), sum(read["learn"]), len(read["keep"])) == (steps, ONCE, steps)
    lisa.finetune(tiny_model(), ROWS, safe=ROWS, aligned_steps=1, user_steps=1, training=training)
    assert (len(read["learn"]), sum(read["learn"]), len(read["safe"])) == (steps, ONCE, steps)


# Weight decay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"norm": "layer", "qkv_bias": True, "mlp_bias": True}, {"qk_norm": True}])
def test_norms_and_biases_are_not_decayed_whatever_the_architecture(changes):
    decoder = abstract_decoder(dataclasses.replace(ARCHITECTURE, **changes))
    mask = {leaf_name(path): keeps for path, keeps in jax.tree_util.tree_leaves_with_path(decayed(decoder))}
    left = {name for name, decays in mask.items() if not decays}
    assert left == {name for name in mask if "norm" in name or name.endswith("bias")} != set()
    assert {"embed", "layers.q_proj.kernel", "layers.down_proj.kernel"} <= set(mask) - left
    assert all(jax.tree.leaves(decayed(LoRA(rank=2).init(ARCHITECTURE, jax.random.key(0)))))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_without_a_gradient_is_the_decay_alone(optimizer):
    training = Training(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5, momentum=0.0, warmup_steps=0)
    params = {"kernel": jnp.full((2, 3), 2.0), "attention_norm": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    transform = make_optimizer(training, 5)
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["kernel"], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)
    for name in ("attention_norm", "bias"):
        np.testing.assert_array_equal(moved[name], params[name])


def test_a_refusal_names_the_setting_for_those_who_read_it():
    with pytest.raises(SettingError) as caught:
        Phase1(kl_weight=-1)
    assert (caught.value.name, caught.value.problem) == ("kl_weight", " is -1.0: it must be at least 0")
