"""`train.py plan`: check whether a run fits a TPU slice or GPUs, and how fast it would be, without access to them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax

from secvec_jax.checks import SettingError, checked
from secvec_jax.config import Training
from secvec_jax.data.encoded import LENGTHS
from secvec_jax.defenses.finetuning import phase2_step
from secvec_jax.defenses.guarded import guarded
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.defenses.security_vectors import ALIGN, PHASE1, Phase1, phase1_step
from secvec_jax.defenses.training_settings import PHASE2, PHASE2_LORA, check_trained_weights, check_unused
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import abstract_decoder
from secvec_jax.model.hub import check_mesh, load_architecture
from secvec_jax.model.layers import Remat
from secvec_jax.model.quantized import Precision
from secvec_jax.planning.gpus import USABLE
from secvec_jax.planning.plan import Plan, TooLarge, plan_step, topology_mesh
from secvec_jax.planning.roofline import Roofline
from secvec_jax.planning.schedule import Account
from secvec_jax.presets import Preset, preset_field, section_of
from secvec_jax.recipes.precision import training_precision
from secvec_jax.recipes.preset_choice import Phase
from secvec_jax.sharding import num_shards
from secvec_jax.terminal import Console
from secvec_jax.training.objective import KEEP, LEARN, Backbone, Params
from secvec_jax.training.step import make_train_step
from secvec_jax.vectors.lora import LoRA

REMATS = get_args(Remat)
"""Rematerialization policies, from the fastest to the one that needs the least memory."""

_TOKENS = 32768
"""Maximum tokens per device and batch in the search: more do not make a step more efficient."""


@checked
@dataclasses.dataclass(frozen=True)
class PlanRun:
    """Compile the train step for TPUs or GPUs without access to them: memory, FLOPs, collectives and estimated time."""

    model: str = "configs/models/llama-2-7b.json"
    """a model as for the other verbs, or only its config.json; weights are not needed"""
    topology: str = "v5p:2x2x1"
    """GPUs: h100:8, and a100-40, a100-80, h200, b200, l4, rtx4090; or the chips of a TPU slice: v5e:4x4 is a v5e-16,
    v6e:2x4 a v6e-8, v5p:2x2x1 a v5p-8 (named by cores), v5p:4x4x4 a v5p-128"""
    mesh: str = ""
    """mesh axes and sizes, as for the other verbs; empty: fsdp over all chips"""
    phase: Phase = "finetune"
    """vectors: phase 1, with the model frozen; finetune: phase 2, all weights under frozen vectors; align: all weights
    without vectors; protect: phase 2 with the same number of additional sequences of safe rows, which are learned
    without the vectors (guarded vectors). vectors and align use adamw, as their verbs do, unless --optimizer is other
    than sgd; protect uses it for a task LoRA"""
    lora: LoRA | None = LoRA()
    """the security vectors (not for align, which has none); --no-lora: plain fine-tuning"""
    task_lora: LoRA | None = None
    """finetune, align and protect: train a task LoRA instead of all weights"""
    objective: Literal["cross_entropy", "kl"] = "kl"
    """vectors: with kl, a batch has half as many additional sequences of benign rows"""
    frozen_weights: Precision | None = None
    """precision of the frozen weights: float32, bfloat16, int8 or nf4; by default bfloat16, as in a run"""
    preset: str | None = preset_field(lambda preset, values: _of_preset(preset, values))
    """plan a preset, with its model, its devices and the settings of the phase; without a name, all are listed"""
    fit: bool = False
    """search for the batch size and remat policy of the fastest step that fits"""
    training: Training = dataclasses.replace(PHASE2, batch_size=16, max_seq_len=2048, remat="attention")

    def __post_init__(self) -> None:
        check_unused(self.training, validates=False)
        if self.phase == "vectors" and self.task_lora is not None:
            raise SettingError("task_lora", " is for the other phases: phase vectors trains the vectors alone")
        if self.phase == "align" and self.lora not in (None, PlanRun.lora):
            raise SettingError("lora", " is for the other phases: phase align has no vectors")
        if self.phase != "vectors" and self.objective != PlanRun.objective:
            raise SettingError("objective", f" is for phase vectors, and the phase is {self.phase}")

    @staticmethod
    def implied(values: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults that other settings imply: how `protect` trains a task LoRA (see `checks.implied_by`)."""
        if values.get("phase") != "protect" or values.get("task_lora") is None:
            return {}
        return {"training": dataclasses.replace(PlanRun.training, optimizer=PHASE2_LORA.optimizer)}

    @property
    def precision(self) -> Precision:
        """The precision of the model's weights. Raises UserError if it is too low for trained weights."""
        trains_all = self.phase != "vectors" and self.task_lora is None
        check_trained_weights(self.training, trains_all)
        if trains_all:
            return training_precision(self.frozen_weights, self.training, None)
        return self.frozen_weights or "bfloat16"


