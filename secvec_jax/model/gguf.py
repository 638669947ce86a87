"""Reading models from llama.cpp's GGUF files: weights, architecture and tokenizer, without torch.

A file in parts (NAME-00001-of-00003.gguf) is read as one, whichever part is named. Metadata that is missing takes
llama.cpp's own default where there is one; a key that could change what the model computes and is not understood is
refused by name.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture, RopeScaling, rope_frequencies
from secvec_jax.model.families import weight_names
from secvec_jax.model.gguf_header import check_gguf
from secvec_jax.model.gguf_tokenizer import build_tokenizer
from secvec_jax.model.hf_config import from_hf_config
from secvec_jax.model.metadata import Metadata
from secvec_jax.model.tokenizer import MissingTokenizer

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""Family by GGUF's `general.architecture`."""
_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_REQUIRED = (
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "context_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_READ = {*_REQUIRED, "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
         "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"}  # fmt: skip
_READ_OF_GEMMA3 = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa",
                   "final_logit_softcapping"}  # fmt: skip
_WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
_INERT = {"attention.causal": True, "use_parallel_residual": False, "expert_count": 0, "expert_used_count": 0,
          "rope.scaling.attn_factor": 1.0, "attention.layer_norm_epsilon": None}  # fmt: skip
"""Keys that the decoder supports only at this value."""
_BLOCK = 2**22
"""Weights that are dequantized at a time: the table of a large vocabulary would take several times its size at once."""


