"""Inspect's tasks on our decoder: the replies are those of `sv.generate`, and what it cannot do is told."""

import asyncio
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import secvec_jax as sv
from secvec_jax.errors import UserError
from tests.toys import tiny_model

inspect_ai = pytest.importorskip("inspect_ai")

from inspect_ai._util.error import PrerequisiteError  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, GenerateConfig, get_model  # noqa: E402
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402
from inspect_ai.tool import ToolInfo  # noqa: E402

from secvec_jax.evaluation import inspect_model  # noqa: E402

ROOT = Path(__file__).parents[2]
PROMPTS = ["What is the capital of France?", "And of Spain?", "A much longer question about the quick brown fox."]
TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model().save(path)
    return path


def replies(model, **options) -> list[str]:
    return sv.generate(model, PROMPTS, max_new_tokens=TOKENS, temperature=0, **options)


def answered(model, messages, tools=(), **config):
    return asyncio.run(model.api.generate(messages, list(tools), "auto", GenerateConfig(**config)))


def test_pyproject_registers_the_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["inspect_ai"].items()
    loaded = metadata.EntryPoint(*entry, "inspect_ai").load()
    assert entry[0] == "secvec_jax" and loaded is inspect_model


def test_a_task_runs_and_is_scored(folder, tmp_path):
    expected = replies(sv.load(str(folder)))
    assert len(set(expected)) == 3
    targets = [expected[0], "never said", expected[2]]
    task = inspect_ai.Task(
        dataset=[Sample(input=prompt, target=target) for prompt, target in zip(PROMPTS, targets)],
        solver=generate(),
        scorer=includes(),
        config=GenerateConfig(temperature=0, max_tokens=TOKENS),
    )
    (log,) = inspect_ai.eval(task, model=f"secvec_jax/{folder}", log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert [sample.output.completion for sample in log.samples] == expected
    assert [sample.scores["includes"].value for sample in log.samples] == ["C", "I", "C"]
    assert all(sample.output.usage.output_tokens <= TOKENS for sample in log.samples)


def test_vectors_are_active(folder, tmp_path, random_vectors):
    model = sv.load(str(folder))
    vectors = random_vectors(model, rank=2)
    file = tmp_path / "vectors.safetensors"
    sv.save_vectors(vectors, str(file), model)
    bare, active = replies(model), replies(model, vectors=vectors)
    assert bare != active
    served = get_model(f"secvec_jax/{folder}", vectors=str(file))
    config = {"temperature": 0, "max_tokens": TOKENS}
    assert [answered(served, [ChatMessageUser(content=p)], **config).completion for p in PROMPTS] == active


def test_a_reply_ends_at_a_stop_sequence_and_says_why(folder):
    model, asked = get_model(f"secvec_jax/{folder}"), [ChatMessageUser(content=PROMPTS[0])]
    whole = answered(model, asked, temperature=0, max_tokens=TOKENS)
    assert whole.stop_reason == "max_tokens" and len(whole.completion) > 2
    end = whole.completion[2:4]
    cut = answered(model, asked, temperature=0, max_tokens=TOKENS, stop_seqs=[end])
    assert cut.completion == whole.completion.partition(end)[0] and cut.stop_reason == "stop"


def test_sampling_follows_the_seed(folder):
    model, asked = get_model(f"secvec_jax/{folder}"), [ChatMessageUser(content=PROMPTS[0])]

    def sampled(seed):
        return answered(model, asked, temperature=2.0, max_tokens=TOKENS, seed=seed).completion

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(None) != sampled(None), "another epoch is another sample"


def test_a_prompt_that_leaves_no_room_is_an_answer_of_its_own(folder):
    model = get_model(f"secvec_jax/{folder}")
    found = answered(model, [ChatMessageUser(content="word " * 600)], max_tokens=TOKENS)
    assert found.stop_reason == "model_length" and "do not fit" in found.completion


def test_what_the_decoder_does_not_have_is_reported(folder):
    model, asked = get_model(f"secvec_jax/{folder}"), [ChatMessageUser(content="Hello?")]
    for config in ({"logprobs": True}, {"num_choices": 2}, {"frequency_penalty": 0.5}):
        with pytest.raises(UserError, match=f"{next(iter(config))} is not supported"):
            answered(model, asked, **config)
    with pytest.raises(UserError, match="tools are not supported"):
        answered(model, asked, [ToolInfo(name="look", description="looks")])
    with pytest.raises(UserError, match="ends with the assistant's turn"):
        answered(model, [*asked, ChatMessageAssistant(content="Well")])


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("", {"vector": "x"}, "unknown model argument 'vector'"),
        ("", {"batch_size": 0}, "batch_size is 0"),
        ("", {"vectors": "nothing.safetensors"}, "nothing.safetensors"),
        ("/nothing", {}, "nothing"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line_of_inspects(folder, name, options, told):
    with pytest.raises(PrerequisiteError) as raised:
        get_model(f"secvec_jax/{folder}{name}", **options)
    assert told in str(raised.value.message) and "\n" not in str(raised.value.message)


def test_a_failed_request_fails_alone(folder, monkeypatch):
    model, asked = get_model(f"secvec_jax/{folder}", batch_size=7), [ChatMessageUser(content=PROMPTS[0])]
    monkeypatch.setattr(inspect_model, "generate_tokens", None)
    with pytest.raises(TypeError):
        answered(model, asked, temperature=0, max_tokens=TOKENS)
    monkeypatch.undo()
    assert answered(model, asked, temperature=0, max_tokens=TOKENS).completion


def test_thoughts_are_kept_separate():
    thought, answer = inspect_model._content("<think>Hm, 2.</think> 4")
    assert (thought.reasoning, answer.text) == ("<think>Hm, 2.</think>", "4")
    assert inspect_model._content("4") == "4" and inspect_model._content("<think>Hm")[1].text == ""
