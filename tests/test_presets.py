"""`--preset`: each one is valid, flags override it, and the one that is chosen changes speed and memory only."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from secvec_jax import cli, command_line, config, presets
from secvec_jax.errors import UserError
from secvec_jax.model.decoder import abstract_decoder
from secvec_jax.model.hub import load_architecture
from secvec_jax.planning.gpus import parse_gpus
from secvec_jax.planning.torus import CHIPS
from secvec_jax.recipes import preset_choice
from secvec_jax.recipes.align import Align
from secvec_jax.recipes.finetune import Finetune
from secvec_jax.recipes.plan import PlanRun
from secvec_jax.recipes.protect import Protect
from secvec_jax.recipes.vectors import Vectors
from secvec_jax.sharding import parse_mesh
from secvec_jax.trees import num_parameters
from secvec_jax.verb_arguments import Verb
from tests.test_package import ROOT

VERBS = {
    "align": (Align, ()),
    "vectors": (Vectors, ("--data", "x")),
    "finetune": (Finetune, ("--data", "x", "--vectors", "none")),
    "protect": (Protect, ("--data", "x")),
}
NAMES = list(presets.presets())
CHIP_OF = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5"}


def parsed(verb: str, *arguments: str):
    """The settings of a verb with these arguments, and its mesh."""
    kind, required = (VERBS | {"plan": (PlanRun, ())})[verb]
    settings, cluster = command_line.parse(cli.TRAIN[verb], kind, [verb, *required, *arguments])
    return settings, None if cluster is None else cluster.mesh


def test_they_are_the_files_of_configs_and_an_installed_package_has_them():
    assert NAMES and set(NAMES) == {path.stem for path in (ROOT / "configs" / "presets").iterdir()}
    assert presets.FOLDER.resolve() == ROOT / "configs" / "presets"
    assert "preset_files/*.yaml" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    preset, runs = presets.named(name), {}
    for verb in VERBS:
        settings, mesh = parsed(verb, "--preset", name)
        runs[verb] = settings
        assert mesh == preset.mesh and settings.preset == name and presets.holds(settings)
        sizes = parse_mesh(mesh) if mesh else {}
        shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
        assert preset.devices == shards * sizes.get("tensor", 1)
        assert settings.training.batch_size % (shards * (2 if verb == "vectors" else 1)) == 0
        flat = config.flat(dict(getattr(preset, verb)))
        sets = {"frozen_weights", "task_lora.rank", "task_lora.alpha", "training.batch_size", "training.remat"}
        assert set(flat) <= sets, "a preset decides memory and speed, and no optimizer whose safety is not measured"
    if preset.platform == "cpu":
        assert not preset.topology and not preset.memory_gib
        return
    architecture = load_architecture(preset.model)
    assert preset.fits_size(num_parameters(abstract_decoder(architecture)))
    assert architecture.num_kv_heads % sizes.get("tensor", 1) == 0
    if preset.platform == "gpu":
        device, count = parse_gpus(preset.topology)
    else:
        kind, shape = preset.topology.split(":")
        device, count = CHIPS[CHIP_OF[kind]], 1
        for side in shape.split("x"):
            count *= int(side)
    assert count == preset.devices
    assert set(preset.memory_gib) == set(VERBS) and presets.largest(preset) < device.memory / 2**30
    for phase in VERBS:
        plan, _ = parsed("plan", "--preset", name, "--phase", phase)
        run = runs[phase]
        assert (plan.model, plan.topology, plan.mesh) == (preset.model, preset.topology, preset.mesh)
        assert (plan.training.batch_size, plan.training.remat) == (run.training.batch_size, run.training.remat)
        assert plan.frozen_weights == run.frozen_weights
        assert plan.task_lora == getattr(run, "task_lora", None)


def test_one_that_contradicts_other_flags_is_named():
    for verb, *arguments in (("protect", "--defense", "vaccine", "--base", "b"), ("align", "--no-task-lora")):
        with pytest.raises(UserError, match=r"^--preset 7-8b-24gb does not fit .* int8 .*: use --preset none$"):
            parsed(verb, "--preset", "7-8b-24gb", *arguments)
    with pytest.raises(UserError, match=r"^'vaccine' needs --base"):  # whatever the preset
        parsed("protect", "--preset", "7-8b-24gb", "--defense", "vaccine")


def test_one_that_is_overridden_in_what_is_trained_does_not_hold():
    for arguments in (["--no-task-lora", "--frozen-weights", "float32"], ["--frozen-weights", "nf4"]):
        assert not presets.holds(parsed("finetune", "--preset", "7-8b-80gb", *arguments)[0])
    assert not presets.holds(parsed("finetune", "--preset", "7-8b-8x80gb", "--task-lora.rank", "8")[0])
    assert not presets.holds(parsed("finetune")[0])


def test_flags_and_files_override_it(tmp_path):
    name = "7-8b-80gb"
    settings, _ = parsed("finetune", "--preset", name, "--batch-size", "3", "--task-lora.rank", "5")
    assert settings.training.batch_size == 3 and settings.training.remat == "dots"
    assert settings.task_lora.rank == 5 and settings.task_lora.alpha == 32
    assert parsed("finetune", "--preset", name, "--no-task-lora", "--frozen-weights", "float32")[0].task_lora is None
    assert parsed("finetune", "--preset", "7-8b-8x80gb", "--mesh", "fsdp=2")[1] == "fsdp=2"
    (tmp_path / "c.yaml").write_text(f"preset: {name}\ntraining: {{batch_size: 5}}\n")
    settings, _ = parsed("vectors", "--config", str(tmp_path / "c.yaml"), "--remat", "full")
    assert (settings.training.batch_size, settings.training.remat, settings.preset) == (5, "full", name)
    config.save(settings, tmp_path / "run.yaml")  # a run's own file
    assert parsed("vectors", "--config", str(tmp_path / "run.yaml"))[0] == settings
    assert parsed("vectors", "--preset", "none")[0] == dataclasses.replace(parsed("vectors")[0], preset="none")
    (tmp_path / "align.yaml").write_text(f"preset: {name}\ntraining: {{batch_size: 5}}\n")
    loaded = config.load(Align, tmp_path / "align.yaml")
    assert loaded == parsed("align", "--config", str(tmp_path / "align.yaml"))[0]
    assert (loaded.training.batch_size, loaded.task_lora.rank, loaded.frozen_weights) == (5, 16, "bfloat16")


def test_what_is_said_of_it_is_what_is_left_of_it(tmp_path):
    def said(*arguments):
        return preset_choice.line(parsed("vectors", *arguments)[0])

    whole = said("--preset", "7-8b-24gb")
    assert whole.startswith("preset: 7-8b-24gb (7 to 8 billion") and "except" not in whole
    assert "), except batch_size, which flags or" in said("--preset", "7-8b-24gb", "--batch-size", "3")
    config.save(parsed("vectors", "--preset", "none")[0], tmp_path / "config.yaml")  # as that of a run: complete
    changed = "preset: 7-8b-24gb changes nothing, since flags or the config file set frozen_weights, batch_size, remat"
    assert said("--config", str(tmp_path / "config.yaml"), "--preset", "7-8b-24gb") == changed
    assert said("--preset", "none") is None


def test_the_small_models_preset_keeps_more_for_the_backward_pass_and_is_for_every_training():
    for verb in VERBS:
        plain, mesh = parsed(verb)
        training = dataclasses.replace(plain.training, batch_size=2, remat="dots")
        expected = dataclasses.replace(plain, preset="135m-cpu", training=training)
        assert parsed(verb, "--preset", "135m-cpu") == (expected, mesh) and presets.holds(expected)


def test_one_without_settings_of_the_verb_is_refused(monkeypatch):
    without = dataclasses.replace(presets.named("7-8b-80gb"), align={}, protect={})
    known = {"135m-cpu": presets.named("135m-cpu"), "without": without}
    monkeypatch.setattr(presets, "presets", lambda: known)
    for verb in ("align", "protect"):
        message = f"this preset has no settings for {verb}: leave it out, or use 135m-cpu"
        with pytest.raises(UserError, match=f"^{message}$"):
            parsed(verb, "--preset", "without")


def test_without_a_name_all_are_listed_and_an_unknown_one_is_refused(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        parsed("vectors", "--preset")
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and [line.split()[0] for line in lines] == NAMES
    monkeypatch.setattr("sys.argv", ["train.py", "vectors", "--data", "x", "--preset", "7-8b-80"])
    assert command_line.main(cli.DESCRIPTION, cli.TRAIN) == 2
    *listed, error = capsys.readouterr().err.splitlines()
    assert listed == [" ".join(line.split()) for line in lines]
    assert error == "error: unknown preset '7-8b-80': did you mean '7-8b-80gb'?"


def test_plan_refuses_what_it_cannot_compile_for():
    with pytest.raises(UserError, match="plan compiles for GPUs and TPUs"):
        parsed("plan", "--preset", "135m-cpu")
    with pytest.raises(UserError, match="all weights are trained: add --task-lora"):
        _ = PlanRun(frozen_weights="nf4").precision
    assert PlanRun(phase="vectors").precision == "bfloat16" and PlanRun().precision == "float32"


def test_plan_takes_the_phases_settings_and_refuses_a_preset_without(monkeypatch):
    full = presets.named("7-8b-80gb")
    having = dataclasses.replace(full, align=full.finetune, protect={"training": {"batch_size": 3}})
    without = dataclasses.replace(full, align={}, protect={})
    known = {"135m-cpu": presets.named("135m-cpu"), "with": having, "without": without}
    monkeypatch.setattr(presets, "presets", lambda: known)
    aligned, _ = parsed("plan", "--preset", "with", "--phase", "align")
    assert (aligned.phase, aligned.topology, aligned.task_lora.rank) == ("align", full.topology, 16)
    assert parsed("plan", "--preset", "with", "--phase", "protect")[0].training.batch_size == 3
    for phase in ("align", "protect"):
        with pytest.raises(UserError, match=f"^this preset has no settings for {phase}: leave it out, or use with$"):
            parsed("plan", "--preset", "without", "--phase", phase)
    with pytest.raises(UserError, match=r"^--phase is 'potato'"):
        parsed("plan", "--preset", "with", "--phase", "potato")


@pytest.mark.parametrize("flags", [(), ("--no-task-lora",), ("--task-lora.rank", "4"), ("--optimizer", "sgd")])
def test_plan_trains_what_protect_trains_with_its_optimizer(flags):
    run = parsed("protect", *flags)[0]
    plan = parsed("plan", "--phase", "protect", *flags)[0]
    assert (plan.task_lora, plan.training.optimizer) == (run.task_lora, run.training.optimizer)


def test_one_of_another_size_is_refused(monkeypatch):
    monkeypatch.setattr(preset_choice, "_parameters", lambda model: 135_000_000)
    message = "--preset 7-8b-80gb is for models of 6.0 billion to 9.0 billion parameters, and tiny has 135 million: use"
    with pytest.raises(UserError, match=f"^{message} 135m-cpu, or leave it out$"):
        Vectors("x", model="tiny", preset="7-8b-80gb").default_preset()
    assert Vectors("x", preset="135m-cpu").default_preset() is None


@pytest.fixture
def hardware(monkeypatch):
    """Sets the model's parameters, the platform, the memory and the number of devices."""

    def use(
        parameters: int | None, platform: str, memory: float | None = None, devices: int = 1, fsdp: int | None = None
    ) -> None:
        monkeypatch.setattr(preset_choice, "_parameters", lambda model: parameters)
        monkeypatch.setattr(preset_choice, "platform", lambda: platform)
        monkeypatch.setattr(preset_choice, "_memory_gib", lambda: memory)
        mesh = SimpleNamespace(empty=devices == 1, size=devices)
        monkeypatch.setattr(jax.sharding, "get_mesh", lambda: mesh)
        shards = {"batch": devices, "embed": fsdp or devices, "heads": 1}
        monkeypatch.setattr(preset_choice, "num_shards", shards.get)

    return use


