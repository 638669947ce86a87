"""Resolve run directories to the model or vectors inside them: `--model runs/tuned`, `--vectors runs/vectors`.

Everything that loads a model or vectors from a path resolves it here, so all commands and `sv.load` accept the same
paths, and URLs of object stores.
"""

from pathlib import Path

from secvec_jax.errors import UserError
from secvec_jax.remote import local

_MODEL, _ADAPTER, _VECTORS = "config.json", "adapter_config.json", "security.safetensors"


def find_model(source: str | Path) -> Path:
    """Return the path of the model in a run directory; any other path is returned unchanged.

    Raises UserError for a run directory with several models, and for an adapter.
    """
    path = local(source)
    if not path.is_dir() or (path / _MODEL).is_file():
        return path
    if (path / "model" / _MODEL).is_file():
        return path / "model"
    if (path / _ADAPTER).is_file():
        raise UserError(
            f"{path} is an adapter, not a model: name the model it was trained for, and pass the adapter with "
            "--vectors (to merge it into the model: eval.py export --adapters)"
        )
    if candidates := sorted(
        str(config.parent) for config in (*path.glob("model/*/config.json"), *path.glob("*/config.json"))
    ):
        raise UserError(f"{path} contains {len(candidates)} models: use one of {', '.join(candidates)}")
    return path


def find_vectors(source: str | Path) -> Path:
    """Return the path of the vectors in a run directory; other paths that can hold vectors are returned unchanged.

    Raises UserError for a folder without vectors, and for a run directory of another command with several of them.
    """
    path = local(source)
    if not path.is_dir() or (path / _ADAPTER).is_file():
        return path
    for folder in (path / "vectors", path):
        if (folder / _VECTORS).is_file():
            return folder / _VECTORS
    candidates = sorted(str(file) for file in path.glob("vectors/*.safetensors"))
    if len(candidates) == 1:
        return Path(candidates[0])
    if candidates:
        raise UserError(f"{path} contains {len(candidates)} files of vectors: use one of {', '.join(candidates)}")
    raise UserError(
        f"{path} contains no vectors: use a run directory of `train.py vectors`, a file that it wrote, or a PEFT "
        f"adapter folder, which has an {_ADAPTER}"
    )
