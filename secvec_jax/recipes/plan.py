"""`train.py plan`: whether a run fits a TPU slice, and how fast it would be, before one is rented."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

import jax
from rich.console import Console

from secvec_jax.checks import checked
from secvec_jax.config import Training
from secvec_jax.data.encoded import LENGTHS
from secvec_jax.defenses.finetuning import PHASE2, phase2_step
from secvec_jax.defenses.security_vectors import PHASE1, Phase1, phase1_step
from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Remat, abstract_decoder
from secvec_jax.model.hub import check_mesh, load_architecture
from secvec_jax.planning.plan import Plan, TooLarge, plan, topology_mesh
from secvec_jax.sharding import num_shards
from secvec_jax.training.objective import KEEP, LEARN, Backbone, Params
from secvec_jax.vectors.lora import LoRA

REMATS = get_args(Remat)
"""From the fastest to the smallest."""

_TOKENS = 32768
"""Of a device, and of a batch's lines: more do not make a step more efficient."""


@checked
@dataclasses.dataclass(frozen=True)
class Planned:
    """Compile the train step for a TPU slice, without access to one: memory, FLOPs, collectives, estimated time."""

    model: str = "configs/models/llama-2-7b.json"
    """a model as for the other verbs, or only its config.json; weights are not needed"""
    topology: str = "v5p:2x2x1"
    """chips of the slice: v5e:4x4 is a v5e-16, v6e:2x4 a v6e-8, v5p:2x2x1 a v5p-8 (named by cores), v5p:4x4x4 a
    v5p-128"""
    mesh: str = ""
    """mesh axes and sizes, as for the other verbs; empty: fsdp over all chips"""
    phase: Literal["vectors", "finetune"] = "finetune"
    """vectors: phase 1, with the model frozen; finetune: phase 2, all weights under frozen vectors"""
    lora: LoRA | None = LoRA()
    """the security vectors; --no-lora: plain fine-tuning"""
    task_lora: LoRA | None = None
    """finetune: train a task LoRA instead of all weights"""
    objective: Literal["cross_entropy", "kl"] = "kl"
    """vectors: with kl, a batch has half as many sequences of benign rows in addition"""
    fit: bool = False
    """search for the batch size and remat policy of the fastest step that fits"""
    training: Training = dataclasses.replace(PHASE2, batch_size=16, max_seq_len=2048, remat="attention")


def planned(settings: Planned, command: str) -> None:
    """The verb."""
    console = Console(soft_wrap=True, highlight=False)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read what was made for absent devices
    mesh = topology_mesh(settings.topology, settings.mesh)
    architecture = load_architecture(settings.model)
    with jax.set_mesh(mesh):
        check_mesh(architecture)
        if settings.fit:
            settings, found = _fastest(settings, architecture, console)
        else:
            found = compiled(settings, architecture)
    for line in told(settings, found):
        console.print(line)


