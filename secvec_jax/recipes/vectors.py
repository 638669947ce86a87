"""`train.py vectors`: phase 1, training security vectors on harmful rows with the model frozen."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from secvec_jax.checks import NonNegativeInt, SettingError, Text, checked
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.advice import Advice, also_benign, default_rate
from secvec_jax.defenses.base import changed_settings
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.defenses.gate import MIN_HELD_OUT, Gate, measure_gate
from secvec_jax.defenses.security_vectors import PHASE1, Phase1, train_vectors
from secvec_jax.defenses.training_settings import check_unused
from secvec_jax.errors import UserError
from secvec_jax.inference import frozen_precision
from secvec_jax.model.hub import Model, load
from secvec_jax.model.quantized import Precision
from secvec_jax.presets import preset_field, section_of
from secvec_jax.recipes import preset_choice
from secvec_jax.recipes.training_run import TrainingRun
from secvec_jax.training.profiling import check_steps
from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.vectors.peft import save_peft
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering
from secvec_jax.vectors.store import save_vectors
from secvec_jax.workspace.packaged_rows import PackagedRows
from secvec_jax.workspace.stage import Stage


@checked
@dataclasses.dataclass(frozen=True)
class Vectors:
    """Phase 1: train security vectors on harmful rows, with the model frozen."""

    data: Text
    """about 100 rows of the behavior that fine-tuning must not teach"""
    model: str = "smollm2"
    """the model that will be fine-tuned; the vectors work with this model only"""
    benign: str | None = None
    """rows on which the vectors must not change the model's outputs; required by the kl objective"""
    out: str = "runs/vectors"
    """run directory; vectors are written to OUT/vectors/security.safetensors, LoRA also to OUT/vectors/peft"""
    kind: Literal["lora", "steering", "prompt"] = "lora"
    """lora: low-rank factors at every linear layer; steering: a direction per layer; prompt: a soft prompt per layer"""
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    steering: Steering = dataclasses.field(default_factory=Steering)
    prompt: SoftPrompt = dataclasses.field(default_factory=SoftPrompt)
    phase1: Phase1 = dataclasses.field(default_factory=Phase1)
    training: Training = PHASE1
    frozen_weights: Precision | None = None
    """precision of the model's weights: float32, bfloat16, int8 (one scale per output channel) or nf4 (4 bits, blocks
    of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU. Vectors are float32"""
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals before training; 0: none, and no test
    of the vectors at the end"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    preset: str | None = preset_field(section_of("vectors"))
    """settings by model size and hardware, such as 7-8b-80gb, which other flags override; without a name, all presets
    are listed (default: the one for the model's size and the devices, if there is one; none: no preset)"""
    profile: str | None = None
    """steps to profile, such as 10:15; the trace is written to OUT/profile, for XProf"""
    overwrite: bool = False
    """delete the run in OUT and start over"""

    def __post_init__(self) -> None:
        check_steps(self.profile)
        check_unused(self.training, validates=False)
        self._check_unused()
        if self.phase1.objective == "min_min" and self.frozen_weights not in (None, "float32"):
            raise UserError(
                f"--frozen-weights {self.frozen_weights} is for frozen weights, and the min_min objective trains a "
                "copy of them: choose another objective, or leave --frozen-weights out"
            )

    def _check_unused(self) -> None:
        """Raise UserError for settings of another kind of vectors, or of another objective, which would do nothing."""
        unused = [(kind, each) for kind in ("lora", "steering", "prompt") if kind != self.kind
                  for each in changed_settings(getattr(self, kind))]  # fmt: skip
        for kind, setting in unused:
            name, _, value = setting.partition("=")
            problem = f" is {value}, which is for --kind {kind}, and these vectors are of kind {self.kind}"
            raise SettingError(f"{kind}.{name}", f"{problem}: leave it out, or choose that kind")
        inner = [setting for setting in changed_settings(self.phase1) if setting.startswith("inner_")]
        if inner and self.phase1.objective != "min_min":
            name, _, value = inner[0].partition("=")
            problem = f" is {value}, which is for the objective min_min, and the objective is {self.phase1.objective}"
            raise SettingError(f"phase1.{name}", f"{problem}: leave it out, or choose that one")

    def default_preset(self) -> str | None:
        """The default preset (see `preset_choice`)."""
        return preset_choice.default_preset(self, "vectors")

    @property
    def precision(self) -> Precision:
        """The precision of the model's weights."""
        return "float32" if self.phase1.objective == "min_min" else frozen_precision(self.frozen_weights)


