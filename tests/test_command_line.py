"""The command line: settings from flags and files, help texts, and errors."""

import contextlib
import dataclasses
import errno
import io
import re
import sys
from typing import Literal

import pytest

import secvec_jax as sv
from secvec_jax import cli, command_line, config, flags
from secvec_jax.checks import PositiveFloat, PositiveInt, Texts, checked
from secvec_jax.config import Training
from secvec_jax.errors import UserError
from secvec_jax.terminal import print_any_character
from secvec_jax.verb_arguments import Verb
from secvec_jax.workspace import stages
from tests import processes


@checked
@dataclasses.dataclass(frozen=True)
class Bake:
    """Bake something."""

    what: str = "bread"
    """what to bake"""
    tins: tuple[str, ...] = ("round",)
    training: Training = dataclasses.field(default_factory=Training)
    out: str = "runs/bread"


def run(*arguments: str, function=lambda settings, command: None) -> tuple[int, Bake | None]:
    seen = []

    def verb(settings, command):
        seen.append(settings)
        function(settings, command)

    code = command_line.main("A kitchen.", {"bake": Verb("bake something", lambda: (Bake, verb))}, list(arguments))
    return code, seen[0] if seen else None


def test_settings_come_from_the_arguments():
    code, settings = run("bake", "--what", "cake", "--tins", "a", "b", "--learning-rate", "1e-5", "--max-steps", "7")
    assert code == 0
    assert settings == Bake("cake", ("a", "b"), Training(learning_rate=1e-5, max_steps=7))


def test_a_file_fills_in_and_arguments_count_more(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("what: pie\ntraining:\n  epochs: 3\n  learning_rate: 1e-4\n")
    code, settings = run("bake", "--config", str(path), "--epochs", "5")
    assert code == 0
    assert settings == Bake("pie", ("round",), Training(epochs=5, learning_rate=1e-4))
    assert run("bake", f"--config={path}")[1].training.epochs == 3


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("bake", "--epochs", "0"), "epochs is 0"),
        (("bake", "--config", "/nowhere/c.yaml"), "--config"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, hint):
    assert run(*arguments)[0] == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and hint in lines[0]


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  epoch: 3\n")
    assert run("bake", "--config", str(path))[0] == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err


