"""The steps of all phases, compiled for the CPU, and the search for the fastest that fits, on a made-up compiler."""

import dataclasses

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from secvec_jax.defenses.mixing import SAFE
from secvec_jax.errors import UserError
from secvec_jax.planning import plan as planner
from secvec_jax.planning.gpus import GPUS, Gpu
from secvec_jax.planning.plan import Plan, TooLarge
from secvec_jax.planning.roofline import Roofline
from secvec_jax.planning.schedule import Account
from secvec_jax.planning.torus import CHIPS, Chip
from secvec_jax.recipes import plan
from secvec_jax.recipes.plan import REMATS, PlanRun, compile_plan, report_lines
from secvec_jax.sharding import make_mesh
from secvec_jax.training.objective import LEARN
from secvec_jax.vectors.lora import LoRA
from tests.toys import ARCHITECTURE

CHIP, PARTS, LENGTH = CHIPS["TPU v5 lite"], 4, 2048
COST = dict(zip(REMATS, (8, 4, 2, 1)))


def search(
    fixed: float, slope: float, monkeypatch, chip: Chip | Gpu = CHIP
) -> tuple[list[tuple[str, int, bool]], tuple[PlanRun, Plan] | None]:
    """What was tried (remat, lines, whether it fits), and what was found; sizes are shares of a chip's memory."""
    tried = []

    def compile_plan(settings: PlanRun, architecture) -> Plan:
        training = settings.training
        share = fixed + slope * COST[training.remat] * training.batch_size / PARTS
        tried.append((training.remat, training.batch_size, share <= 1))
        if share > 1:
            raise TooLarge("it does not fit")
        # Lines make a step more efficient, and so does remembering more.
        seconds = 1 + training.batch_size * (1 - 0.05 * COST[training.remat])
        account: Account | Roofline = Account(seconds, seconds, 0.0, 0.0, 0.0, 0.0, {}, [], [], 0)
        if isinstance(chip, Gpu):
            account = Roofline(0.0, 0.0, seconds, 0.0, 0.0, {}, {}, [])
        size = int(share * chip.memory)
        tokens = training.batch_size * LENGTH
        return Plan(chip, PARTS, 0, 0, size, size, 1.0, "6N+3a per token", tokens, account, 0.0)

    monkeypatch.setattr(plan, "compile_plan", compile_plan)
    monkeypatch.setattr(plan, "num_shards", lambda axis: PARTS)
    asked = PlanRun(fit=True)
    asked = dataclasses.replace(asked, training=dataclasses.replace(asked.training, max_seq_len=LENGTH))
    try:
        return tried, plan._fastest(asked, ARCHITECTURE, Console(quiet=True))
    except TooLarge:
        return tried, None


@settings(max_examples=200)
@given(fixed=st.floats(0, 1.2), slope=st.floats(1e-4, 1.5))
def test_the_search_ends_and_finds_a_batch_that_fits_if_there_is_one(fixed, slope):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tried, found = search(fixed, slope, monkeypatch)
    assert len(tried) == len(set(tried)) <= 24
    assert all(lines % PARTS == 0 for _, lines, _ in tried)
    fitting = {(remat, lines) for remat, lines, fits in tried if fits}
    assert (found is None) == (fixed + slope > 1) == (not fitting)
    if found is not None:
        assert (found[0].training.remat, found[0].training.batch_size) in fitting
        most = min((1 - fixed) / slope, 32768 / LENGTH)  # of lines in a part, with the smallest remat
        assert max(lines for remat, lines in fitting if remat == "full") / PARTS > most / 4


@pytest.mark.parametrize("chip", [CHIP, GPUS["h100"]])
def test_the_fastest_is_taken(chip, monkeypatch):
    tried, found = search(0.1, 0.05, monkeypatch, chip)
    best = max((lines / (1 + lines * (1 - 0.05 * COST[remat])), remat, lines) for remat, lines, fits in tried if fits)
    assert (found[0].training.remat, found[0].training.batch_size) == best[1:]


# ---- The phases

BATCH, SHORT = 4, 64


def asked(phase: str, **changed) -> PlanRun:
    settings = PlanRun(phase=phase, **changed)
    return dataclasses.replace(
        settings, training=dataclasses.replace(settings.training, batch_size=BATCH, max_seq_len=SHORT)
    )


@pytest.fixture
def compiled(monkeypatch):
    """Plans of toy models on two devices of the CPU, taken for H100s."""
    monkeypatch.setitem(planner.BY_KIND, jax.devices()[0].device_kind, GPUS["h100"])

    def plan_of(phase: str, **changed) -> Plan:
        with jax.set_mesh(make_mesh(fsdp=2, devices=jax.devices()[:2])):
            return compile_plan(asked(phase, **changed), ARCHITECTURE)

    return plan_of


@pytest.fixture
def steps(monkeypatch):
    """What is handed to the compiler: (parameters, sequences by stream, bytes of the optimizer's state) of a step."""
    handed = []

    def plan_step(architecture, params, phase, train_step, batch_sizes, length, micro_batches):
        trained, _ = phase.split(params)
        state = jax.eval_shape(train_step.init, trained)
        handed.append((params, batch_sizes, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))))
        share = 0.1 * sum(batch_sizes.values()) / PARTS
        if share > 1:
            raise TooLarge("it does not fit")
        account = Account(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, {}, [], [], 0)
        size, tokens = int(share * CHIP.memory), sum(batch_sizes.values()) * length
        return Plan(CHIP, PARTS, 0, 0, size, size, 1.0, "6N+3a per token", tokens, account, 0.0)

    monkeypatch.setattr(plan, "plan_step", plan_step)
    monkeypatch.setattr(plan, "num_shards", lambda axis: PARTS)
    return handed


