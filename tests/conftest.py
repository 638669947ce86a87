"""Eight emulated CPU devices for every test, and tiny models of every family with their transformers counterparts."""

# ruff: noqa: E402 -- the settings must stand before jax is first imported.

import gc

gc.disable()  # until all tests are collected: what their modules import stays

import getpass
import os
import shutil
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

# A suite that a script starts in the background inherits an ignored SIGINT; tests of Ctrl-C would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Environment variables rather than jax.config, so that the processes that tests start have them as well.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nearly all of the suite's time is compilation: programs are kept on disk between tests, processes and runs, and the
# compiler's optimizations, which these small programs never earn back, are off. 0 tests what users compile.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    _flags = ["--xla_cpu_parallel_codegen_split_count=1"]  # saves a seventh of the compiler's time
    if version("jaxlib").startswith("0.10."):  # saves a third; in later versions, XLA ends a process that has it
        _flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"secvec_jax_xla_{getpass.getuser()}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Thousands of small checkpoints are written and deleted: in memory, where that is offered, none waits for a disk.
_memory = Path("/dev/shm")
if _memory.is_dir() and os.access(_memory, os.W_OK) and shutil.disk_usage(_memory).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_memory))

import jax

jax.config.update("jax_num_cpu_devices", 8)

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest

from secvec_jax.programs import drop_programs_if_many
from tests import quick_libraries as quick_libraries
from tests import quick_shuffle
from tests.disks import Disk
from tests.toys import VOCABULARY, build_tokenizer

# The same inputs in every run and no time limits: neither chance nor the load of the machine decides what fails.
# `--hypothesis-profile default` tries other inputs.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fixed")

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip

_TIED = {"tie_word_embeddings": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "llama-llama3": {"model_type": "llama", "rope_parameters": _LLAMA3, "head_dim": 16},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 0,
    },
    "qwen2-mixed": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, **_TIED},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **_TIED,
    },
    "opt": {"model_type": "opt", "ffn_dim": 64, **_TIED},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
    "phi3-window": {"model_type": "phi3", "sliding_window": 5, "pad_token_id": 0},
}
"""Tiny configurations: what each changes in `_BASE`."""

_READER_VOCABULARY = 2048

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One model twice: `hf` in transformers, `model` as `hub.load` reads it from `folder`."""

    hf: Any
    folder: Path
    model: Any


def build_hf_model(seed: int = 0, **config: Any):
    """A transformers model in float32 whose norms and biases are random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    settings = _BASE | config
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    hf = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return hf


def pytest_collection_finish() -> None:
    """Tracing allocates so much that collections at Python's intervals take a tenth of the suite's time and more."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


def pytest_sessionfinish() -> None:
    """Keep what makes the next run faster."""
    quick_shuffle.keep()
    gc.freeze()  # pytest is about to collect five times, seconds each after all that was traced


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """None where one file is tested, whose tests one worker takes anyway."""
    files = {str(argument).partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs where there are too many."""
    yield
    drop_programs_if_many()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[..., Tiny]:
    """`tiny_model("qwen2")`: a variant of `VARIANTS`, built once a session; more settings change its config."""
    from secvec_jax.model import hub

    tokenizer = build_tokenizer()
    built: dict[str, Tiny] = {}

    def build(variant: str = "llama", seed: int = 0, **changes: Any) -> Tiny:
        key = repr((variant, seed, sorted(changes.items())))
        if key not in built:
            hf = build_hf_model(seed, **VARIANTS[variant] | changes)
            folder = tmp_path_factory.mktemp(variant)
            hf.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            built[key] = Tiny(hf, folder, hub.load(folder))
        return built[key]

    return build


@pytest.fixture(scope="session")
def reader_folder(tiny_model, tmp_path_factory) -> Path:
    """A tiny model for packaged prompts: its tokens are words and parts of them, so that lines are short."""
    folder = tmp_path_factory.mktemp("reader")
    plain = tiny_model("llama", vocab_size=_READER_VOCABULARY, max_position_embeddings=1024).folder
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    build_tokenizer([readme], _READER_VOCABULARY).save_pretrained(folder)
    return folder


@jax.jit
def _logits(backbone, tokens, segments, positions, adapters):
    return backbone.logits(backbone(tokens, segments, positions, adapters))


@pytest.fixture(scope="session")
def logits() -> Callable[..., np.ndarray]:
    """`logits(model or backbone, tokens, segments=None, positions=None, adapters=())` of ours, `[B, T, V]`."""

    def compute(model, tokens, segments=None, positions=None, adapters=()) -> np.ndarray:
        backbone = getattr(model, "backbone", model)
        return np.asarray(_logits(backbone, np.asarray(tokens), segments, positions, adapters))

    return compute


@pytest.fixture(scope="session")
def hf_logits() -> Callable[..., np.ndarray]:
    """`hf_logits(hf, tokens, mask=None, positions=None)` of transformers, `[B, T, V]`."""
    import torch

    def compute(hf, tokens, mask=None, positions=None) -> np.ndarray:
        given = {"attention_mask": mask, "position_ids": positions}
        given = {name: torch.tensor(np.asarray(array)) for name, array in given.items() if array is not None}
        with torch.no_grad():
            return hf(input_ids=torch.tensor(np.asarray(tokens)), **given).logits.float().numpy()

    return compute


@pytest.fixture(scope="session")
def random_vectors() -> Callable[..., Any]:
    """`random_vectors(model, rank=.., ...)`: LoRA vectors that change the logits: B is random too."""
    from secvec_jax.vectors.lora import LoRA

    def build(model, seed: int = 0, **spec: Any):
        a_key, b_key = jax.random.split(jax.random.key(seed))
        vectors = LoRA(**spec).init(model.architecture, a_key)
        factors = {
            projection: {"a": own["a"], "b": 0.2 * jax.random.normal(jax.random.fold_in(b_key, i), own["b"].shape)}
            for i, (projection, own) in enumerate(vectors.factors.items())
        }
        return dataclasses.replace(vectors, factors=factors)

    return build


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, but for the packages' archives, whose download starts pip."""
    from secvec_jax import assets

    shared, own = assets.cache_dir() / "packages", tmp_path / "cache"
    shared.mkdir(parents=True, exist_ok=True)
    own.mkdir()
    (own / "packages").symlink_to(shared)
    monkeypatch.setenv("SECVEC_CACHE", str(own))
    return own


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """A small disk; the test is skipped where none can be mounted."""
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


@pytest.fixture
def tokens() -> np.ndarray:
    """Three lines of twelve random tokens."""
    return np.random.default_rng(0).integers(3, VOCABULARY, (3, 12)).astype(np.int32)
