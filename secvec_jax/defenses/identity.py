"""Label checkpoints with the content of a training's inputs, so that only the same training resumes from them."""

import contextlib
import dataclasses
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from secvec_jax import digests
from secvec_jax.config import Training
from secvec_jax.data.chat import Example
from secvec_jax.data.encoded import Examples
from secvec_jax.data.pipeline import Stream
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import is_quantized
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.objective import LEARN
from secvec_jax.trees import fingerprint

FORMAT = 5
"""The version of checkpoints and of how rows become steps; increased when a resumed training would differ."""

_FREE = ("max_steps", "epochs", "save_every_seconds", "max_checkpoints")
"""Settings that do not change any step."""


def with_inputs(
    checkpoints: Checkpoints | None,
    model: Model,
    training: Training,
    steps: int,
    streams: Mapping[str, Stream],
    eval_stream: Stream | None = None,
    **more: Any,
) -> Checkpoints | None:
    """The checkpoints, labeled with the content of everything that goes into the training.

    more: further inputs: trees, settings, functions.

    Under a constant schedule the number of steps is not an input, and the final state is saved, so that the training
    can be extended. In a cluster all processes must call this.
    """
    if checkpoints is None:
        return None
    training = training.over(Training.base)
    settings = {f"training.{name}": value for name, value in dataclasses.asdict(training).items() if name not in _FREE}
    settings["training.warmup_steps"] = min(training.warmup_steps, steps - 1)
    extendable = training.schedule == "constant"
    inputs = {"format": FORMAT, **settings, "the model": f"sha256:{model.fingerprint}"}
    inputs |= {} if extendable else {"the number of steps": steps}
    inputs["what the model's weights are held in"] = _precision_of(model)
    inputs["the tokenizer or its chat template"] = of_tokenizer(model.tokenizer)
    validation = {} if eval_stream is None else {"validation": eval_stream}
    for name, stream in {**streams, **validation}.items():
        of_stream = "" if name == LEARN else f"{name} "
        inputs[f"{of_stream}batch"] = f"{stream.batch_size} x {stream.seq_len} tokens"
        inputs |= {f"{of_stream}rows {kind!r}": of_rows(examples) for kind, examples in stream.examples.items()}
    for name, value in more.items():
        inputs[name.replace("_", " ")] = digests.of_values([content_of(value)])
    plain_inputs = {label: _plain(value) for label, value in inputs.items()} | dict(checkpoints.inputs)
    return dataclasses.replace(checkpoints, inputs=plain_inputs, keep_end=checkpoints.keep_end or extendable)


def of_model(model: Model) -> list[Any]:
    """What determines a model's results: its weights and their precision, its architecture and its tokenizer.

    A model in lower precision has the fingerprint of its full-precision weights, but other results.
    """
    return [model.fingerprint, _precision_of(model), content_of(model.architecture), of_tokenizer(model.tokenizer)]


def _precision_of(model: Model) -> str:
    """The precision of the weights, and how many adapters are stored separately from quantized ones, as quantizing the
    sum would give other weights."""
    full = model.full_precision
    num_separate = 0 if full is None or not is_quantized(model.precision) else len(full.adapters)
    return f"{model.precision} with {num_separate} adapters beside" if num_separate else model.precision


def of_rows(rows: Sequence[Any]) -> str:
    """The digest of rows, or of examples; for examples that are encoded on demand, of their rows."""
    row = rows.row if isinstance(rows, Examples) else rows.__getitem__
    return digests.of_values(_row(row(index)) for index in range(len(rows)))


def _row(row: Any) -> Any:
    if not isinstance(row, Example):
        return row
    parts = (row.tokens, row.supervised, row.weights)
    return [None if part is None else np.asarray(part).tolist() for part in parts]


def of_tokenizer(tokenizer: Any) -> str:
    """The digest of a tokenizer, its chat template and the special tokens that this names; the last settings of padding
    and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: Any = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else type(tokenizer).__qualname__
    else:
        vocabulary = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    template, eos_token = getattr(tokenizer, "chat_template", None), getattr(tokenizer, "eos_token", None)
    tokens = getattr(tokenizer, "special_tokens_map", {})
    written = {name: str(token) for name, token in tokens.items() if name != "eos_token" and name in str(template)}
    return digests.of_values([vocabulary, template, eos_token, *([written] if written else [])])


def content_of(value: Any, depth: int = 8) -> Any:
    """Any value's content as JSON, equal for equal values: trees by their bytes, functions by name and closure.

    A step of a defense, `vaccine(rho=2)`, is a function that holds its settings.
    """
    if depth == 0:
        return type(value).__qualname__
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, jax.Array | np.ndarray):
        return fingerprint(value)
    if isinstance(value, Mapping):
        return {str(key): content_of(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content_of(item, depth - 1) for item in value]
    if hasattr(value, "cache_info"):  # a function whose results are cached (functools.lru_cache)
        value = value.__wrapped__
    if isinstance(value, functools.partial):
        return [content_of(part, depth - 1) for part in (value.func, value.args, value.keywords)]
    if inspect.isfunction(value):
        closure = {}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            with contextlib.suppress(ValueError):  # a name that is not bound yet
                closure[name] = cell.cell_contents
        return [f"{value.__module__}.{value.__qualname__}", content_of(closure, depth - 1)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not `vars`: it also has what an object remembers, such as a model's fingerprint.
        content = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}
        return [type(value).__qualname__, content_of(content, depth - 1)]
    leaves = jax.tree.leaves(value)
    if all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
        return fingerprint(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _plain(value: Any) -> Any:
    """A value that JSON returns unchanged; a setting without a value is one, which differs from any other."""
    return value if isinstance(value, str | bool | int | float) else "unset" if value is None else str(value)