def _of_preset(preset: Preset, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a plan for the preset, in the phase that the values name.

    Raises UserError for a preset of a CPU, and for one that has no settings for the phase.
    """
    if not preset.topology:
        raise UserError(
            f"the preset is for {preset.platform.upper()}s, and plan compiles for GPUs and TPUs: choose another"
        )
    phase = values.get("phase", PlanRun.phase)
    devices = {"model": preset.model, "topology": preset.topology, "mesh": preset.mesh}
    if phase not in get_args(Phase):  # which the check of the settings reports
        return devices
    return devices | dict(section_of(phase, on_topology=True)(preset, values))


def plan(settings: PlanRun, command: str) -> None:
    """Run `train.py plan`. Raises UserError if the step does not fit, and as `topology_mesh` does."""
    console = Console(soft_wrap=True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # cached programs for absent devices cannot be loaded
    mesh = topology_mesh(settings.topology, settings.mesh)
    architecture = load_architecture(settings.model)
    with jax.set_mesh(mesh):
        check_mesh(architecture)
        if settings.fit:
            settings, step_plan = _fastest(settings, architecture, console)
        else:
            step_plan = compile_plan(settings, architecture)
    for line in report_lines(settings, step_plan):
        console.print(line)


def compile_plan(settings: PlanRun, architecture: Architecture) -> Plan:
    """Return the plan of the settings' train step on the ambient mesh. Raises UserError if it does not fit."""
    training, phase_name = settings.training, settings.phase
    if settings.lora is None and phase_name in ("vectors", "protect"):
        raise UserError(f"{phase_name} needs vectors: leave --no-lora out")

    def adapter(lora: LoRA | None):
        return None if lora is None else jax.eval_shape(lambda: lora.init(architecture, jax.random.key(0)))

    decoder = abstract_decoder(architecture, settings.precision)
    vectors = None if phase_name == "align" else adapter(settings.lora)
    sequences = {LEARN: training.batch_size}
    if phase_name == "vectors":
        params = Params(Backbone(decoder), vectors)
        phase, train_step = phase1_step(params, Phase1(settings.objective), _with_optimizer_of(PHASE1, training), 100)
        if settings.objective == "kl":
            sequences[KEEP] = max(1, training.batch_size // 2)
    else:
        params = Params(Backbone(decoder, adapter(settings.task_lora)), vectors)
        training = _with_optimizer_of(ALIGN, training) if phase_name == "align" else training
        make_step = guarded() if phase_name == "protect" else make_train_step
        phase, train_step = phase2_step(params, ("all",), training, 100, make_step)
        if phase_name == "protect":
            sequences[SAFE] = training.batch_size
    length, micro_batches = length_of(training), training.grad_accum_steps
    return plan_step(architecture, params, phase, train_step, sequences, length, micro_batches)


def length_of(training: Training) -> int:
    """Return the tokens per packed sequence; without data to choose it from, the longest option."""
    return training.max_seq_len or LENGTHS[-1]


def _with_optimizer_of(default: Training, training: Training) -> Training:
    """Return the settings with the optimizer and the clipping of a verb's defaults, unless others than those of phase 2
    were chosen."""
    names = ("optimizer", "max_grad_norm")
    unset = {name: getattr(default, name) for name in names if getattr(training, name) == getattr(PHASE2, name)}
    return dataclasses.replace(training, **unset)


def _fastest(settings: PlanRun, architecture: Architecture, console: Console) -> tuple[PlanRun, Plan]:
    """Return the settings with the highest throughput, and their plan. Raises TooLarge if none fits."""
    best: tuple[PlanRun, Plan] | None = None
    for candidate in _ladder(settings, architecture, console):
        if best is None or candidate[1].tokens / candidate[1].seconds > best[1].tokens / best[1].seconds:
            best = candidate
    if best is None:
        raise TooLarge(f"no batch fits into {settings.topology}: use more chips, a task LoRA or shorter sequences")
    return best


def _ladder(settings: PlanRun, architecture: Architecture, console: Console) -> Iterator[tuple[PlanRun, Plan]]:
    """Yield plans that fit: for each remat policy the smallest batch, then the largest that is predicted to fit."""
    training, parts = settings.training, num_shards("batch")
    smallest = parts * (2 if settings.phase == "vectors" and settings.objective == "kl" else 1)

    def attempt(remat: Remat, batch_size: int) -> tuple[PlanRun, Plan] | None:
        new_training = dataclasses.replace(training, remat=remat, batch_size=batch_size)
        new_settings = dataclasses.replace(settings, training=new_training)
        try:
            step_plan = compile_plan(new_settings, architecture)
        except TooLarge as error:
            console.print(f"remat {remat}, batch size {batch_size}: {error}")
            return None
        console.print(f"remat {remat}, batch size {batch_size}: {_short(step_plan)}")
        return new_settings, step_plan

    for remat in REMATS:
        batch_size, largest = smallest, _TOKENS // length_of(training) * parts
        last_size, last_activations = 0, 0
        while batch_size <= max(largest, smallest):
            candidate = attempt(remat, batch_size)
            if candidate is None:
                batch_size, largest = (last_size + batch_size) // 2 // smallest * smallest, batch_size - smallest
                if batch_size <= last_size:
                    break
                continue
            yield candidate
            step_plan = candidate[1]
            free = step_plan.chip.memory - step_plan.total
            per_sequence = max(step_plan.activations - last_activations, 1) / (batch_size - last_size)
            last_size, last_activations = batch_size, step_plan.activations
            # The memory per sequence cannot be determined from one point: always try a second one.
            predicted = max(int(batch_size + free / per_sequence), 2 * smallest if batch_size == smallest else 0)
            multiple = min(predicted, largest) // smallest
            batch_size = smallest << (multiple.bit_length() - 1) if multiple else 0
            if batch_size <= last_size:
                break


def _short(plan: Plan) -> str:
    memory, mfu = f"{_gib(plan.total)} of {_gib(plan.chip.memory)} GiB", f"{100 * plan.mfu:.1f}%"
    if isinstance(plan.account, Roofline):
        return f"memory {memory}, at least {plan.seconds:.3f} s, MFU at most {mfu}"
    return f"HBM {memory}, {plan.seconds:.3f} s, MFU {mfu}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def report_lines(settings: PlanRun, plan: Plan) -> Iterator[str]:
    """Yield the lines that the command prints."""
    training, account = settings.training, plan.account
    on_gpus = isinstance(account, Roofline)
    chips, memory = ("GPUs", "memory per GPU") if on_gpus else ("chips", "HBM per chip")
    one = chips.removesuffix("s")
    safe = " and as many of safe rows" if settings.phase == "protect" else ""
    times = f", {training.grad_accum_steps} times a step" if training.grad_accum_steps > 1 else ""
    yield (
        f"{settings.model}, phase {settings.phase}, {training.batch_size} sequences x {length_of(training)} tokens"
        f"{safe}{times}, remat {training.remat}, weights in {settings.precision}, on {plan.chips} {plan.chip.name} "
        f"{chips} ({settings.topology})"
    )
    yield (
        f"{memory}: parameters {_gib(plan.parameters)} + optimizer {_gib(plan.optimizer)} + activations "
        f"{_gib(plan.activations)} (including gradients and gathered weights); total {_gib(plan.total)} of "
        f"{_gib(plan.chip.memory)} GiB ({100 * plan.total / plan.chip.memory:.0f}%)"
    )
    compiled_flops = account.flops if isinstance(account, Roofline) else account.flops + account.kernel_flops
    yield (
        f"FLOPs per step and {one}: {plan.flops / 1e12:.1f} T by {plan.formula} (remat not counted); "
        f"products in the compiled program {compiled_flops / 1e12:.1f} T"
    )
    for kind, (count, size) in sorted(account.collectives.items()):
        yield f"collective {kind}: {count} per step, {_gib(size)} GiB sent per {one}"
    yield from _bound_lines(plan, account) if isinstance(account, Roofline) else _time_lines(plan, account)


def _bound_lines(plan: Plan, account: Roofline) -> Iterator[str]:
    """Yield the lines on the time of a step on GPUs."""
    kernels = ", ".join(f"{name} ({count})" for name, count in account.kernels.items())
    yield f"kernels in the compiled program: {kernels or 'only those that XLA generates'}"
    yield (
        f"a step takes at least {plan.seconds:.3f} s: products {account.flops_seconds:.3f} s at "
        f"{plan.chip.peak / 1e12:.0f} TFLOP/s, memory {account.bytes_seconds:.3f} s, interconnect "
        f"{account.interconnect_seconds:.3f} s"
    )
    yield (
        f"so at most {plan.tokens / plan.seconds:.0f} tokens/s, {plan.tokens / plan.seconds / plan.chips:.0f} per GPU, "
        f"MFU {100 * plan.mfu:.1f}%"
    )
    yield f"compiled in {plan.compile_seconds:.0f} s"
    yield (
        "These are compile-time figures; nothing was run on a GPU. Memory is reported by the compiler, of the "
        f"{100 * USABLE:.0f}% that a program can take with XLA_CLIENT_MEM_FRACTION={USABLE}. Time is a bound, not an "
        "estimate: the longest of products, memory and interconnect at their published rates."
    )


def _time_lines(plan: Plan, account: Account) -> Iterator[str]:
    """Yield the lines on the time of a step on TPUs."""
    yield (
        f"estimated step time {plan.seconds:.3f} s: compute {account.compute_seconds:.3f} s, of which attention kernel "
        f"{account.kernel_seconds:.3f} s; waiting for other chips {account.exposed_seconds:.3f} s"
    )
    yield (
        f"MFU {100 * plan.mfu:.1f}% of {plan.chip.peak / 1e12:.0f} TFLOP/s; "
        f"{plan.tokens / plan.seconds:.0f} tokens/s, {plan.tokens / plan.seconds / plan.chips:.0f} per chip"
    )
    yield f"compiled in {plan.compile_seconds:.0f} s"
    yield (
        "These are compile-time figures; nothing was run on a TPU. Memory is reported by the compiler. Time is "
        "simulated from the compiler's schedule and its estimate of each operation, with collectives at 90% of the "
        "link bandwidth and the attention kernel at 35% of peak."
    )