def test_protect_learns_as_many_tokens_of_safe_rows(compiled):
    task = LoRA(rank=2)
    plain, guarded = (compiled(phase, task_lora=task) for phase in ("finetune", "protect"))
    assert plain.tokens == BATCH * SHORT and guarded.tokens == 2 * plain.tokens
    assert guarded.flops == 2 * plain.flops and guarded.formula == plain.formula == "4N+3a per token"
    assert guarded.parameters == plain.parameters
    assert guarded.optimizer > 1.9 * plain.optimizer  # both of Adam's moments, as protect trains a task LoRA
    assert 1.5 < guarded.account.flops / plain.account.flops < 2  # safe rows take no products with the vectors
    assert guarded.activations > plain.activations
    assert "4 sequences x 64 tokens and as many of safe rows, remat" in next(report_lines(asked("protect"), guarded))


def test_align_has_no_vectors(compiled):
    aligned, plain = compiled("align"), compiled("finetune", lora=None)
    assert aligned.parameters == plain.parameters < compiled("finetune").parameters
    assert aligned.flops == plain.flops and aligned.formula == "6N+3a per token"
    assert aligned.optimizer > 1.9 * plain.optimizer  # both of Adam's moments, as train.py align trains


@pytest.mark.parametrize("task", [None, LoRA(rank=2)])
@pytest.mark.parametrize(
    ("phase", "lora", "vectors", "streams"),
    [
        ("finetune", LoRA(), True, {LEARN: BATCH}),
        ("finetune", None, False, {LEARN: BATCH}),
        ("align", LoRA(), False, {LEARN: BATCH}),
        ("align", None, False, {LEARN: BATCH}),
        ("protect", LoRA(), True, {LEARN: BATCH, SAFE: BATCH}),
    ],
)
def test_what_each_phase_holds_and_reads(steps, phase, lora, vectors, streams, task):
    compile_plan(asked(phase, lora=lora, task_lora=task), ARCHITECTURE)
    ((params, sequences, _),) = steps
    assert sequences == streams
    assert (params.vectors is not None) == vectors and (params.backbone.adapter is not None) == (task is not None)


def test_vectors_have_no_task_lora(steps):
    compile_plan(asked("vectors"), ARCHITECTURE)
    assert all(params.backbone.adapter is None and params.vectors is not None for params, _, _ in steps)


@pytest.mark.parametrize(
    ("phase", "changed", "message"),
    [
        ("vectors", {"task_lora": LoRA(rank=2)}, "task_lora is for the other phases"),
        ("align", {"lora": LoRA(rank=64)}, "lora is for the other phases"),
        ("finetune", {"objective": "cross_entropy"}, "objective is for phase vectors"),
    ],
)
def test_settings_of_another_phase_are_refused(phase, changed, message):
    with pytest.raises(UserError, match=message):
        asked(phase, **changed)


def test_settings_without_effect_are_refused():
    for changed in ({"patience": 2}, {"optimizer": "adamw", "momentum": 0.5}):
        with pytest.raises(UserError, match=f"training.{list(changed)[-1]}"):
            PlanRun(training=dataclasses.replace(PlanRun.training, **changed))


def test_micro_batches_take_more_tokens_and_a_sum_of_gradients(compiled):
    training = dataclasses.replace(asked("finetune").training, grad_accum_steps=4)
    one, four = compiled("finetune"), compiled("finetune", training=training)
    assert (four.tokens, four.flops) == (4 * one.tokens, 4 * one.flops)
    assert four.activations > one.activations


def test_the_optimizer_is_the_verbs_unless_another_is_set(steps):
    for optimizer in ("sgd", "adamw", "adamw-bf16"):
        for phase in ("align", "vectors", "finetune"):
            settings = asked(phase)
            training = dataclasses.replace(settings.training, optimizer=optimizer)
            compile_plan(dataclasses.replace(settings, training=training), ARCHITECTURE)
    sizes = [size for _, _, size in steps]
    sgd, adamw, in_bfloat16 = sizes[:3], sizes[3:6], sizes[6:]
    assert sgd[:2] == adamw[:2] and sgd[2] < adamw[2]
    assert all(small < large for small, large in zip(in_bfloat16, adamw))


@pytest.mark.parametrize("phase", ["vectors", "protect"])
def test_phases_that_need_vectors_are_refused_without(phase):
    with pytest.raises(UserError, match=f"^{phase} needs vectors: leave --no-lora out$"):
        compile_plan(asked(phase, lora=None), ARCHITECTURE)


@pytest.mark.parametrize("phase", ["finetune", "align", "protect"])
def test_weights_that_are_trained_are_not_held_in_few_bits(phase):
    with pytest.raises(UserError, match="all weights are trained: add --task-lora"):
        compile_plan(asked(phase, frozen_weights="nf4"), ARCHITECTURE)
    assert asked(phase).precision == "float32"
    assert asked(phase, task_lora=LoRA()).precision == "bfloat16"
    assert asked(phase, task_lora=LoRA(), frozen_weights="nf4").precision == "nf4"


@pytest.mark.parametrize(("phase", "largest"), [("finetune", 8), ("align", 8), ("protect", 4)])
def test_the_search_takes_all_streams_into_account(steps, phase, largest):
    settings, found = plan._fastest(asked(phase), ARCHITECTURE, Console(quiet=True))
    assert settings.training.batch_size == largest * PARTS and settings.phase == phase
    assert found.tokens == 8 * PARTS * SHORT
    assert all(count % PARTS == 0 for _, sequences, _ in steps for count in sequences.values())
