"""Results that depend only on a model, rows and settings, in the cache folder: computed once per model.

CACHE/results/KIND/KEY.json     the version that computed it, the result, and its digest; only the owner can read it
CACHE/results/KIND/KEY.lock     locked while it is read or computed

KEY is the digest of everything that the result depends on. Several processes may use one cache: entries appear and are
replaced as whole files, and a second process waits for the first. Processes of a cluster do not use the cache.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from filelock import FileLock, Timeout

import secvec_jax
from secvec_jax.assets import cache_dir
from secvec_jax.defenses.identity import of_model
from secvec_jax.digests import of_values
from secvec_jax.distributed import is_clustered
from secvec_jax.errors import UserError
from secvec_jax.evaluation.scorers import RULES
from secvec_jax.files import atomic_file, read_kept
from secvec_jax.inference import compute_dtype
from secvec_jax.model.hub import Model
from secvec_jax.sharding import platform


def cached_result(
    kind: str, inputs: Sequence[Any], make: Callable[[], Any], tell: Callable[[str], None] = lambda text: None
) -> Any:
    """The JSON value that `make` returns, from the cache if the same inputs gave it before.

    kind: the plural noun that names the results in messages and in the cache. inputs: JSON values, all that the result
    depends on. tell: called with a line when an entry is used, or cannot be used or written, and before a wait.
    """
    if is_clustered():
        return make()
    key = of_values(inputs).removeprefix("sha256:")
    with contextlib.ExitStack() as stack:
        try:
            folder = cache_dir() / "results" / kind.replace(" ", "-")
            stack.enter_context(locked(folder, key, lambda: tell(f"another process is computing the {kind}: waiting")))
        except UserError as error:
            tell(f"the {kind} are not cached ({error})")
            return make()
        file = folder / f"{key}.json"
        stored = _read(file, kind, tell)
        if stored is not None:
            tell(f"{kind}: from the cache, computed earlier for this model")
            return stored[0]
        result = make()
        record = {"version": secvec_jax.__version__, "digest": of_values([result]), "result": result}
        text = json.dumps(record)
        try:
            with atomic_file(file, mode=0o600) as staging:
                staging.write_text(text, encoding="utf-8")
        except UserError as error:
            tell(f"the {kind} are not cached ({error})")
        return json.loads(text)["result"]  # the same value, whether it is read or computed


def inputs_of(model: Model) -> list[Any]:
    """What the replies and losses of a model depend on besides prompts and rows: part of a key."""
    return [*of_model(model), list(model.stop_tokens), *settings_of_replies()]


def settings_of_replies() -> list[Any]:
    """What replies and their scores depend on besides the model and the prompts: part of a key."""
    return [platform(), jnp.dtype(compute_dtype()).name, RULES]


@contextlib.contextmanager
def locked(folder: Path, key: str, waits: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a key in a folder of the cache; `waits` is called if another process holds it.

    Raises UserError if the cache cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waits()
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {folder} ({error.strerror or error}); set SECVEC_CACHE to a writable one"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read(file: Path, kind: str, tell: Callable[[str], None]) -> tuple[Any] | None:
    """The result in a file; None if there is none, or none that can be used, which is reported."""
    try:
        if not file.exists():
            return None
        record = read_kept(file, "it is computed again")
        version, digest, result = record["version"], record["digest"], record["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:  # UserErrors are ValueErrors
        tell(f"the cached {kind} cannot be read ({str(error) or type(error).__name__}): computed again")
        return None
    if version != secvec_jax.__version__:
        tell(f"the cached {kind} are from version {version}, this is {secvec_jax.__version__}: computed again")
        return None
    if of_values([result]) != digest:
        tell(f"the cached {kind} are damaged: computed again")
        return None
    return (result,)
