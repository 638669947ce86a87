"""The tokenizer that a GGUF file's metadata describes, as a transformers tokenizer: byte-level BPE or SentencePiece."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_SPLITS = dict.fromkeys(_LLAMA3, _LLAMA3_SPLIT) | {"qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""llama.cpp's types of tokens."""
_SPACE = "\u2581"
"""SentencePiece's character for a space."""


def build_tokenizer(path: Path, field: Callable[..., Any], required: Callable[[str], Any]) -> Any:
    """The tokenizer of the file at `path`. field, required: metadata by name, None or UserError where it is missing.

    Raises UserError for a tokenizer of another kind, and for metadata that is missing or malformed: text that is split
    differently than in training would give other tokens, without an error.
    """
    kind = required("tokenizer.ggml.model")
    if kind != "gpt2" and (kind != "llama" or field("tokenizer.ggml.add_space_prefix", True)):
        raise UserError(
            f"{path} has a {kind!r} tokenizer, of which GGUF keeps too little: use the model's Hugging Face folder"
        )
    pre = field("tokenizer.ggml.pre")
    if pre is None and kind == "gpt2":
        raise UserError(
            f"{path} lacks tokenizer.ggml.pre, which says how text is split into words: convert the model to GGUF "
            "again, or use its Hugging Face folder"
        )
    second = "merges" if kind == "gpt2" else "scores"
    tokens, ranks, types = (required(f"tokenizer.ggml.{key}") for key in ("tokens", second, "token_type"))
    for key, values in (("token_type", types), *([("scores", ranks)] if kind == "llama" else [])):
        if len(values) != len(tokens):
            raise UserError(f"{path} has {len(values)} tokenizer.ggml.{key} for {len(tokens)} tokens: fetch it again")

    def special(role: str) -> str | None:
        index = field(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise UserError(
                f"{path} has tokenizer.ggml.{role}_token_id {index} of {len(tokens)} tokens: fetch it again"
            )
        return tokens[index]

    try:
        if kind == "llama":
            tokenizer = _sentencepiece(tokens, ranks, types, special("unknown"))
        else:
            tokenizer = _byte_level_bpe(path, pre, tokens, ranks)
        return _completed(path, tokenizer, pre, tokens, types, special, field)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} has a damaged tokenizer ({reason}): fetch it again") from error


def _byte_level_bpe(path: Path, pre: str, tokens: list[str], merges: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models

    pairs = [(first, second) for first, second in (merge.split(" ", 1) for merge in merges)]
    # Llama 3 takes a whole word that is in the vocabulary, even if no merges lead to it.
    bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, ignore_merges=pre in _LLAMA3)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, path)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], scores: list[float], types: list[int], unknown: str | None) -> Any:
    """SentencePiece's BPE: the pair is merged whose token has the highest score; characters may become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: number for number, (token, kind) in enumerate(zip(tokens, types)) if kind == _NORMAL}
    merges = []
    for token, number in ids.items():
        for end in range(len(token) - 1, 0, -1):
            first, second = token[:end], token[end:]
            if first in ids and second in ids:
                merges.append((-scores[number], first, second))
    merges.sort(key=lambda merge: merge[0])
    bpe = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[(first, second) for _, first, second in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _completed(
    path: Path,
    tokenizer: Any,
    pre: str | None,
    tokens: list[str],
    types: list[int],
    special: Callable[[str], str | None],
    field: Callable[..., Any],
) -> Any:
    """The tokenizer as transformers' class, with special tokens, bos and eos, and the chat template."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    whole = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in whole])
    roles = {"bos": special("bos"), "eos": special("eos")}
    # As in llama.cpp, whose Llama 3 and SentencePiece begin with bos unless the file says otherwise.
    begins = (pre in _LLAMA3 or field("tokenizer.ggml.model") == "llama") and roles["bos"] is not None
    adds = {"bos": field("tokenizer.ggml.add_bos_token", begins),
            "eos": field("tokenizer.ggml.add_eos_token", False)}  # fmt: skip
    _add_around(tokenizer, path, roles, adds)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=roles["bos"],
        eos_token=roles["eos"],
        unk_token=special("unknown"),
        pad_token=special("padding"),
        chat_template=field("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _add_around(tokenizer: Any, path: Path, roles: dict[str, str | None], adds: dict[str, bool]) -> None:
    """Have the tokenizer add bos and eos around a text, as the file says."""
    from tokenizers.processors import TemplateProcessing

    for role, added in adds.items():
        if added and roles[role] is None:
            raise UserError(f"{path} has tokenizer.ggml.add_{role}_token without a {role}_token_id: fetch it again")
    parts = [roles["bos"] if adds["bos"] else None, "$A", roles["eos"] if adds["eos"] else None]
    around = [part for part in parts if part is not None]
    if len(around) > 1:
        known = [(part, tokenizer.token_to_id(part)) for part in dict.fromkeys(around) if part != "$A"]
        tokenizer.post_processor = TemplateProcessing(
            single=around, pair=[*around, *(f"{part}:1" if part != "$A" else "$B:1" for part in around)],
            special_tokens=known,
        )  # fmt: skip


def _pre_tokenizer(kind: str, path: Path) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if kind in ("smollm", "gpt-2"):
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
