"""Keeps what JAX and Orbax would make anew for every program and every checkpoint, on import."""

import contextlib
import functools
import threading

from jax._src.interpreters import mlir

_USES = 100
_local = threading.local()


def _make_ir_context():
    """A context of MLIR, for a hundred programs of a thread.

    JAX makes one for each program and loads all dialects into it: some milliseconds. A context keeps every constant and
    location that it has seen, hence another one now and then.
    """
    if getattr(_local, "uses_left", 0) == 0:
        _local.context, _local.uses_left = _compute_context(), _USES
    _local.uses_left -= 1
    return _local.context


if hasattr(mlir, "make_ir_context"):
    _compute_context = mlir.make_ir_context
    mlir.make_ir_context = _make_ir_context

# Asked of the same few classes for each part of a checkpoint, it walks their attributes: a tenth of the time of a save.
with contextlib.suppress(ImportError, AttributeError):
    from orbax.checkpoint.experimental.v1._src.serialization import protocol_utils

    protocol_utils.is_subclass_protocol = functools.cache(protocol_utils.is_subclass_protocol)
