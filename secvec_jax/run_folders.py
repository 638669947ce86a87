"""Run directories in place of the files in them: `--model runs/tuned`, `--vectors runs/vectors`.

Whatever loads a model or vectors from a path asks here first, so every command and `sv.load` take the same paths.
"""

from pathlib import Path

from secvec_jax.errors import UserError

_MODEL, _ADAPTER, _VECTORS = "config.json", "adapter_config.json", "security.safetensors"


def find_model(source: str | Path) -> Path:
    """The path of a model: that of a run directory's model, any other path as it is.

    Raises UserError for a run directory of several models, and for an adapter.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or (path / _MODEL).is_file():
        return path
    if (path / "model" / _MODEL).is_file():
        return path / "model"
    if (path / _ADAPTER).is_file():
        raise UserError(
            f"{path} is an adapter, not a model: give the model that it was trained for, and the adapter with "
            "--vectors (to merge it into the model: eval.py export --adapters)"
        )
    if several := sorted(
        str(found.parent) for found in (*path.glob("model/*/config.json"), *path.glob("*/config.json"))
    ):
        raise UserError(f"{path} is not a model, it has {len(several)} of them: give one of {', '.join(several)}")
    return path


def find_vectors(source: str | Path) -> Path:
    """The path of vectors: that of a run directory's vectors, any other path as it is.

    Raises UserError for a folder without vectors, and for one of several that are not from `train.py vectors`.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or (path / _ADAPTER).is_file():
        return path
    for folder in (path / "vectors", path):
        if (folder / _VECTORS).is_file():
            return folder / _VECTORS
    several = sorted(str(found) for found in path.glob("vectors/*.safetensors"))
    if len(several) == 1:
        return Path(several[0])
    if several:
        raise UserError(f"{path} has {len(several)} files of vectors: give one of {', '.join(several)}")
    raise UserError(
        f"{path} has no vectors: give a run directory of `train.py vectors`, a file that it wrote, or a PEFT adapter "
        f"folder, which has an {_ADAPTER}"
    )