def test_errors_of_a_verb_have_their_exit_codes(capsys):
    def raises(error):
        def function(settings, command):
            raise error

        return run("bake", function=function)[0]

    assert raises(UserError("no\nsuch thing")) == 2
    assert capsys.readouterr().err == "error: no such thing\n"
    assert raises(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped: rerun the same command to resume\n"
    full = OSError(errno.ENOSPC, "No space left on device", "a/file")
    for error, about in ((full, "a/file: "), (RuntimeError("I/O error: No space left on device (os error 28)"), "")):
        assert raises(error) == 2
        assert f"error: {about}No space left on device: " in capsys.readouterr().err
    assert raises(PermissionError(errno.EACCES, "Permission denied", "rows")) == 2
    assert capsys.readouterr().err.startswith("error: rows: Permission denied: ")
    for error in (MemoryError("466 TiB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        assert raises(error) == 2
        assert re.fullmatch(r"error: out of memory \(.+\): choose smaller sizes .*\n", capsys.readouterr().err)
    with pytest.raises(ZeroDivisionError):
        raises(ZeroDivisionError())


# Flags --------------------------------------------------------------------------------------------


@checked
@dataclasses.dataclass(frozen=True)
class Oven:
    """An oven."""

    heat: PositiveInt = 180
    """degrees"""
    fan: bool = False
    """50% faster"""


@checked
@dataclasses.dataclass(frozen=True)
class Roast:
    """Roast something."""

    what: Texts
    """what to roast"""
    weights: tuple[PositiveFloat, ...] = ()
    """of each, in kg"""
    minutes: PositiveInt | None = 60
    """time; by default until it is done"""
    baste: bool = True
    """baste it"""
    sauce: Literal["none", "gravy"] | None = None
    """what to serve it with"""
    oven: Oven = Oven(heat=200)
    grill: Oven | None = None
    """finish it under a grill"""
    second: Oven | None = Oven(heat=100)
    """keep it warm"""
    training: Training = Training.base


def roast(*arguments: str) -> Roast:
    return command_line.parse(Verb("", lambda: (Roast, None), ("--what beef",)), Roast, ["roast", *arguments])[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--weights", "1", "2.5e0"], {"weights": (1.0, 2.5)}),
        (["--minutes", "none"], {"minutes": None}),
        (["--no-baste"], {"baste": False}),
        (["--no-baste", "--baste"], {"baste": True}),
        (["--sauce", "gravy"], {"sauce": "gravy"}),
        (["--oven.fan"], {"oven": Oven(200, True)}),
        (["--oven.heat=90", "--no-oven.fan"], {"oven": Oven(90)}),
        (["--grill"], {"grill": Oven()}),
        (["--grill.heat", "250"], {"grill": Oven(250)}),
        (["--second.fan"], {"second": Oven(100, True)}),
        (["--no-second"], {"second": None}),
        (["--learning-rate", "3"], {"training": Training(learning_rate=3.0).over(Training.base)}),
    ],
)
def test_flags(tmp_path, arguments, expected):
    assert roast("--what", "beef", *arguments) == Roast("beef", **expected)
    config.save(Roast("beef", **expected), tmp_path / "c.yaml")
    assert roast("--config", str(tmp_path / "c.yaml")) == Roast("beef", **expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-second", "--second.fan"], "--no-second and --second.fan exclude each other"),
        (["--baste", "true"], "--baste takes no value: write --baste, or --no-baste"),
        (["--no-baste=false"], "--no-baste takes no value: write --baste, or --no-baste"),
        (["--oven.fan", "False"], "--oven.fan takes no value: write --oven.fan, or --no-oven.fan"),
        (["--oven.heat", "0"], "--oven.heat is 0: it must be at least 1"),
        (["--weights", "1", "x"], "--weights is 'x': it must be a number"),
        (["--weights", "1", "--weights", "2"], "--weights is given twice: give all values after one, --weights ONE"),
        (["--config", "a", "--config", "b"], "--config is given twice, and one file is read: put all"),
        (["--weights", "1", "0"], "--weights is 0.0: it must be greater than 0"),
        (["--sauce", "ketchup"], "--sauce is 'ketchup': use one of none, gravy"),
        (["--max-steps", "many"], "--max-steps is 'many': it must be an integer"),
    ],
)
def test_a_wrong_flag_is_named_as_it_was_given(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        roast("--what", "beef", *arguments)


def test_a_file_is_named_for_its_own_mistakes_only(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("oven: {heat: 0}\nminutes: 3\n")
    with pytest.raises(UserError, match=rf"^{path}\.oven\.heat is 0"):
        roast("--config", str(path), "--what", "beef", "--minutes", "5")
    with pytest.raises(UserError, match=r"^--minutes is 0"):
        roast("--config", str(path), "--what", "beef", "--oven.heat", "5", "--minutes", "0")
    for content, message in (("- 1", "must be a mapping"), ("oven: 3", "oven must be a mapping"), ("x: 1", "key 'x'")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            roast("--config", str(path), "--what", "beef", "--oven.heat", "5")


def test_a_required_setting_may_come_from_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("what: beef\n")
    assert roast("--config", str(tmp_path / "c.yaml")) == Roast("beef")
    with pytest.raises(UserError, match=r"^--what is required: what to roast$"):
        roast("--minutes", "3")


# Help ---------------------------------------------------------------------------------------------

ALL = [(door, name) for door in (cli.TRAIN, cli.EVAL) for name in door]


def help_text(capsys, *arguments: str, verbs=cli.TRAIN | cli.EVAL) -> str:
    with pytest.raises(SystemExit) as end:
        command_line.main("A kitchen.", verbs, list(arguments))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("door", "name"), ALL, ids=lambda value: value if isinstance(value, str) else "")
def test_every_verb_has_a_readable_help(capsys, monkeypatch, door, name):
    monkeypatch.setenv("COLUMNS", "110")
    settings, function = door[name].load()
    text = help_text(capsys, name, "--help")
    assert callable(function) and "examples:" in text and len(text.splitlines()) < 240
    usage, *_ = text.splitlines()
    for group in flags.groups(settings):
        for flag in group.flags:
            assert flag.help, f"{flag.key} has no help"
            if flag.default is flags.REQUIRED:
                assert (flag.name or flag.metavar) in usage
    for clutter in ("(default: ())", "(default: )", "default: None", "['", " str ", "[int]", "UNSET", "MISSING"):
        assert clutter not in text
    assert ("--cluster" in text) == ("--mesh MESH" in text and name != "plan") == door[name].on_devices


@pytest.mark.parametrize(("door", "name"), ALL, ids=lambda value: value if isinstance(value, str) else "")
def test_the_examples_of_the_help_are_commands(door, name):
    settings, _ = door[name].load()
    for example in door[name].examples:
        assert isinstance(command_line.parse(door[name], settings, [name, *example.split()])[0], settings)


def test_the_overview_lists_the_verbs_and_the_version(capsys):
    text = help_text(capsys, "--help")
    for name, verb in (cli.TRAIN | cli.EVAL).items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", text, re.MULTILINE)
    assert help_text(capsys, "--version") == f"secvec_jax {sv.__version__}\n"
    assert command_line.main("A kitchen.", cli.TRAIN, []) == 2
    assert "no verb: use one of quickstart, " in capsys.readouterr().err


def test_a_percent_sign_and_a_default_are_shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = help_text(capsys, "roast", "--help", verbs={"roast": Verb("", lambda: (Roast, None))})
    assert "50% faster" in text and "time; by default until it is done (default: 60)" in text
    assert "--what WHAT ..." in text.splitlines()[0]


def test_settings_that_would_share_a_flag_are_refused():
    @checked
    @dataclasses.dataclass(frozen=True)
    class Twice:
        seed: int = 0
        training: Training = Training.base

    with pytest.raises(ValueError, match="two settings for --seed"):
        flags.groups(Twice)


def test_the_command_is_recorded_as_it_is_typed(monkeypatch):
    seen = []
    table = {"bake": Verb("", lambda: (Bake, lambda settings, command: seen.append(command)))}
    for program in ("train.py", "/opt/venv/bin/secvec"):
        monkeypatch.setattr("sys.argv", [program, "bake", "--what", "a cake"])
        assert command_line.main("A kitchen.", table) == 0
    assert seen == ["python train.py bake --what 'a cake'", "secvec bake --what 'a cake'"]


def test_a_terminal_without_the_characters_of_a_table_shows_them_escaped(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        print("refusal ↑", flush=True)
    print_any_character()
    print("refusal ↑", flush=True)
    assert output.getvalue() == b"refusal \\u2191\n"


def test_a_closed_stream_is_no_number_for_a_file(tmp_path):
    """Else lines that libraries log would be written into the next file that a command opens."""
    code = (
        "import os, sys; from secvec_jax.terminal import open_standard_streams\n"
        "os.close(2); sys.stderr = None; open_standard_streams()\n"
        f"number = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "print('lost', file=sys.stderr); os.write(2, b'lost'); print(number > 2)"
    )
    done = processes.run("-c", code)
    assert done.stdout == "True\n" and not (tmp_path / "file").read_bytes()


def test_an_empty_out_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out is empty: name a folder"):
        stages.claim(Bake(out=" "))
    assert not list(tmp_path.iterdir())


def test_an_error_that_cannot_be_written_keeps_its_exit_code(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert command_line.main("", cli.EVAL, ["compare", "--runs", "/nowhere"]) == 2
        with contextlib.suppress(OSError):
            full.close()


def test_a_verb_of_the_other_script_is_said_to_be_there(capsys):
    assert command_line.main("", cli.TRAIN, ["audit"], elsewhere=dict.fromkeys(cli.EVAL, "eval.py")) == 2
    assert "audit is a verb of eval.py: run python eval.py audit" in capsys.readouterr().err
