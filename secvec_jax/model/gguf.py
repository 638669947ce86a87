"""Models out of llama.cpp's GGUF files: weights, architecture and tokenizer, without torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture, RopeScaling, rope_frequencies
from secvec_jax.model.families import weight_names
from secvec_jax.model.hf_config import from_hf_config

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3_SPLIT, "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")}


class GGUF:
    """An open GGUF file. Raises UserError if it cannot be read."""

    def __init__(self, path: str | Path):
        import gguf

        self.path = Path(path)
        try:
            self._reader = gguf.GGUFReader(self.path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise UserError(f"{path} is no whole GGUF file ({error}): fetch it again") from error

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value, `default` if the file does not have it."""
        found = self._reader.fields.get(name)
        return default if found is None else found.contents()

    @property
    def names(self) -> set[str]:
        return set(self._tensors) - {"rope_freqs.weight"}

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantized, row-major `[outputs, inputs]`."""
        import gguf

        found = self._tensors[name]
        shape = tuple(int(size) for size in reversed(found.shape))
        return gguf.quants.dequantize(found.data, found.tensor_type).reshape(shape).astype(np.float32, copy=False)

    def architecture(self) -> Architecture:
        """The architecture that the metadata describes. Raises UserError for another family."""
        kind = self.field("general.architecture")

        def value(key: str, default: Any = None) -> Any:
            return self.field(f"{kind}.{key}", default)

        if kind not in ("llama", "qwen2", "qwen3"):
            raise UserError(f"{self.path} holds a {kind!r} model: supported are llama (mistral), qwen2 and qwen3")
        heads = value("attention.head_count")
        for key in (
            "embedding_length",
            "feed_forward_length",
            "block_count",
            "context_length",
            "attention.head_count",
            "attention.layer_norm_rms_epsilon",
        ):
            if value(key) is None:
                raise UserError(f"{self.path} lacks {kind}.{key}: convert the model to GGUF anew")
        architecture = from_hf_config(
            {
                "model_type": kind,
                "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
                "hidden_size": value("embedding_length"),
                "intermediate_size": value("feed_forward_length"),
                "num_hidden_layers": value("block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": value("attention.head_count_kv", heads),
                "head_dim": value("attention.key_length", value("embedding_length") // heads),
                "rope_theta": value("rope.freq_base", 10000.0),
                # The file holds a float32; a rounded eps keeps the exported config.json readable.
                "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
                "max_position_embeddings": value("context_length"),
                "tie_word_embeddings": "output.weight" not in self._tensors,
                "attention_bias": "blk.0.attn_q.bias" in self._tensors and kind == "llama",
                "rope_scaling": self._linear_scaling(value),
            }
        )
        return self._with_frequency_factors(architecture)

    def _linear_scaling(self, value: Callable[..., Any]) -> dict | None:
        kind = value("rope.scaling.type", "none")
        if kind == "none":
            return None
        return {"rope_type": kind, "factor": value("rope.scaling.factor", 1.0)}

    def _with_frequency_factors(self, architecture: Architecture) -> Architecture:
        """Llama 3.1's scaling, which GGUF keeps as a tensor of factors, recognized by its values."""
        import dataclasses

        if "rope_freqs.weight" not in self._tensors:
            return architecture
        factors = self.tensor("rope_freqs.weight")
        plain = np.asarray(rope_frequencies(architecture))
        for factor in (8.0, 32.0):
            scaled = dataclasses.replace(architecture, rope_scaling=RopeScaling("llama3", factor))
            if np.allclose(plain / np.asarray(rope_frequencies(scaled)), factors, rtol=1e-3):
                return scaled
        raise UserError(f"{self.path} has rotary factors of an unknown kind: use the model's safetensors folder")

    def read(self) -> tuple[Architecture, Callable[[str], np.ndarray], set[str]]:
        """The architecture, a reader by Hugging Face weight name, and the Hugging Face names that are there."""
        architecture = self.architecture()
        places = {}
        for leaf, name in weight_names(architecture).items():
            for layer in range(architecture.num_layers) if name.layered else [None]:
                places[name.hf.format(layer)] = (name.gguf.format(layer), leaf)
        known = {gguf: hf for hf, (gguf, _) in places.items()}
        present = {known.get(name, name) for name in self.names}

        def weight(hf_name: str) -> np.ndarray:
            name, leaf = places[hf_name]
            array = self.tensor(name)
            if self.field("general.architecture") == "llama" and leaf.split(".")[1:2] in (["q_proj"], ["k_proj"]):
                array = _unpermute(array, architecture.head_dim)
            return array

        return architecture, weight, present

    def tokenizer(self):
        """The file's byte-level BPE tokenizer and chat template as a transformers tokenizer."""
        from tokenizers import AddedToken, Tokenizer, decoders, models
        from transformers import PreTrainedTokenizerFast

        if self.field("tokenizer.ggml.model") != "gpt2":
            raise UserError(
                f"{self.path} has a {self.field('tokenizer.ggml.model')!r} tokenizer, of which GGUF keeps too "
                "little: use the model's Hugging Face folder"
            )
        tokens = self.field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.field("tokenizer.ggml.merges")]
        pre = self.field("tokenizer.ggml.pre", "default")
        # Llama 3 takes a whole word that is in the vocabulary, even if no merges lead to it.
        bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe")
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = _pre_tokenizer(pre, self.path)
        tokenizer.decoder = decoders.ByteLevel()
        # llama.cpp's token types: 3 is a control token, 4 one that the user added.
        for token, kind in zip(tokens, self.field("tokenizer.ggml.token_type")):
            if kind in (3, 4):
                tokenizer.add_tokens([AddedToken(token, special=kind == 3, normalized=False)])

        def special(role: str) -> str | None:
            index = self.field(f"tokenizer.ggml.{role}_token_id")
            return None if index is None else tokens[index]

        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=special("bos"),
            eos_token=special("eos"),
            unk_token=special("unknown"),
            pad_token=special("padding") or special("eos"),
            chat_template=self.field("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
        )


def _pre_tokenizer(kind: str, path: Path):
    from tokenizers import Regex, pre_tokenizers

    if kind in ("smollm", "default", "gpt-2"):
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
        return pre_tokenizers.Sequence([*digits, bytes_only])
    if kind not in _SPLITS:
        raise UserError(f"{path} has an unknown pre-tokenizer {kind!r}: use the model's Hugging Face folder")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLITS[kind]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two rotary halves in each head's rows."""
    rows = weight.shape[0]
    halves = weight.reshape(rows // head_dim, head_dim // 2, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
