"""What the command line makes of settings, files of settings, and errors."""

import dataclasses
import errno

import pytest

from secvec_jax import command_line
from secvec_jax.checks import checked
from secvec_jax.config import Training
from secvec_jax.errors import UserError


@checked
@dataclasses.dataclass(frozen=True)
class Bake:
    """Bake something."""

    what: str = "bread"
    """what to bake"""
    tins: tuple[str, ...] = ("round",)
    training: Training = dataclasses.field(default_factory=Training)


def run(*arguments: str, function=lambda settings, command: None) -> tuple[int, Bake | None]:
    seen = []

    def verb(settings, command):
        seen.append(settings)
        function(settings, command)

    code = command_line.main("A kitchen.", {"bake": (Bake, verb)}, list(arguments))
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
    for full in (OSError(errno.ENOSPC, "x"), RuntimeError("I/O error: No space left on device (os error 28)")):
        assert raises(full) == 2
        assert "disk is full" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        raises(ZeroDivisionError())
