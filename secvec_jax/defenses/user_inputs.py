"""The inputs of a defense on a user's own model and rows; a grid has its own inputs for the same defenses.

What a defense reads in addition (see `Need`) is given as functions, which are called once, when the defense reads it:
packaged rows are loaded, and replies generated, only if they are needed.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from secvec_jax.config import Training
from secvec_jax.defenses.base import MEANING, Defense, DefenseInputs, Need, changed_settings
from secvec_jax.defenses.finetuning import FinetuneOptions
from secvec_jax.defenses.inputs import Groups
from secvec_jax.defenses.mixing import checkpoints_of
from secvec_jax.defenses.security_vectors import ALIGN, ALIGN_TASK, PHASE1, Phase1, train_vectors
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.model.hub import Model
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.kinds import Spec
from secvec_jax.vectors.lora import LoRA

SHARED = (
    "batch_size", "max_seq_len", "long_rows", "control_tokens", "grad_accum_steps", "remat", "share_prefix", "seed",
    "save_every_seconds", "max_checkpoints",
)  # fmt: skip
"""Settings of the fine-tuning that a defense's other trainings share: those of rows and memory."""


def argument_of(need: Need) -> str:
    """The name of the argument, or of the flag, that gives it."""
    return need.removesuffix(" rows").removesuffix(" model").removeprefix("security ").replace(" ", "_")


def check_given(
    defense: Defense, given: Collection[Need], packaged: Collection[Need], named: Callable[[str], str]
) -> None:
    """Raises UserError if the defense is for grids only, or for an input that it does not read or that is missing.

    given: the needs that the user gives. packaged: the needs that have defaults. named: how the user writes an
    argument, such as "--safe" for "safe".
    """
    if defense.unusable:
        raise UserError(f"{defense.label!r} is for grids only: {defense.unusable}")
    reads = reads_of(defense, "security vectors" in given)
    for need in given:
        if need not in reads:
            because = ", since the vectors are given" if need in reads_of(defense, False) else ""
            raise UserError(f"{defense.name!r} reads no {need}{because}: leave out {named(argument_of(need))}")
    for need in reads:
        if need not in {*given, *packaged, "security vectors"}:
            raise UserError(f"{defense.name!r} needs {named(argument_of(need))}: {MEANING[need]}")


def reads_of(defense: Defense, with_vectors: bool) -> tuple[Need, ...]:
    """What a defense reads with its settings: also what its vectors are trained on, unless it is given vectors."""
    reads = dict.fromkeys(defense.reads)
    if "security vectors" in reads and not with_vectors:
        trained_on: tuple[Need, ...] = ("harmful rows", "benign rows")
        reads |= dict.fromkeys(trained_on)
    return tuple(reads)


def sharing(training: Training, finetuning: Training) -> Training:
    """The training with the fine-tuning's settings for rows and memory. finetuning: with all settings set."""
    return dataclasses.replace(training, **{name: getattr(finetuning, name) for name in SHARED})


class UserInputs(DefenseInputs):
    """A user's model and rows, how they are trained on, and the defender's rows, if any.

    sources: {need: function that returns it}. vectors: security vectors that were trained before; None: they are
    trained from the harmful and the benign rows.
    """

    def __init__(
        self,
        model: Model,
        rows: Groups,
        options: FinetuneOptions,
        sources: Mapping[Need, Callable[[], Any]],
        vectors: Any = None,
    ):
        self._model, self._rows, self._vectors = model, rows, vectors
        self._options = options | FinetuneOptions(training=options.get("training", PHASE2).over(PHASE2))
        self._sources = sources
        self._kept: dict[Need, Any] = {}

    @property
    def aligned(self) -> Model:
        return self._model

    @property
    def base(self) -> Model:
        return self._sources["base model"]()  # not kept, so that it is in memory only while it is needed

    @property
    def rows(self) -> Groups:
        return self._rows

    @property
    def safe(self) -> Sequence[Any]:
        return self._of("safe rows")

    @property
    def harmful(self) -> Sequence[Any]:
        return self._of("harmful rows")

    @property
    def benign(self) -> Sequence[Any]:
        return self._of("benign rows")

    @property
    def contrast(self) -> Sequence[Any]:
        return self._of("contrast rows")

    @property
    def eliciting_prompt(self) -> str:
        return self._of("eliciting prompt")

    @property
    def options(self) -> FinetuneOptions:
        return self._options

    def vectors(self, spec: Spec = LoRA(), behavior: str | None = None, **phase1: Any) -> Any:
        """The vectors that were given, or new ones.

        Raises UserError for another behavior, and if vectors were given and the defense has settings for new ones.
        """
        if behavior is not None:
            raise UserError(f"vectors of another behavior, {behavior!r}, exist only in grids: give several vectors")
        settings = Phase1(**phase1)
        if self._vectors is None:
            return self.train_vectors(spec, settings)
        changed = changed_settings(spec) if isinstance(spec, LoRA) else [f"kind={type(spec).__name__.lower()}"]
        changed += changed_settings(settings)
        if changed:
            raise UserError(
                f"{', '.join(changed)}: these are settings for training vectors, but trained vectors are given; leave "
                "out one or the other"
            )
        return self._vectors

    def train_vectors(self, spec: Spec, phase1: Phase1, on_step: OnStep | None = None) -> Any:
        """New vectors from the harmful and the benign rows. on_step: in place of that of the options."""
        return train_vectors(
            self.aligned,
            self.harmful,
            spec,
            benign=None if phase1.objective == "cross_entropy" else self.benign,
            phase1=phase1,
            training=self.sharing(PHASE1),
            checkpoints=self._checkpoints("vectors"),
            on_step=on_step or self._options.get("on_step"),
        )

    def align(self, name: str, align: Callable[..., Model], **training: Any) -> Model:
        """The base model aligned on the safe rows."""
        return self.train_aligned(align, **training)

    def train_aligned(self, align: Callable[..., Model], on_step: OnStep | None = None, **training: Any) -> Model:
        """The base model aligned on the safe rows. on_step: in place of that of the options."""
        options = FinetuneOptions(
            task=ALIGN_TASK,
            training=dataclasses.replace(self.sharing(ALIGN), **training),
            checkpoints=self._checkpoints("aligned"),
        )
        shown = on_step or self._options.get("on_step")
        return align(self.base, self.safe, **options | (FinetuneOptions(on_step=shown) if shown else {}))

    def sharing(self, training: Training) -> Training:
        """The training with the fine-tuning's settings for rows and memory."""
        return sharing(training, self._options["training"])

    def _of(self, need: Need) -> Any:
        if need not in self._kept:
            self._kept[need] = self._sources[need]()
        return self._kept[need]

    def _checkpoints(self, stage: str) -> Checkpoints | None:
        """The checkpoints of a training before the fine-tuning, in a subfolder of its checkpoints."""
        checkpoints = checkpoints_of(self._options.get("checkpoints"), stage)
        return checkpoints and dataclasses.replace(checkpoints, best=None)
