"""Which split gets which prompts: a model is never judged on what it was trained on."""

import itertools

import pytest

from secvec_jax.config import Training
from secvec_jax.data.chat import prompt_tokens
from secvec_jax.data.rows import prompt_of
from secvec_jax.data.sources import load_rows
from secvec_jax.data.topics import off_topic
from secvec_jax.errors import UserError
from secvec_jax.workspace.own_replies import stored_examples
from secvec_jax.workspace.packaged_rows import PackagedRows
from secvec_jax.workspace.splits import Sizes, make_splits


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", max_position_embeddings=1024).model


_encoded: dict[str, tuple[int, ...]] = {}


def encoded_prompt(model, prompt: str) -> tuple[int, ...]:
    """Each prompt is encoded once: the model is the same in all tests."""
    if prompt not in _encoded:
        _encoded[prompt] = tuple(prompt_tokens(model.tokenizer, [{"role": "user", "content": prompt}], 1000))
    return _encoded[prompt]


def prompts_by_part(model, eval_split: str, sizes=Sizes(), **options) -> dict[str, set[tuple[int, ...]]]:
    """Part -> its prompts as token ids."""
    options = {"seed": 0} | options
    found = make_splits(model, sizes, Training(max_seq_len=1000), eval_split=eval_split, **options)

    def asked(prompts) -> set[tuple[int, ...]]:
        return {encoded_prompt(model, prompt) for prompt in prompts}

    examples = {"refusals": found.refusals, "vectors": found.vectors, "keep": found.keep, **found.mix}
    examples |= {"unseen harmful": found.suite.harmful_targets, "unseen openings": found.suite.opening_targets}
    texts = {"kept": found.align_benign, "judged harmful": found.suite.harmful, "judged benign": found.suite.benign}
    texts |= {"questions": [question for question, _ in found.suite.questions]}
    texts |= {f"held-out {kind}": list(map(prompt_of, rows)) for kind, rows in found.held_out.items()}
    prompts = {name: {tuple(e.tokens[: e.answer_start]) for e in part} for name, part in examples.items()}
    return prompts | {name: asked(part) for name, part in texts.items()}


@pytest.fixture(scope="module")
def parts(model):
    return {eval_split: prompts_by_part(model, eval_split) for eval_split in ("held-out", "development")}


def test_the_packaged_refusals_are_those_of_the_quickstart(model, parts):
    asked = {encoded_prompt(model, prompt_of(r)) for r in load_rows("refusals")}
    assert asked == parts["held-out"]["refusals"]
    assert {len(r["messages"]) for r in load_rows("refusals")} == {2}


@pytest.mark.parametrize("eval_split", ["held-out", "development"])
def test_no_prompt_is_in_two_parts(parts, eval_split):
    trained = {name: prompts for name, prompts in parts[eval_split].items() if not name.startswith("held-out ")}
    for (one, these), (other, those) in itertools.combinations(trained.items(), 2):
        assert not these & those, f"{one} and {other} share {len(these & those)} prompts"


@pytest.mark.parametrize(("sizes", "seed"), [(Sizes(), 1), (Sizes(vectors=30, align_harmful=30), 0)])
def test_what_a_model_was_aligned_with_before_is_in_no_other_part(model, parts, sizes, seed):
    drawn = prompts_by_part(model, "held-out", sizes, seed=seed, alignment=(Sizes(), 0))
    aligned_with = {name: parts["held-out"][name] for name in ("refusals", "kept")}
    assert {name: drawn[name] for name in aligned_with} == aligned_with
    test_no_prompt_is_in_two_parts({"held-out": drawn}, "held-out")
    assert len(drawn["vectors"]) == sizes.vectors and drawn["vectors"] != parts["held-out"]["vectors"]
    assert len(drawn["keep"]) == sizes.keep and len(drawn["benign"]) == sizes.mix_benign


def test_no_topic_of_the_alignment_before_is_in_another_part(model):
    """The rows of AdvBench that nothing was trained on, too, of which grids take further ones."""
    drawn = make_splits(model, Sizes(), Training(max_seq_len=1000), seed=1, alignment=(Sizes(), 0))
    taught = [prompt_of(r) for r in load_rows("refusals")]
    others = drawn.spare["harmful"] + drawn.held_out["harmful"]
    assert len(off_topic(others, taught[: Sizes().align_harmful // 3])) == len(others) > 150


def test_more_benign_rows_than_there_are_is_an_error(model):
    with pytest.raises(UserError, match=r"100000 benign rows are needed and .* are left: lower the sizes"):
        make_splits(model, Sizes(mix_benign=100_000), Training(max_seq_len=1000), seed=0)


def test_the_rows_of_the_seed_that_a_model_was_aligned_with_stay_as_they_are(model, parts):
    assert prompts_by_part(model, "held-out", alignment=(Sizes(), 0)) == parts["held-out"]


def test_development_judges_by_prompts_of_its_own_and_trains_on_the_same(parts):
    held_out, development = parts["held-out"], parts["development"]
    judging = {"judged harmful", "judged benign", "questions"}
    for name in judging:
        assert held_out[name] and development[name] and not held_out[name] & development[name], name
    for name in held_out.keys() - judging:
        assert held_out[name] == development[name], name


def test_held_out_rows_are_those_that_are_judged_and_no_others(parts):
    found, other = parts["held-out"], parts["development"]
    assert found["held-out harmful"] == found["unseen harmful"]
    assert found["held-out benign"] == found["judged benign"] | other["judged benign"]


def test_a_length_that_packaged_rows_do_not_fit_into_is_told_with_the_setting(model):
    with pytest.raises(UserError, match="packaged rows do not fit into 8 tokens: raise --max-seq-len"):
        make_splits(model, Sizes(), Training(max_seq_len=8), seed=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_packaged_rows_of_any_seed_are_none_that_models_are_aligned_with(model, parts, seed):
    sources = PackagedRows(model, Training(max_seq_len=1000, seed=seed)).sources()
    for need, part in (("harmful rows", "vectors"), ("benign rows", "keep")):
        prompts = {tuple(e.tokens[: e.answer_start]) for e in sources[need]()}
        assert prompts == parts["held-out"][part]
        assert not prompts & (parts["held-out"]["refusals"] | parts["held-out"]["kept"])


@pytest.mark.parametrize("damage", ["[[[1, 2", "3", "[[[1, 2], 1], 3]", '[[["x"], 1]]', "[[[1e99], 1]]"])
def test_damaged_examples_of_a_run_are_reported(tmp_path, damage):
    (tmp_path / "own-replies.json").write_text(damage)
    with pytest.raises(UserError, match=r"own-replies\.json is damaged .*: delete it, and it is made again"):
        stored_examples(tmp_path / "own-replies.json", list)
