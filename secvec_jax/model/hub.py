"""Loading and saving models: embedded ones, Hugging Face folders and hub ids, GGUF files.

    model = load("smollm2")       # embedded name, folder, hub id or .gguf file
    model = load("smollm2", "nf4")    # its weights quantized, to be used and not trained
    model.save("folder")          # a Hugging Face folder that transformers reads, with all that the source's has

Only safetensors and GGUF are read; nothing remote is executed.
"""

import contextlib
import dataclasses
import json
import logging
import math
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from secvec_jax import assets
from secvec_jax.arguments import instance
from secvec_jax.arguments import path as checked_path
from secvec_jax.checks import check
from secvec_jax.checksums import FILE as CHECKSUMS
from secvec_jax.checksums import changed_file, check_folder, write_checksums
from secvec_jax.distributed import broadcast_from_first, is_main_process
from secvec_jax.errors import UserError
from secvec_jax.files import atomic_folder, check_entries, check_regular
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.checkpoint_files import (
    open_safetensors,
    read_json,
    stored_dtype,
    write_weights,
)
from secvec_jax.model.decoder import Decoder, abstract_decoder
from secvec_jax.model.embedded import EMBEDDED
from secvec_jax.model.families import members, weight_names
from secvec_jax.model.gguf import GGUF
from secvec_jax.model.hf_config import from_hf_config
from secvec_jax.model.hub_files import REPLACEABLE, fetched, snapshot
from secvec_jax.model.metadata import NOTICE, Metadata, checked_dtype, metadata_of
from secvec_jax.model.quantized import Precision
from secvec_jax.model.saved_weights import Backbone, FullPrecision, Widened, exact_dtypes, gathered, weight_sizes
from secvec_jax.model.tokenizer import MissingTokenizer, load_tokenizer, save_tokenizer
from secvec_jax.model.weights import assemble, resolve_head
from secvec_jax.output_checks import check_replaceable
from secvec_jax.remote import is_url
from secvec_jax.run_folders import find_model
from secvec_jax.sharding import AXIS_RULES, num_shards, replicate
from secvec_jax.trees import fingerprint, first_not_finite, num_parameters
from secvec_jax.turns import turn_ends

_log = logging.getLogger("secvec_jax")


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model as a value: its parameters, its tokenizer, where it came from and its metadata."""

    backbone: Decoder
    tokenizer: Any
    name: str
    metadata: Metadata = Metadata()
    adapter: Adapter | None = None
    """the task LoRA that fine-tuning trained and merged into the backbone, if any"""
    full_precision: FullPrecision | None = None
    """the source of the float32 weights of a model in lower precision; None: unknown, or the model is float32"""

    def __repr__(self) -> str:
        a, count = self.architecture, num_parameters(self.backbone)
        precision = "" if self.precision == "float32" else f" in {self.precision}"
        return f"Model({self.name!r}, {a.family}, {a.num_layers} layers, {count:,} parameters{precision})"

    @property
    def architecture(self) -> Architecture:
        return self.backbone.architecture

    @property
    def precision(self) -> Precision:
        """The precision of the backbone's weights."""
        return self.backbone.precision

    def with_backbone(self, backbone: Decoder, name: str | None = None) -> "Model":
        """The same model with other parameters, and no adapter."""
        return dataclasses.replace(self, backbone=backbone, name=name or self.name, adapter=None, full_precision=None)

    def with_merged(self, backbone: Decoder, adapter: Adapter) -> "Model":
        """The same model with an adapter that is merged into `backbone`."""
        full = self.full_precision
        if full is not None:
            full = dataclasses.replace(full, adapters=(*full.adapters, replicate(adapter)))
        return dataclasses.replace(self, backbone=backbone, adapter=adapter, full_precision=full)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a reply: those of the chat template and the tokenizer, then generation_config.json's."""
        return tuple(dict.fromkeys([*turn_ends(self.tokenizer), *self.metadata.eos_token_ids]))

    @property
    def fingerprint(self) -> str:
        """sha256 of the backbone's parameters in float32, whatever their precision; all processes must call this.

        It is kept until an array of the backbone is replaced, as a caller may do in place: its modules are mutable.
        """
        arrays = jax.tree.leaves(self.backbone)
        hashed, known = self.__dict__.get("_known_fingerprint", ((), ""))
        if len(arrays) != len(hashed) or any(array is not other() for array, other in zip(arrays, hashed)):
            known = fingerprint(self._in_full("the backbone's fingerprint is not known"))
            self.__dict__["_known_fingerprint"] = [weakref.ref(array) for array in arrays], known
        return known

    def _in_full(self, problem: str) -> Backbone:
        """The backbone in float32, for fingerprints and files. Raises UserError if it is not available."""
        if self.precision == "float32":
            return self.backbone
        if self.full_precision is not None:
            return self.full_precision
        if self.precision == "bfloat16":
            return Widened(self.backbone)
        raise UserError(
            f"{problem}: the weights are in {self.precision}, and the files with their full precision are not known; "
            "load the model without frozen_weights"
        )

    def save(self, folder: str | Path, card: str | None = None, *, dtype: Any = None) -> None:
        """Write a Hugging Face folder (config, sharded safetensors, tokenizer), completely or not at all.

        card: the text of its README.md. dtype: "float32", "bfloat16" or "float16", to which all weights are rounded;
        None: nothing is rounded, each weight is in the source's dtype if that holds it exactly, else in float32. For a
        model in lower precision, the weights that it was loaded from are written, with what was merged since. Raises
        UserError if `folder` is a file, or a folder with contents other than a model that this library wrote, which
        would be deleted, and if a weight is not finite.
        All processes must call this, and the first one writes. If it fails, the others raise UserError.
        """
        target = checked_path("folder", folder, "a folder to write the model into")
        check_replaceable(target, CHECKSUMS, REPLACEABLE)
        if card is not None:
            instance("card", card, str, "pass the text of the folder's README.md")
        if (wrong := first_not_finite(dict(self.backbone.named_leaves()))) is not None:
            raise UserError(
                f"the model is not saved: {wrong} has NaN or infinite numbers, so its training went wrong; train again "
                "with a lower learning rate"
            )
        chosen = None if dtype is None else checked_dtype(dtype)
        backbone = self._in_full("the model is not saved")
        kinds = exact_dtypes(backbone, chosen or self.metadata.dtype)
        kinds = kinds if chosen is None else dict.fromkeys(kinds, chosen)
        weights, error = gathered(backbone, kinds), None
        try:
            if is_main_process():
                _write_folder(folder, self.tokenizer, backbone, weights, kinds, self.metadata, card=card, dtype=chosen)
        except Exception as failure:
            error = failure
        if jax.process_count() > 1:
            # Every gather is a collective operation, so it has to run even if writing has failed.
            for _ in weights:
                pass
            if not broadcast_from_first(error is None) and error is None:
                raise UserError(f"the first process could not write {folder}: its own message says why")
        if error is not None:
            raise error


