"""A run directory belongs to its settings and inputs, and to one process at a time."""

import dataclasses
import json
import os

import pytest

import secvec_jax as sv
from secvec_jax.checks import checked
from secvec_jax.config import Training, load
from secvec_jax.errors import UserError
from secvec_jax.files import LOCK, read_log
from secvec_jax.terminal import Console
from secvec_jax.vectors.lora import LoRA
from secvec_jax.workspace import run_directory
from secvec_jax.workspace.run_directory import claim, stage_record
from secvec_jax.workspace.stages import Stages, curves


@checked
@dataclasses.dataclass(frozen=True)
class Experiment:
    seeds: tuple[int, ...] = (0, 1)
    folder: str | None = None
    lora: LoRA | None = None
    training: Training = Training.base
    overwrite: bool = False


@pytest.fixture(autouse=True)
def free():
    yield
    for folder in list(run_directory._locks):
        run_directory.release(folder)


def begun(folder, settings=Experiment(), inputs=None):
    """The folder of a run that has made steps and finished a stage."""
    claim(settings, folder, inputs or {})
    (folder / "metrics.jsonl").touch()
    (folder / "stages").mkdir()
    (folder / "stages" / "finetune.json").write_text(json.dumps(stage_record(2.0, {"result": {}})))
    return folder


def test_a_folder_is_claimed_once_and_again_by_the_same_settings_and_inputs(tmp_path):
    inputs = {"--data rows.jsonl": "sha256:1", "--model m": None}
    folder = begun(tmp_path / "runs" / "first", inputs=inputs)
    written = (folder / "config.yaml").read_bytes()
    assert load(Experiment, folder / "config.yaml") == Experiment()
    assert claim(Experiment(), folder, inputs | {"--model m": "sha256:2"}) == folder, "what was not known is learned"
    assert (folder / "config.yaml").read_bytes() == written
    with pytest.raises(UserError, match="--model m has changed"):
        claim(Experiment(), folder, {"--model m": "sha256:3"})


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Experiment(training=Training(learning_rate=9.0)), "training.learning_rate was 0.001, is now 9.0"),
        (Experiment(seeds=(5,)), r"seeds was \[0, 1\], is now \[5\]"),
        (Experiment(folder="x"), "folder was None, is now 'x'"),
        (Experiment(lora=LoRA(4)), r"lora was None, is now \{'rank': 4, 'alpha': 16.0, .*\}"),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_left_alone(tmp_path, other, difference):
    begun(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=rf"different settings \({difference}\): pass --overwrite .* another --out"):
        claim(other, tmp_path, {})
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_settings_that_no_result_depends_on_may_change(tmp_path):
    begun(tmp_path)
    changed = Experiment(training=Training(save_every_seconds=5.0, max_checkpoints=7))
    claim(changed, tmp_path, {})
    assert load(Experiment, tmp_path / "config.yaml") == changed


def test_changed_inputs_are_refused_in_one_line_that_names_them(tmp_path):
    begun(tmp_path, inputs={"--data a b.jsonl": "sha256:1"})
    with pytest.raises(UserError, match=r"--data a b\.jsonl has changed since .*--overwrite .*another --out") as caught:
        claim(Experiment(), tmp_path, {"--data a b.jsonl": "sha256:2"})
    assert "\n" not in str(caught.value)
    claim(Experiment(), tmp_path, {"--data a b.jsonl": "sha256:1"})


def test_another_version_of_the_format_is_another_run(tmp_path, monkeypatch):
    begun(tmp_path)
    monkeypatch.setattr(run_directory, "FORMAT", run_directory.FORMAT + 1)
    with pytest.raises(UserError, match="format was 1, is now 2"):
        claim(Experiment(), tmp_path, {})


OLDER = r"was written by secvec_jax 0\.1\.0 \(this is .*\): choose another --out, or pass --overwrite$"


@pytest.mark.parametrize("recorded", [None, "", '{"format": 1, "--data a": "sha256:1"}'])
def test_a_run_that_names_no_version_is_one_of_an_older_version(tmp_path, recorded):
    begun(tmp_path)
    (tmp_path / "inputs.json").unlink() if recorded is None else (tmp_path / "inputs.json").write_text(recorded)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=OLDER) as caught:
        claim(Experiment(), tmp_path, {"--data a": "sha256:1"})
    assert "\n" not in str(caught.value) and (tmp_path / "config.yaml").read_bytes() == before
    claim(Experiment(), tmp_path, {"--data a": "sha256:1"}, overwrite=True)


@pytest.mark.parametrize("key", ["lines", "length", "accumulate", "clip", "keep_checkpoints", "steps"])
def test_a_run_with_the_settings_of_an_older_version_is_reported_as_such(tmp_path, key):
    begun(tmp_path)
    (tmp_path / "inputs.json").write_text('{"format": 1}')
    (tmp_path / "config.yaml").write_text(f"training: {{{key}: 3}}\n")
    with pytest.raises(UserError, match=OLDER):
        claim(Experiment(), tmp_path, {})