@pytest.mark.parametrize(
    ("made", "chosen"),
    [
        ((135_000_000, "cpu"), "135m-cpu"),
        ((135_000_000, "gpu", 76.0), None),
        ((8_000_000_000, "cpu"), None),
        ((8_000_000_000, "gpu", 76.0), "7-8b-80gb"),
        ((8_000_000_000, "gpu", 18.0), "7-8b-24gb"),
        ((3_000_000_000, "gpu", 18.0), "1-3b-24gb"),
        ((8_000_000_000, "gpu", 4.0), None),
        ((8_000_000_000, "gpu", None), None),
        ((8_000_000_000, "gpu", 76.0, 8), "7-8b-8x80gb"),
        ((8_000_000_000, "gpu", 76.0, 4), None),
        ((8_000_000_000, "gpu", 76.0, 8, 4), None),  # twice the weights on each device, as in slice=2,fsdp=4
        ((70_000_000_000, "tpu", 95.0, 64, 16), "70b-v5p-128"),
        ((70_000_000_000, "tpu", 95.0, 64), None),
        ((None, "gpu", 76.0), None),
    ],
)
def test_the_size_the_devices_and_their_memory_decide(hardware, made, chosen):
    hardware(*made)
    for phase in VERBS:
        assert preset_choice.choose("m", phase) == chosen