def load(source: str | Path, frozen_weights: Precision = "float32") -> Model:
    """The model that `source` names, sharded over the ambient mesh.

    source: an embedded name ("smollm2", "smollm2-aligned", "gemma3-270m"), a local Hugging Face folder, the run
    directory of a training, a local .gguf file, a hub id, or the URL of a folder in an object store
    (gs://bucket/model).
    frozen_weights: precision of the weights: "float32", or "bfloat16", "int8" or "nf4" for a model whose own weights
    are not trained: vectors and a task LoRA can be trained over it, in float32 (see `model.quantized`). Raises
    UserError if it is missing, corrupt, of an unsupported family, if weights are missing or unused, if the mesh does
    not divide it, or if it is embedded and its terms are not accepted (`embedded.ACCEPTED`).
    """
    checked_path("model", source, f"an embedded name ({', '.join(EMBEDDED)}), a folder, a hub id or a .gguf file")
    frozen_weights = check(Precision, frozen_weights, "frozen_weights")
    source = str(source)
    if source in EMBEDDED:
        return dataclasses.replace(_load_folder(_converted(source), frozen_weights), name=source)
    path = find_model(source)
    if path.suffix == ".gguf":
        check_regular(path)
        if not path.is_file():
            raise UserError(f"no file {path}: check --model")
        return _load_gguf(path, source, frozen_weights)
    if path.is_dir():
        loaded = _load_folder(path, frozen_weights)
        return dataclasses.replace(loaded, name=source) if is_url(source) else loaded
    return dataclasses.replace(_load_folder(snapshot(source), frozen_weights), name=source)


def load_architecture(source: str | Path) -> Architecture:
    """The architecture that `source` names, without its weights: whatever `load` takes, or just a config.json.

    Raises UserError as `load` does.
    """
    source = str(source)
    path = find_model(source)
    if source in EMBEDDED:
        converted = _folder_of(source)
        if not (converted / CHECKSUMS).is_file():
            converted = _converted(source)
        return from_hf_config(read_json(converted / "config.json"))
    if path.suffix == ".gguf":
        return GGUF(path).read()[0]
    if path.suffix == ".json":
        return from_hf_config(read_json(path))
    if path.is_dir():
        return from_hf_config(read_json(path / "config.json"))
    return from_hf_config(read_json(fetched(source, ["config.json"]) / "config.json"))


def _folder_of(name: str) -> Path:
    """Where an embedded model is converted to: another folder for another adapter of a later version."""
    adapter = EMBEDDED[name].adapter
    return assets.cache_dir() / "models" / (name if adapter is None else f"{name}-{adapter.sha256[:8]}")