def test_a_run_of_another_version_goes_on_if_its_settings_are_known(tmp_path, monkeypatch):
    begun(tmp_path)
    monkeypatch.setattr(run_directory, "VERSION", "9.0.0")
    (tmp_path / "config.yaml").write_text("unknown: 3\n")
    with pytest.raises(UserError, match=rf"written by secvec_jax {sv.__version__} \(this is 9\.0\.0\)"):
        claim(Experiment(), tmp_path, {})
    (tmp_path / "config.yaml").write_text("seeds: [0, 1]\n")
    claim(Experiment(), tmp_path, {})


def test_overwrite_deletes_what_runs_make_and_nothing_else(tmp_path):
    begun(tmp_path, inputs={"--data a": "sha256:1"})
    for name in ("model", "vectors", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    other = Experiment(seeds=(7,), overwrite=True)
    claim(other, tmp_path, {"--data a": "sha256:2"}, overwrite=True)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"config.yaml", "inputs.json", LOCK, "notes", "mine.txt"}
    assert load(Experiment, tmp_path / "config.yaml") == Experiment(seeds=(7,)), (
        "the next start does not overwrite again"
    )


def test_overwrite_never_deletes_its_own_input_nor_anything_for_one_that_is_missing(tmp_path):
    begun(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(UserError, match="which --overwrite would delete"):
        claim(Experiment(), tmp_path, {f"--model {model}": "sha256:1"}, overwrite=True)
    with pytest.raises(UserError, match=r"--data gone\.jsonl cannot be read"):
        claim(Experiment(), tmp_path, {"--data gone.jsonl": None}, overwrite=True)
    assert model.is_dir() and (tmp_path / "metrics.jsonl").exists()


# Longer runs --------------------------------------------------------------------------------------

CONSTANT = Experiment(training=Training(schedule="constant", max_steps=10))


def longer(settings, **changes):
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **changes))


def test_a_constant_schedule_can_be_extended_and_its_stages_are_open_again(tmp_path):
    begun(tmp_path, CONSTANT)
    claim(longer(CONSTANT, max_steps=20), tmp_path, {})
    assert not list(tmp_path.glob("stages/*.json"))
    assert json.loads((tmp_path / "stages" / "finetune.seconds").read_text())["seconds"] == 2.0
    assert load(Experiment, tmp_path / "config.yaml").training.max_steps == 20


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_falling_schedule_cannot_be_extended_and_says_why(tmp_path, schedule):
    begun(tmp_path, longer(CONSTANT, schedule=schedule))
    with pytest.raises(UserError, match=f"cannot be extended: its {schedule} schedule depends on the number of steps"):
        claim(longer(CONSTANT, schedule=schedule, max_steps=20), tmp_path, {})
    assert list(tmp_path.glob("stages/*.json"))


def test_a_longer_run_is_not_made_shorter_nor_another(tmp_path):
    begun(tmp_path, CONSTANT)
    with pytest.raises(UserError, match="already contains a longer run"):
        claim(longer(CONSTANT, max_steps=5), tmp_path, {})
    with pytest.raises(UserError, match="different settings"):
        claim(longer(CONSTANT, max_steps=20, batch_size=7), tmp_path, {})
    begun_inputs = {"--data a": "sha256:1"}
    claim(CONSTANT, tmp_path, begun_inputs)
    with pytest.raises(UserError, match="--data a has changed"):
        claim(longer(CONSTANT, max_steps=20), tmp_path, {"--data a": "sha256:2"})
    assert list(tmp_path.glob("stages/*.json")), "a run that is refused stays finished"


# What is in the folder ----------------------------------------------------------------------------


def test_settings_newer_than_a_run_have_their_defaults_there(tmp_path):
    begun(tmp_path)
    (tmp_path / "config.yaml").write_text("training:\n  epochs: 1\nseeds: [0, 1]\n")
    assert claim(Experiment(), tmp_path, {}) == tmp_path
    with pytest.raises(UserError, match="folder was None, is now 'x'"):
        claim(Experiment(folder="x"), tmp_path, {})


@pytest.mark.parametrize("content", [b"a: [", b"", b"3", b"name: other", b"\xff\xfe"])
def test_a_folder_with_a_broken_config_is_refused(tmp_path, content):
    claim(Experiment(), tmp_path, {})
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="different settings"):
        claim(Experiment(), tmp_path, {})


def test_a_run_that_failed_before_its_first_step_gives_way(tmp_path):
    claim(Experiment(), tmp_path, {"--data a": "sha256:1"})
    claim(Experiment(folder="x"), tmp_path, {"--data a": "sha256:2"})
    assert load(Experiment, tmp_path / "config.yaml") == Experiment(folder="x")
    assert run_directory.inputs_of_run(tmp_path)["--data a"] == "sha256:2"