def test_it_is_chosen_on_the_command_line_and_kept_when_the_run_is_resumed(hardware, tmp_path, monkeypatch):
    seen = []
    verb = Verb("", lambda: (Vectors, lambda settings, command: seen.append(settings)))
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["train.py"])

    def run(*arguments: str) -> Vectors:
        typed = ["vectors", "--data", "x", "--benign", "x", "--out", str(out), *arguments]
        assert command_line.main("", {"vectors": verb}, typed) == 0
        return seen.pop()

    hardware(8_000_000_000, "gpu", 76.0)
    settings = run("--remat", "full")
    assert (settings.preset, settings.training.batch_size, settings.training.remat) == ("7-8b-80gb", 8, "full")
    assert run("--preset", "none").training.batch_size == 2
    assert run("--objective", "min_min").preset is None  # whose copy of the weights is trained
    assert run("--frozen-weights", "float32").preset is None
    out.mkdir()
    config.save(settings, out / "config.yaml")
    (out / "metrics.jsonl").write_text("{}\n")
    hardware(8_000_000_000, "gpu", 22.0)
    assert run("--remat", "full") == settings
    assert run("--overwrite").preset == "7-8b-24gb"
    hardware(135_000_000, "cpu")
    out = tmp_path / "other"
    plain = run("--preset", "none")
    in_dots = dataclasses.replace(plain.training, remat="dots")
    assert dataclasses.replace(run(), preset="none") == dataclasses.replace(plain, training=in_dots)
