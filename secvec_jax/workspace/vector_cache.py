"""Security vectors in the cache folder, so that they are trained only once per model.

CACHE/vectors/KEY/security.safetensors     the vectors; only the owner can read them CACHE/vectors/KEY/entry.json the
version that trained them, and the gate that was measured CACHE/vectors/KEY.lock                     locked while they
are read or trained

KEY is the digest of everything that they depend on: the model (`identity.of_model`), the rows, the settings. Several
processes may use one cache: entries appear and are replaced as whole folders, and a second process waits for the first.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import secvec_jax
from secvec_jax.assets import cache_dir
from secvec_jax.config import Training
from secvec_jax.defenses.identity import content_of, of_model, of_rows
from secvec_jax.digests import of_values
from secvec_jax.files import atomic_folder, read_kept
from secvec_jax.model.hub import Model
from secvec_jax.vectors.kinds import Vectors
from secvec_jax.vectors.store import load_vectors, save_vectors
from secvec_jax.workspace.result_cache import locked

_FILE, _ENTRY = "security.safetensors", "entry.json"

_FREE = ("save_every_seconds", "max_checkpoints", "remat")
"""Settings that the vectors do not depend on."""


def key_of(model: Model, rows: Mapping[str, Sequence[Any]], training: Training, *settings: Any) -> str:
    """The key of the vectors trained for a model on rows, by kind, with these settings."""
    trained = {name: value for name, value in content_of(training.over(Training.base))[1].items() if name not in _FREE}
    contents = [of_rows(rows[kind]) for kind in sorted(rows)]
    return of_values([*of_model(model), contents, trained, content_of(settings)]).removeprefix("sha256:")


class Entry:
    """The place of one key's vectors in the cache, locked by this process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, model: Model, tell: Callable[[str], None]) -> tuple[Vectors, dict[str, Any]] | None:
        """The vectors and their measurements; None if there are none, or none that can be used, which is reported."""
        if not self.folder.exists():
            return None
        try:
            record = read_kept(self.folder / _ENTRY, "they are trained again")
            version, measured = record["version"], dict(record["measured"])
            if version != secvec_jax.__version__:
                tell(f"the cached vectors are from version {version}, this is {secvec_jax.__version__}: trained again")
                return None
            return load_vectors(self.folder / _FILE, model), measured
        except (OSError, ValueError, KeyError, TypeError) as error:  # UserErrors are ValueErrors
            tell(f"the cached vectors cannot be read ({str(error) or type(error).__name__}): trained again")
            return None

    def write(self, vectors: Vectors, model: Model, measured: Mapping[str, Any]) -> None:
        """Store the vectors and their measurements, replacing any others. Raises UserError if they cannot be
        written."""
        with atomic_folder(self.folder, mode=0o700) as staging:
            save_vectors(vectors, staging / _FILE, model)
            record = {"version": secvec_jax.__version__, "measured": dict(measured)}
            (staging / _ENTRY).write_text(json.dumps(record))


@contextlib.contextmanager
def locked_entry(key: str, tell: Callable[[str], None]) -> Iterator[Entry]:
    """The entry of a key, which no other process reads or makes in the meantime; `tell` is called before a wait.

    Raises UserError if the cache cannot be written.
    """
    folder = cache_dir() / "vectors"
    with locked(folder, key, lambda: tell("another process is training the vectors of this model: waiting for it")):
        yield Entry(folder / key)