def _converted(name: str) -> Path:
    """The embedded model as a Hugging Face folder in the cache, converted on first use by one process at a time."""
    from filelock import FileLock

    folder = _folder_of(name)
    if (folder / CHECKSUMS).is_file():
        if (changed := changed_file(folder)) is None:
            return folder
        _log.warning("%s has changed since it was written, so the model is converted again", changed)
        with contextlib.suppress(OSError):
            (folder / CHECKSUMS).unlink()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / CHECKSUMS).is_file():
                embedded = EMBEDDED[name]
                if embedded.terms is not None:
                    embedded.terms.check_accepted(name)
                file = GGUF(embedded.file())
                architecture, weight, _ = file.read()
                if embedded.adapter is not None:
                    weight = embedded.adapter.merged(weight)
                backbone = abstract_decoder(architecture)
                kinds = {
                    hf: "float32" for name in weight_names(architecture).values() for hf in members(name, architecture)
                }
                weights = ((hf, weight(hf)) for hf in weight_sizes(backbone, kinds))
                tokenizer, metadata = file.tokenizer(), file.metadata()
                if embedded.chat_template is not None:
                    tokenizer.chat_template = embedded.chat_template
                if embedded.terms is not None:
                    metadata = dataclasses.replace(metadata, notice=embedded.terms.notice)
                _write_folder(folder, tokenizer, backbone, weights, kinds, metadata)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror or error}); "
            "set SECVEC_CACHE to a writable folder with enough space"
        ) from error
    return folder


def _load_gguf(path: Path, name: str, precision: Precision) -> Model:
    file = GGUF(path)
    architecture, weight, shapes = file.read()
    check_mesh(architecture)
    tokenizer = file.tokenizer()
    backbone = assemble(architecture, weight, shapes, path, precision)
    full = None if precision == "float32" else FullPrecision(architecture, weight)
    return Model(backbone, tokenizer, name, file.metadata(), full_precision=full)


def _load_folder(folder: Path, precision: Precision) -> Model:
    check_entries(folder)
    check_folder(folder)
    config = read_json(folder / "config.json")
    architecture = from_hf_config(config)
    check_mesh(architecture)
    weights = resolve_head(architecture, open_safetensors(folder), folder)
    metadata = metadata_of(folder, config, stored_dtype(weights))
    tokenizer = load_tokenizer(folder)
    shapes = {name: weight.shape for name, weight in weights.items()}
    backbone = assemble(architecture, weights.__getitem__, shapes, folder, precision)
    full = None if precision == "float32" else FullPrecision(architecture, weights.__getitem__)
    return Model(backbone, tokenizer, str(folder), metadata, full_precision=full)


def check_mesh(architecture: Architecture) -> None:
    """Raises UserError if the ambient mesh does not divide the model."""
    a = architecture
    sizes = [
        (a.num_heads, "heads", f"{a.num_heads} attention heads"),
        (a.num_kv_heads, "heads", f"{a.num_kv_heads} key-value heads"),
        (a.intermediate_size, "mlp", f"intermediate size of {a.intermediate_size}"),
        (a.vocab_size, "vocab", f"vocabulary of {a.vocab_size}"),
        (a.hidden_size, "embed", f"hidden size of {a.hidden_size}"),
    ]
    for size, axis, description in sizes:
        mesh_axis, parts = AXIS_RULES[axis], num_shards(axis)
        if size % parts:
            common_divisor = math.gcd(*(other for other, name, _ in sizes if AXIS_RULES[name] == mesh_axis))
            *fit, last = [str(n) for n in range(1, parts) if common_divisor % n == 0]
            use = f"{', '.join(fit)} or {last}" if fit else last
            raise UserError(
                f"mesh {mesh_axis}={parts} does not divide the model's {description}: use {mesh_axis}={use}"
            )


def _write_folder(
    folder: str | Path,
    tokenizer: Any,
    backbone: Backbone,
    weights: Iterable[tuple[str, np.ndarray]],
    kinds: Mapping[str, str],
    metadata: Metadata,
    *,
    card: str | None = None,
    dtype: str | None = None,
) -> None:
    """Write a Hugging Face folder, completely or not at all.

    weights: in the order of `weight_sizes(backbone, kinds)`. kinds: the dtype of each. dtype: the one for config.json;
    None: the source's.
    """
    with atomic_folder(folder) as staging:
        save_tokenizer(tokenizer, staging)
        ids = _token_ids(tokenizer)
        config = metadata.config_for(backbone.architecture, ids, dtype)
        ends = () if isinstance(tokenizer, MissingTokenizer) else turn_ends(tokenizer)
        generation = metadata.generation_for(ids | ({"eos_token_id": list(ends)} if len(ends) > 1 else {}))
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if generation is not None:
            (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if metadata.notice is not None:
            (staging / NOTICE).write_text(metadata.notice, encoding="utf-8")
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")
        write_weights(weight_sizes(backbone, kinds), weights, staging)
        write_checksums(staging)


def _token_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of the special tokens that the tokenizer has, as config.json names them."""
    if isinstance(tokenizer, MissingTokenizer):
        return {}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    return {role: token for role, token in ids.items() if token is not None}
