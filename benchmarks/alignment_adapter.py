"""Make the adapter of `smollm2-aligned`, which ships in secvec_jax/adapter_files, from the quickstart's aligned model.

    python train.py quickstart --model smollm2                              # leaves the model, aligned with seed 0
    python benchmarks/alignment_adapter.py runs/quickstart/model/aligned    # writes the file and prints its SHA-256
    python benchmarks/alignment_adapter.py --toy                            # smoke test on random weights

Needs the package installed (`pip install -e . --no-deps`). Each weight's change by the alignment is replaced by its
closest matrix of rank 8, whose two factors are rounded to int8 (see `secvec_jax.model.embedded.PackagedAdapter`; the
table there has the SHA-256).
"""

import argparse
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from secvec_jax.model.embedded import change_of

OUT = Path(__file__).parents[1] / "secvec_jax" / "adapter_files" / "smollm2-aligned.safetensors"
RANK = 8


def factors(change: np.ndarray, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    """B `[out, r]` and A `[r, in]`, equally large, whose product is the closest to `change` of that rank."""
    left, values, right = np.linalg.svd(change, full_matrices=False)
    signs = np.sign(left[np.abs(left).argmax(0), range(left.shape[1])])  # a decomposition is unique up to these
    root = (np.sqrt(values) * signs)[:rank]
    return left[:, :rank] * root, root[:, None] * right[:rank]


def in_eight_bits(factor: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The factor in int8, and the scale of each of its r vectors, which lie along `axis`."""
    scale = np.maximum(np.abs(factor).max(axis=axis, keepdims=True), np.finfo(np.float32).tiny) / 127
    return np.round(factor / scale).astype(np.int8), scale.astype(np.float32)


def pack(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], out: Path) -> tuple[str, float]:
    """Write the adapter; returns its SHA-256, and how much of the squared change it keeps."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    total = lost = 0.0
    for name in sorted(before):
        change = after[name].astype(np.float32) - before[name].astype(np.float32)
        if not change.any():
            continue
        b, a = factors(change)
        for part, factor, axis in (("a", a, 1), ("b", b, 0)):
            tensors[f"{name}.{part}"], tensors[f"{name}.{part}_scale"] = in_eight_bits(factor, axis)
        total += float(np.sum(change**2))
        lost += float(np.sum((change - change_of(name, tensors)) ** 2))
    content = save(tensors)
    out.write_bytes(content)
    return hashlib.sha256(content).hexdigest(), 1 - lost / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("aligned", nargs="?", help="folder of the aligned model")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--toy", action="store_true", help="smoke test")
    arguments = parser.parse_args()
    if arguments.toy:
        toy()
    elif arguments.aligned is None:
        parser.error("name the folder of the aligned model")
    else:
        report(*pack(weights_of("smollm2"), weights_of(arguments.aligned), arguments.out))


def report(sha256: str, kept: float) -> None:
    print(f"{sha256}  {kept:.1%} of the squared change")


def weights_of(model: str) -> dict[str, np.ndarray]:
    """The weights in the layers of a model, by their Hugging Face names."""
    import secvec_jax as sv

    with tempfile.TemporaryDirectory() as folder:
        from safetensors.numpy import load_file

        sv.load(model).save(Path(folder) / "model")
        stored = load_file(Path(folder) / "model" / "model.safetensors")
    return {name: array for name, array in stored.items() if ".layers." in name and array.ndim == 2}


def toy() -> None:
    """Pack a random change of one weight."""
    random = np.random.default_rng(0)
    before, after = ({"model.layers.0.weight": random.normal(size=(12, 10))} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        report(*pack(before, after, Path(folder) / "adapter.safetensors"))


if __name__ == "__main__":
    main()