def vectors(settings: Vectors, command: str) -> None:
    """Run `train.py vectors`."""
    settings.phase1.check_rows(settings.benign)
    run = TrainingRun(settings, command)
    folder = run.folder / "vectors"

    def work(stage: Stage) -> dict[str, Any]:
        rows = load_rows(settings.data, ignore_fields=settings.ignore_fields)
        benign = None
        if settings.benign is not None:
            benign = load_rows(settings.benign, ignore_fields=settings.ignore_fields)
        model = load(settings.model, settings.precision)
        run.note(preset_choice.line(settings))
        sample = run.measure_refusals(model, stage, "at the start: ")
        if sample is not None:
            run.note(sample.no_refusals)
        last: dict[str, float] = {}
        show = stage.on_step()

        def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
            last.update(metrics)
            show(step, steps, metrics)

        run.note(default_rate(model, settings.training, PHASE1))
        run.note(also_benign(rows, benign))
        with warnings.catch_warnings(), run.profiled():
            warnings.simplefilter("ignore", Advice)  # it is noted above
            trained = train_vectors(
                model,
                rows,
                getattr(settings, settings.kind),
                benign=benign,
                phase1=settings.phase1,
                training=settings.training,
                checkpoints=run.checkpoints,
                on_step=on_step,
            )
        save_vectors(trained, folder / "security.safetensors", model)
        if isinstance(trained, LoRAVectors):
            save_peft(trained, folder / "peft", model)
        values = {"last_harmful_loss": last["loss/harmful"]} | ({"last_kl": last["kl"]} if "kl" in last else {})
        gate = _gate(run, model, trained, {"harmful": rows, "benign": benign}, stage)
        facts = {} if gate is None else {"gate": gate.as_dict()}
        return values | {"notes": run.notes, "facts": facts}

    run.finish(run.stages.run("vectors", work), f"the vectors are in {folder}")


def _gate(run: TrainingRun, model: Model, trained: Any, rows: dict[str, Any], stage: Stage) -> Gate | None:
    """The gate of the vectors, which is only reported; None if refusals are not measured.

    All given rows are trained on, so it is measured on packaged rows that are not among them.
    """
    if run.prompts is None:
        return None
    stage.say("testing the vectors")
    try:
        held_out = PackagedRows(model, run.settings.training.over(PHASE1)).held_out()
    except UserError as error:
        run.note(f"the vectors are not tested ({error}); --check-prompts 0 skips this")
        return None
    unseen = {kind: _unseen(model, held_out[kind], rows[kind]) for kind in ("harmful", "benign")}
    if min(map(len, unseen.values())) < MIN_HELD_OUT:
        run.note("the vectors are not tested: they were trained on (nearly) all packaged rows that could test them")
        return None
    gate = measure_gate(model, trained, unseen["harmful"], unseen["benign"])
    run.note(f"{gate}; the rows are packaged ones (AdvBench), and say nothing about vectors for another behavior")
    return gate


def _unseen(model: Model, candidates: Sequence[Example], trained_on: Any) -> list[Example]:
    """The candidates whose prompts are in none of the training rows."""
    examples = [] if trained_on is None else examples_of(model, trained_on)
    prompts = {example.tokens[: example.answer_start].tobytes() for example in examples}
    return [each for each in candidates if each.tokens[: each.answer_start].tobytes() not in prompts]
