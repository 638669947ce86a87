"""Reading and writing the tokenizer of a folder, which may have none."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from secvec_jax.errors import UserError

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files that hold a vocabulary, or a part of one."""

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

_LOADING_ENTRIES = ("is_local", "local_files_only", "name_or_path", "_commit_hash")
"""What transformers adds to tokenizer_config.json about how a tokenizer was loaded."""


class MissingTokenizer:
    """Takes the place of the tokenizer of a model without one: anything that needs text raises UserError."""

    def __init__(self, source: str):
        self._source = source

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"{self._source} has no tokenizer, so the model takes token ids only (sv.logits): for text, copy "
            "tokenizer.json and tokenizer_config.json of the model that it comes from into the folder"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"MissingTokenizer({self._source!r})"


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or a `MissingTokenizer` if it has none.

    Text is split as tokenizer.json says. `AutoTokenizer` rebuilds how some families split theirs from config.json's
    model_type, which differs for models whose file says something else.

    Raises UserError if the files are incomplete or cannot be read, or if the tokenizer merges at random (dropout).
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers would create an empty tokenizer.
        if any((folder / name).is_file() for name in SETTINGS):
            raise UserError(
                f"{folder} has no tokenizer that can be read: it lacks the vocabulary, copy tokenizer.json (or "
                "vocab.json and merges.txt, or tokenizer.model) of the model that it comes from into the folder"
            )
        return MissingTokenizer(str(folder))
    _check_number_of_tokens(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = _as_in_file(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), folder)
    except Exception as error:  # tokenizers raises plain Exception, transformers errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} has no tokenizer that can be read ({reason}): copy its files again") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of the tokenizers package, which all but a few have
    dropout = getattr(getattr(backend, "model", None), "dropout", None)
    if dropout:
        raise UserError(
            f"{folder / 'tokenizer.json'} sets dropout to {dropout:g}, so the same text is tokenized differently at "
            "every call: set it to null"
        )
    if backend is not None:
        _check_growth(backend, folder)
    _check_use(tokenizer, folder)
    return tokenizer


def _as_in_file(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer, or one that is read from tokenizer.json alone if this one splits text in another way."""
    path, backend = folder / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not path.is_file():
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    if _splitting(backend) == _splitting(_without_vocabulary(path)):
        return tokenizer
    from_file = PreTrainedTokenizerFast.from_pretrained(folder)
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):  # some classes have defaults
        if getattr(from_file, role) is None and getattr(tokenizer, role) is not None:
            setattr(from_file, role, getattr(tokenizer, role))
    return from_file


def _without_vocabulary(path: Path) -> Any:
    """The tokenizer of a file; of a BPE one without its vocabulary, which takes longer to read than all else."""
    import tokenizers

    entries = json.loads(path.read_text(encoding="utf-8"))
    if entries["model"].get("type") == "BPE":
        entries["model"] |= {"vocab": {}, "merges": []}
        entries["added_tokens"], entries["post_processor"] = [], None
    return tokenizers.Tokenizer.from_str(json.dumps(entries))


def _splitting(backend: Any) -> list[Any]:
    """What a tokenizer splits text by, except for its vocabulary."""
    parts = map(_state_of, (backend.normalizer, backend.pre_tokenizer))
    return [type(backend.model).__name__, *parts, *(getattr(backend.model, name, None) for name in _MODEL_SETTINGS)]


def _state_of(part: Any) -> Any:
    """A part of a tokenizer as JSON, in bytes; None if there is none or it cannot be written."""
    return getattr(part, "__getstate__", lambda: None)()


_MODEL_SETTINGS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges", "max_input_chars_per_word",
)  # fmt: skip


def _check_growth(backend: Any, folder: Path) -> None:
    """Raise UserError if replacements make texts so much longer that a row would take all memory."""
    for part in ("normalizer", "decoder"):
        state = _state_of(getattr(backend, part, None))
        if isinstance(state, bytes) and (growth := _growth(json.loads(state))) > _MAX_GROWTH:
            raise UserError(
                f"{folder / 'tokenizer.json'} has a {part} that makes a text up to {growth:.3g} times as long: fetch "
                "the model again"
            )


def _growth(steps: Any) -> float:
    """How many times as long a normalizer or a decoder can make a text by its replacements."""
    if isinstance(steps, list):
        return math.prod(map(_growth, steps))
    if not isinstance(steps, dict):
        return 1
    within = math.prod(_growth(steps[name]) for name in ("normalizers", "decoders") if name in steps)
    pattern = steps.get("pattern")
    matched = pattern.get("String", "") if isinstance(pattern, dict) else ""
    added = len(str(steps.get("content", ""))) / max(1, len(matched)) if steps.get("type") == "Replace" else 1
    return within * max(1, added) + len(str(steps.get("prepend", "")))


_MAX_GROWTH = 30
"""Replacements write escapes, such as "&amp;" for "&"."""


def _check_use(tokenizer: Any, folder: Path) -> None:
    """Raise UserError if the tokenizer fails on a sample text, as with a Rust panic in the tokenizers library."""
    try:
        ids = tokenizer.encode(_SAMPLE, add_special_tokens=False)
        if not all(0 <= token < 2**31 for token in ids):
            raise ValueError(f"a text has the token {max(ids)}")
        tokenizer.decode(ids)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder} has a tokenizer that does not work ({reason}): copy its files again") from error


_SAMPLE = "a The quick brown fox jumps over the lazy dog, 12 times.\n"


def _check_number_of_tokens(folder: Path) -> None:
    """Raise UserError for settings that add more tokens than any model has, which would take quadratic time."""
    for path in (folder / name for name in SETTINGS):
        if not path.is_file():
            continue
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # whoever reads the tokenizer says what is wrong
        lists = [entries, *entries.values()] if isinstance(entries, dict) else [entries]
        count = max(len(tokens) for tokens in [[], *lists] if isinstance(tokens, dict | list))
        if count > _MAX_TOKENS:
            raise UserError(
                f"{path} names {count:,} tokens, more than the limit of {_MAX_TOKENS:,}: fetch the model again"
            )


_MAX_TOKENS = 20_000


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files; none for a `MissingTokenizer`."""
    if isinstance(tokenizer, MissingTokenizer):
        return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        entries = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in entries.items() if key not in _LOADING_ENTRIES}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