def compiled(settings: Planned, architecture: Architecture) -> Plan:
    """The plan of the settings' step on the ambient mesh. Raises UserError if it does not fit."""
    training, frozen_decoder = settings.training, abstract_decoder(architecture)
    if settings.phase == "vectors" and settings.lora is None:
        raise UserError("phase 1 trains vectors: leave --no-lora out")

    def adapter(lora: LoRA | None):
        return None if lora is None else jax.eval_shape(lambda: lora.init(architecture, jax.random.key(0)))

    sequences = {LEARN: training.batch_size}
    if settings.phase == "vectors":
        params = Params(Backbone(frozen_decoder), adapter(settings.lora))
        phase, train_step = phase1_step(params, Phase1(settings.objective), _optimizer(training, PHASE1), 100)
        if settings.objective == "kl":
            sequences[KEEP] = max(1, training.batch_size // 2)
    else:
        params = Params(Backbone(frozen_decoder, adapter(settings.task_lora)), adapter(settings.lora))
        phase, train_step = phase2_step(params, ("all",), training, 100)
    return plan(architecture, params, phase, train_step, sequences, length_of(training))


def length_of(training: Training) -> int:
    """The tokens of a packed line: without data to choose by, the most that there would be."""
    return training.max_seq_len or LENGTHS[-1]


def _optimizer(training: Training, phase: Training) -> Training:
    """Phase 1 has its own optimizer, whose state is that of the vectors alone."""
    return dataclasses.replace(training, optimizer=phase.optimizer, max_grad_norm=phase.max_grad_norm)


def _fastest(settings: Planned, architecture: Architecture, console: Console) -> tuple[Planned, Plan]:
    """The settings whose step has the highest throughput, and its plan. Raises TooLarge if none fits."""
    best: tuple[Planned, Plan] | None = None
    for tried in _ladder(settings, architecture, console):
        if best is None or tried[1].tokens / tried[1].seconds > best[1].tokens / best[1].seconds:
            best = tried
    if best is None:
        raise TooLarge(f"no batch fits into {settings.topology}: take more chips, a task LoRA, or shorter sequences")
    return best


def _ladder(settings: Planned, architecture: Architecture, console: Console) -> Iterator[tuple[Planned, Plan]]:
    """For each remat policy the smallest batch, then as many as its memory lets hope for."""
    training, parts = settings.training, num_shards("batch")
    least = parts * (2 if settings.phase == "vectors" and settings.objective == "kl" else 1)

    def attempt(remat: Remat, lines: int) -> tuple[Planned, Plan] | None:
        new = dataclasses.replace(settings, training=dataclasses.replace(training, remat=remat, batch_size=lines))
        try:
            found = compiled(new, architecture)
        except TooLarge as error:
            console.print(f"remat {remat}, batch size {lines}: {error}")
            return None
        console.print(f"remat {remat}, batch size {lines}: {_short(found)}")
        return new, found

    for remat in REMATS:
        lines, most, before = least, _TOKENS // length_of(training) * parts, (0, 0)
        while lines <= max(most, least):
            found = attempt(remat, lines)
            if found is None:
                lines, most = (before[0] + lines) // 2 // least * least, lines - least
                if lines <= before[0]:
                    break
                continue
            yield found
            room = found[1].chip.memory - found[1].total
            line = max(found[1].activations - before[1], 1) / (lines - before[0])
            before = lines, found[1].activations
            # One point does not tell what a line takes: the second is tried in any case.
            hoped = min(max(int(lines + room / line), 2 * least if lines == least else 0), most) // least
            lines = least << (hoped.bit_length() - 1) if hoped else 0
            if lines <= before[0]:
                break


def _short(plan: Plan) -> str:
    return f"HBM {_gib(plan.total)} of {_gib(plan.chip.memory)} GiB, {plan.seconds:.3f} s, MFU {100 * plan.mfu:.1f}%"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def told(settings: Planned, plan: Plan) -> Iterator[str]:
    """What the verb prints."""
    training, account = settings.training, plan.account
    yield (
        f"{settings.model}, phase {settings.phase}, {training.batch_size} sequences x {length_of(training)} tokens, "
        f"remat {training.remat}, on {plan.chips} {plan.chip.name} chips ({settings.topology})"
    )
    yield (
        f"HBM per chip: parameters {_gib(plan.parameters)} + optimizer {_gib(plan.optimizer)} + activations "
        f"{_gib(plan.activations)} (gradients and gathered weights among them); total {_gib(plan.total)} of "
        f"{_gib(plan.chip.memory)} GiB ({100 * plan.total / plan.chip.memory:.0f}%)"
    )
    yield (
        f"FLOPs per step and chip: {plan.flops / 1e12:.1f} T by {plan.formula} (remat not counted); "
        f"the program's own products {(account.flops + account.kernel_flops) / 1e12:.1f} T"
    )
    for kind, (count, size) in sorted(account.collectives.items()):
        yield f"collective {kind}: {count} a step, {_gib(size)} GiB sent per chip"
    yield (
        f"step {plan.seconds:.3f} s estimated: compute {account.compute_seconds:.3f}, of it attention kernel "
        f"{account.kernel_seconds:.3f}; waiting for other chips {account.exposed_seconds:.3f}"
    )
    yield (
        f"MFU {100 * plan.mfu:.1f}% of {plan.chip.peak / 1e12:.0f} TFLOP/s; "
        f"{plan.tokens / plan.seconds:.0f} tokens/s, {plan.tokens / plan.seconds / plan.chips:.0f} per chip"
    )
    yield f"compiled in {plan.compile_seconds:.0f} s"
    yield (
        "All of this is known at compile time: nothing ran, and no TPU was near. Memory is the compiler's; time is its "
        "own estimate of each operation in the order of its schedule, collectives at 90% of the links' bandwidth, the "
        "attention kernel at 35% of the peak."
    )