class GGUF:
    """An open GGUF file, with all its parts. Raises UserError if it cannot be read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._readers = _readers(self.path)
        self._tensors: dict[str, Any] = {}
        for reader in self._readers:
            self._tensors |= {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value, `default` if the file does not have it. Raises UserError if it is damaged."""
        for reader in self._readers:
            if (field := reader.fields.get(name)) is not None:
                try:
                    return field.contents()
                except Exception as error:  # gguf has no error class for damaged values
                    raise UserError(f"{self.path} has a damaged {name} ({error}): fetch it again") from error
        return default

    def required(self, name: str) -> Any:
        """A metadata value. Raises UserError if the file does not have it."""
        value = self.field(name)
        if value is None:
            raise UserError(f"{self.path} lacks {name}: convert the model to GGUF again")
        return value

    @property
    def names(self) -> set[str]:
        return set(self._tensors) - {"rope_freqs.weight"}

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantized, row-major `[outputs, inputs]`."""
        import gguf

        stored, shape = self._tensors[name], self._shape(name)
        try:
            if len(shape) < 2:
                wide = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(shape)
                return wide.astype(np.float32, copy=False)
            rows, table = max(1, _BLOCK // shape[-1]), np.empty(shape, np.float32)
            if len(stored.data) != shape[0]:
                raise ValueError(f"it has {len(stored.data)} rows for {shape[0]}")
            for start in range(0, shape[0], rows):
                part = table[start : start + rows]
                part[...] = gguf.quants.dequantize(stored.data[start : start + rows], stored.tensor_type)
            return table
        except Exception as error:  # an unknown quantization, or data that does not fill the shape
            kind = getattr(stored.tensor_type, "name", stored.tensor_type)
            raise UserError(f"{self.path}: {name} of type {kind} cannot be read ({error}): use another file") from error

    def architecture(self) -> Architecture:
        """The architecture that the metadata describes.

        Raises UserError for another family, and for metadata that is missing, damaged or not understood.
        """
        kind = self.required("general.architecture")
        if kind not in _FAMILIES:
            raise UserError(
                f"{self.path} holds a {kind!r} model: supported are llama (mistral), qwen2, qwen3 and gemma3"
            )

        def value(key: str, default: Any = None) -> Any:
            return self.field(f"{kind}.{key}", default)

        for key in _REQUIRED:
            self.required(f"{kind}.{key}")
        self._check_keys(kind, value)
        if "token_embd.weight" not in self._tensors or len(self._tensors["token_embd.weight"].shape) != 2:
            raise UserError(f"{self.path} lacks token_embd.weight: convert the model to GGUF again")
        try:
            heads = value("attention.head_count")
            head_dim = value("attention.key_length", value("embedding_length") // heads)
            for key in ("attention.value_length", "rope.dimension_count"):
                if value(key, head_dim) != head_dim:
                    raise UserError(f"{self.path}: {kind}.{key} {value(key)} is not supported: heads have {head_dim}")
            architecture = from_hf_config(
                {
                    "model_type": _FAMILIES[kind],
                    "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
                    "hidden_size": value("embedding_length"),
                    "intermediate_size": value("feed_forward_length"),
                    "num_hidden_layers": value("block_count"),
                    "num_attention_heads": heads,
                    "num_key_value_heads": value("attention.head_count_kv", heads),
                    "head_dim": head_dim,
                    "rope_theta": value("rope.freq_base", 10000.0),
                    # The file holds a float32; a rounded eps keeps the exported config.json readable.
                    "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
                    "max_position_embeddings": value("context_length"),
                    "tie_word_embeddings": "output.weight" not in self._tensors,
                    "attention_bias": "blk.0.attn_q.bias" in self._tensors and kind == "llama",
                    "rope_scaling": _linear_scaling(value),
                    **(_gemma3_entries(value, head_dim) if kind == "gemma3" else {}),
                }
            )
            return self._with_frequency_factors(architecture)
        except UserError as error:
            raise UserError(f"{self.path}: {str(error).replace('config.json', 'the metadata')}") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self.path} has metadata of a wrong kind ({error}): fetch it again") from error

    def _check_keys(self, kind: str, value: Callable[..., Any]) -> None:
        if kind == "gemma3":
            self.required("gemma3.attention.sliding_window")
        read = _READ | (_READ_OF_GEMMA3 if kind == "gemma3" else set())
        for reader in self._readers:
            for name in reader.fields:
                key = name.removeprefix(f"{kind}.")
                if key == name or key in read | _WITHOUT_EFFECT or (key in _INERT and value(key) == _INERT[key]):
                    continue
                raise UserError(
                    f"{self.path} has {name} {str(value(key))[:40]}, which is not supported: use the model's Hugging "
                    "Face folder"
                )

    def _with_frequency_factors(self, architecture: Architecture) -> Architecture:
        """Llama 3.1's scaling, which GGUF keeps as a tensor of factors, recognized by its values."""
        if "rope_freqs.weight" not in self._tensors:
            return architecture
        factors = self.tensor("rope_freqs.weight")
        plain = np.asarray(rope_frequencies(architecture))
        for factor in (8.0, 32.0):
            scaled = dataclasses.replace(architecture, rope_scaling=RopeScaling("llama3", factor))
            if factors.shape == plain.shape and np.allclose(
                plain / np.asarray(rope_frequencies(scaled)), factors, rtol=1e-3
            ):
                return scaled
        raise UserError("it has rotary factors of an unknown kind: use the model's safetensors folder")

    def read(self) -> tuple[Architecture, Callable[[str], np.ndarray], dict[str, tuple[int, ...]]]:
        """The architecture, a reader by Hugging Face weight name, and the shapes of the file's weights by that name."""
        architecture = self.architecture()
        places = {}
        for leaf, name in weight_names(architecture).items():
            for layer in range(architecture.num_layers) if name.layered else [None]:
                places[name.hf.format(layer)] = (name.gguf.format(layer), leaf)
        known = {gguf: hf for hf, (gguf, _) in places.items()}
        shapes = {known.get(name, name): self._shape(name) for name in self.names}

        def weight(hf_name: str) -> np.ndarray:
            name, leaf = places[hf_name]
            array = self.tensor(name)
            permuted = self.field("general.architecture") == "llama" and leaf.split(".")[1:2] in (
                ["q_proj"],
                ["k_proj"],
            )
            if permuted and array.shape[0] % architecture.head_dim == 0:
                array = _unpermute(array, architecture.head_dim)
            if architecture.norm == "rms_plus_one" and leaf.endswith("norm"):
                array = array - 1  # the file has 1 + weight, the factor of the norm
            return array

        return architecture, weight, shapes

    def tokenizer(self) -> Any:
        """The file's tokenizer and chat template as a transformers tokenizer.

        A `MissingTokenizer` if the file holds none. Raises UserError for one that is incomplete or of another kind.
        """
        if not any(name.startswith("tokenizer.ggml.") for reader in self._readers for name in reader.fields):
            return MissingTokenizer(str(self.path))
        return build_tokenizer(self.path, self.field, self.required)

    def metadata(self) -> Metadata:
        """The tokens that end a text or a turn; weights are saved in float32."""
        ids = [self.field(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(int(token) for token in ids if token is not None))
        return Metadata(generation={"eos_token_id": ends} if len(ends) > 1 else None)


def _opened(path: Path) -> Any:
    import gguf

    check_gguf(path)
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # gguf raises errors of many kinds for damaged bytes
        raise UserError(f"{path} is not a complete GGUF file ({error}): fetch it again") from error


def _readers(path: Path) -> list[Any]:
    """All files of the model that `path` belongs to, in order."""
    reader = _opened(path)
    count, number = (
        int(reader.fields[key].contents()) if key in reader.fields else default
        for key, default in (("split.count", 1), ("split.no", 0))
    )
    if count <= 1:
        return [reader]
    named = _PART.fullmatch(path.name)
    if named is None or (int(named["number"]), int(named["count"])) != (number + 1, count):
        raise UserError(
            f"{path} is part {number + 1} of a file split into {count}: name the parts NAME-00001-of-{count:05}.gguf "
            "and so on, or merge them (llama-gguf-split --merge)"
        )
    parts = [path.with_name(f"{named['name']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing, part of a model that is split into {count} files: fetch it too")
    return [reader if part == path else _opened(part) for part in parts]


def _gemma3_entries(value: Callable[..., Any], head_dim: int) -> dict[str, Any]:
    """The entries of config.json that only Gemma 3 has, with llama.cpp's defaults."""
    layers, period = value("block_count"), value("attention.sliding_window_pattern", 6)
    # Only the 27B model divides scores by the root of another size than that of its heads.
    scalar = value("embedding_length") // value("attention.head_count") if layers == 62 else head_dim
    return {
        "sliding_window": value("attention.sliding_window"),
        "layer_types": [
            "full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(layers)
        ],
        "rope_local_base_freq": value("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": value("final_logit_softcapping"),
    }


def _linear_scaling(value: Callable[..., Any]) -> dict | None:
    factor = value("rope.scaling.factor", value("rope.scale_linear"))
    kind = value("rope.scaling.type", "none" if factor is None else "linear")
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    return {"rope_type": kind, "factor": factor}


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two rotary halves in each head's rows."""
    rows = weight.shape[0]
    halves = weight.reshape(rows // head_dim, head_dim // 2, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