DAMAGE = [b"\xff\xfe{", b"[" * 100_000, b"[]", b"null", b"", b'{"seconds": "x", "result": 1}', b"pipe"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: ascii(damage[:8]))
def test_damaged_files_of_a_run_are_reported_with_their_cure(tmp_path, damage):
    def put(path):
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path) if damage == b"pipe" else path.write_bytes(damage)

    folder = begun(tmp_path / "run", CONSTANT, inputs={"--data a": "sha256:1"})
    for name in ("config.yaml", "inputs.json"):
        before = (folder / name).read_bytes()
        put(folder / name)
        with pytest.raises(UserError, match="--overwrite"):
            claim(CONSTANT, folder, {"--data a": "sha256:2"})
        (folder / name).unlink()
        (folder / name).write_bytes(before)
    put(folder / "stages" / "finetune.json")
    stages = Stages(folder, Console())
    for read in (lambda: claim(longer(CONSTANT, max_steps=20), folder, {}), lambda: stages.run("finetune", print)):
        with pytest.raises(UserError, match=r"finetune\.json is .*(delete it, and|give a regular file)"):
            read()
    if damage != b"pipe":
        put(folder / "metrics.jsonl")
        assert read_log(folder / "metrics.jsonl") in ([], [{"seconds": "x", "result": 1}])


def test_a_folder_that_no_path_leads_to_is_reported(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "loop/x", "a\0b"):
        with pytest.raises(UserError, match="is not a path that can be read or written"):
            claim(CONSTANT, tmp_path / name, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write into"):
        claim(Experiment(), tmp_path / "run", {})


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        claim(Experiment(), tmp_path / "file", {})


# One process at a time ----------------------------------------------------------------------------


def test_a_second_process_is_refused_while_the_first_is_alive_and_not_afterwards(tmp_path):
    ours, theirs = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # holds the folder until it is killed
        try:
            claim(Experiment(), tmp_path, {})
            os.write(ours[1], b"1")
            os.read(theirs[0], 1)
        finally:
            os._exit(0)
    assert os.read(ours[0], 1) == b"1"
    with pytest.raises(UserError, match="another process is using"):
        claim(Experiment(), tmp_path, {})
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists(), "the file of a killed run"
    claim(Experiment(), tmp_path, {})
    claim(Experiment(), tmp_path, {})  # the same process may
    for end in (*ours, *theirs):
        os.close(end)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_left_as_it_is(tmp_path, overwrite):
    """Also one whose files have the names of a run's."""
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "metrics.jsonl").write_text("mine")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"files that no run of this library wrote \(config\.yaml\)"):
        claim(Experiment(), tmp_path, {}, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl", "model"]
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_a_run_that_was_killed_before_its_first_file_resumes(tmp_path):
    (tmp_path / ".inputs.json.unfinished-abcd1234").touch()
    claim(Experiment(), tmp_path, {})
    assert (tmp_path / "inputs.json").is_file()


def test_a_further_file_is_none_of_the_runs_own(tmp_path):
    run_directory.check_not_of_run(tmp_path / "clean.jsonl", "--write-clean", tmp_path)
    for name in ("scores.jsonl", LOCK, "stages/screen.json"):
        with pytest.raises(UserError, match="is a file of the run itself"):
            run_directory.check_not_of_run(tmp_path / name, "--write-clean", tmp_path)


@pytest.mark.parametrize("change", [{"result": [1]}, {"inputs": {"a": "sha256:1"}}, {"makes": "x"}, {"digest": None}])
def test_a_changed_record_of_a_stage_is_reported(tmp_path, change):
    stages = Stages(tmp_path, Console(quiet=True))
    assert stages.run("score", lambda stage: {"refusal": (1.0, float("nan")), 2: 0, 10: 0})
    path = tmp_path / "stages" / "score.json"
    assert stages.run("score", print)["2"] == 0, "it is read as it was written"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"score\.json is damaged .*: delete it, and the stage runs again"):
        stages.run("score", print)


def test_damaged_lines_of_a_log_are_left_out_of_curves(tmp_path):
    line = {"stage": "plain", "step": 1, "loss/harmful": 2.0, "loss/benign": 1.0}
    changes = [{"step": "x"}, {"step": None}, {"stage": ["plain"]}, {"step": float("nan")}, {"loss/harmful": "y"}]
    lines = [json.dumps(line | {"loss/benign": 9.0} | change) for change in changes[:4]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "pl', json.dumps(line), "[]", "\0"]))
    assert curves(tmp_path / "metrics.jsonl", {"plain": "plain"}) == {
        "plain": {"harmful": [(1, 2.0)], "benign": [(1, 1.0)]}
    }


def test_the_time_of_an_attempt_counts_where_it_goes_on_and_not_where_its_input_was_refused(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("secvec_jax.workspace.stages.time.monotonic", lambda: float(next(clock)))
    counted = []
    for error in (UserError("a row cannot be read"), KeyboardInterrupt()):

        def fail(stage, error=error):
            raise error

        stages = Stages(tmp_path, Console(quiet=True))
        with pytest.raises(type(error)):
            stages.run("train", fail)
        counted.append(json.loads((tmp_path / "stages" / "train.seconds").read_text())["seconds"])
    assert counted[0] == 0 and counted[1] > 0
