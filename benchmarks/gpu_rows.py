"""Training steps measured by `gpu.py`, ours and PEFT's, each in a separate process.

Batches are random tokens with several segments per sequence and every position but padding supervised. Compute is in
bfloat16 (float32 on a CPU). Peak memory is the allocator's peak for the whole process on a GPU, and the peak memory of
the process on a CPU.
"""

import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from flax import nnx
from sides import peak_bytes

from secvec_jax.batch import Batch
from secvec_jax.config import Training
from secvec_jax.defenses.finetuning import phase2_step
from secvec_jax.defenses.security_vectors import Phase1, phase1_step
from secvec_jax.defenses.vaccine import vaccine
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder
from secvec_jax.model.hf_config import from_hf_config
from secvec_jax.model.quantized import with_precision
from secvec_jax.planning.plan import Work, program_bytes
from secvec_jax.training.objective import KEEP, LEARN, Backbone, Params
from secvec_jax.training.phase import Phase
from secvec_jax.training.step import TrainStep
from secvec_jax.vectors.lora import LoRA

WARM, LEAST, MOST, SECONDS = 3, 3, 10, 12.0
"""Warm-up steps; the least and the most timed steps; seconds after which no steps beyond the least are run."""

RANK = 8

ROW_LENGTHS = Path(__file__).parent / "row_lengths.json"
"""Tokens of 967 real rows, written by `gpu.py --row-lengths` where the embedded model is installed."""

FILES = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "7b": "llama-2-7b", "8b": "llama-3.1-8b"}
TOY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip

PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12}
"""Substring of a device's name -> published dense bf16 FLOP/s; the first match counts."""

Row = dict[str, Any]
"""A row of `gpu.py` as JSON, with its `attempts`."""


def config(model: str) -> dict[str, Any]:
    """Return the config.json of a model."""
    file = Path(__file__).parents[1] / "configs" / "models" / f"{FILES.get(model)}.json"
    return TOY if model == "toy" else json.loads(file.read_text())


def packed(lines: int, length: int, segments: int, vocabulary: int) -> Batch:
    """Return a batch of random tokens `[lines, length]`, identical in each run.

    segments: how many random segments each sequence is cut into; 0: sequences of rows of real lengths, and padding.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (lines, length + 1), np.int32)
    marks = real_segments(lines, length) if segments == 0 else random_segments(lines, length, segments)
    slots = np.broadcast_to(np.arange(length, dtype=np.int32), marks.shape)
    begins = np.diff(marks, axis=1, prepend=-1) != 0
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (marks > 0).astype(np.float32),
        "groups": np.zeros((lines, length), np.int32),
        "segments": marks,
        "positions": slots - np.maximum.accumulate(np.where(begins, slots, 0), axis=1),
    }


def random_segments(lines: int, length: int, segments: int) -> np.ndarray:
    """Return the segment of each token, `[lines, length]`, counted from 1."""
    starts = segment_starts(lines, length, segments)
    return (np.arange(length)[:, None] >= starts[:, None, :]).sum(axis=-1, dtype=np.int32)


def real_segments(lines: int, length: int) -> np.ndarray:
    """Return the segment of each token, `[lines, length]`: each sequence is filled with the next rows that fit."""
    marks = np.zeros((lines, length), np.int32)
    rows = itertools.cycle(np.minimum(row_lengths(), length).tolist())
    row = next(rows)
    for line in marks:
        end = segment = 0
        while end + row <= length:
            segment += 1
            line[end : end + row] = segment
            end, row = end + row, next(rows)
    return marks


def row_lengths() -> np.ndarray:
    """Return the lengths of the real rows in tokens, `[N]`."""
    return np.asarray(json.loads(ROW_LENGTHS.read_text()))


def mean_real_length() -> int:
    """Return the mean over all tokens of real rows of the length of their row."""
    lengths = row_lengths()
    return round((lengths**2).sum() / lengths.sum())


def write_row_lengths() -> None:
    """Write the lengths in tokens of the packaged Alpaca rows, by the embedded model's tokenizer."""
    import secvec_jax as sv
    from secvec_jax.data.sources import load_rows
    from secvec_jax.defenses.finetuning import examples_of

    examples = examples_of(sv.load("smollm2"), load_rows("alpaca"), 4096)
    ROW_LENGTHS.write_text(json.dumps([len(example.tokens) for example in examples]) + "\n")


def segment_starts(lines: int, length: int, segments: int) -> np.ndarray:
    """Return the starts of the segments of each sequence, `[lines, segments]`, in ascending order from 0."""
    rng = np.random.default_rng(1)
    cuts = [rng.choice(length - 1, segments - 1, replace=False) + 1 for _ in range(lines)]
    return np.asarray([[0, *sorted(line)] for line in cuts], np.int32)


def timed(step: Callable[[], Any], most: int = MOST) -> list[float]:
    """Return the seconds of each step after the warm-up; `step` must block until the device is done."""
    for _ in range(WARM):
        step()
    times: list[float] = []
    while len(times) < most and (len(times) < LEAST or sum(times) < SECONDS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def account(row: Row, work: list[Work], times: list[float], device: str) -> dict[str, Any]:
    """Return tokens per second and MFU of the median step: the FLOPs of `work` per second over the published peak."""
    architecture, seconds = from_hf_config(config(row["model"])), statistics.median(times)
    tokens = work[0].learn + work[0].keep
    length = mean_real_length() if row["segments"] == 0 else row["length"]
    flops = sum(part.flops(architecture, length) for part in work)
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    return {
        "device": device,
        "tokens": tokens,
        "seconds": seconds,
        "steps": times,
        "tokens_per_second": tokens / seconds,
        "flops": flops,
        "formula": " + ".join(part.formula for part in work),
        "peak_flops": peak,
        "mfu": None if peak is None else flops / seconds / peak,
    }


# ---------------------------------------------------------------------------------------------------- ours


def secvec(row: Row) -> dict[str, Any]:
    """Measure a training step of this library with the first of the attempts (sequences, remat) that fits.

    Attempts that do not fit according to the compiler are not run. Returns `out_of_memory`, the index of the last
    attempt that failed, if another process must continue.
    """
    architecture = from_hf_config(config(row["model"]))
    stats = jax.devices()[0].memory_stats()
    limit = math.inf if stats is None else stats["bytes_limit"]
    for i, (lines, remat) in enumerate(row["attempts"]):
        try:
            plan = planned(row, architecture, lines, remat)
            if plan.bytes <= limit:
                return {"attempt": i, "lines": lines, "remat": remat} | run(row, plan)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"out_of_memory": i}
    return {"out_of_memory": len(row["attempts"]) - 1}


class PlanRun(NamedTuple):
    """A compiled step, before weights are created."""

    start: Callable[[], Params]
    phase: Phase
    train_step: TrainStep
    batch: dict[str, Batch]
    program: jax.stages.Compiled
    compile_seconds: float

    @property
    def bytes(self) -> int:
        """Device memory in bytes, as reported by the compiler."""
        return program_bytes(self.program)


def planned(row: Row, architecture: Architecture, lines: int, remat: str) -> PlanRun:
    """Compile the row's step for batches of `lines` sequences; vectors with KL use half as many benign sequences."""
    kind, length = row["kind"], row["length"]
    training = Training(
        optimizer=row["optimizer"],
        trained_weights=row["trained"],
        learning_rate=1e-6,
        max_grad_norm=1.0 if row["clip"] else 0.0,
        batch_size=lines,
        max_seq_len=length,
        remat=remat,
        share_prefix=False,
    )

    def start() -> Params:
        vectors, task = (LoRA(rank=RANK).init(architecture, jax.random.key(i)) for i in (1, 2))
        fast = nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles several times as fast
        decoder = with_precision(Decoder(architecture, fast), row["trained" if trains_all(kind) else "frozen"])
        return Params(Backbone(decoder, task if "LoRA" in kind else None), vectors if "vectors" in kind else None)

    def batch(lines: int) -> Batch:
        return {key: x[None] for key, x in packed(lines, length, row["segments"], architecture.vocab_size).items()}

    streams = {LEARN: batch(lines)} | ({KEEP: batch(max(1, lines // 2))} if kind == "vectors with KL" else {})
    params = jax.eval_shape(start)
    phase, train_step = moves(kind, params, training)
    trained, frozen = phase.split(params)
    begin = time.perf_counter()
    with unrolled() if row["unrolled"] else contextlib.nullcontext():
        lowered = train_step.step.lower(trained, jax.eval_shape(train_step.init, trained), frozen, streams)
    program = lowered.compile()
    return PlanRun(start, phase, train_step, streams, program, time.perf_counter() - begin)


def moves(kind: str, params: Params, training: Training) -> tuple[Phase, TrainStep]:
    """Return the phase and the train step of a row of this kind."""
    if kind == "vaccine":
        return phase2_step(params, ("all",), training, 1000, vaccine())
    if kind.startswith("vectors"):
        return phase1_step(params, Phase1("kl" if kind.endswith("KL") else "cross_entropy"), training, 1000)
    return phase2_step(params, ("all",), training, 1000)


def trains_all(kind: str) -> bool:
    """Whether rows of this kind train all weights of the backbone."""
    return not kind.startswith("vectors") and "LoRA" not in kind


def unrolled() -> contextlib.AbstractContextManager:
    """Unroll the loop over layers while programs are traced; the decoder has no option for that."""
    return mock.patch.object(jax.lax, "scan", partial(jax.lax.scan, unroll=True))


def run(row: Row, plan: PlanRun) -> dict[str, Any]:
    """Time the compiled step on random weights, which are created on the device."""
    device = jax.devices()[0]
    trained, frozen = plan.phase.split(jax.jit(plan.start)())
    state = plan.train_step.init(trained)
    batch = jax.device_put(plan.batch)
    losses: list[float] = []

    def step() -> None:
        nonlocal trained, state
        trained, state, metrics = plan.program(trained, state, frozen, batch)
        jax.block_until_ready((trained, state))
        losses.append(float(metrics["loss"]))

    times = timed(step, LEAST if row["model"] == "toy" else MOST)
    stats = device.memory_stats()
    return account(row, work(row["kind"], batch), times, device.device_kind) | {
        "losses": losses,
        "peak_bytes": peak_bytes() if stats is None else stats["peak_bytes_in_use"],
        "program_bytes": plan.bytes,
        "compile_seconds": plan.compile_seconds,
    }


def work(kind: str, batch: dict[str, Batch]) -> list[Work]:
    """Return the work of a step; Vaccine's first pass computes gradients of hidden states only."""
    learn, keep = (int((batch[stream]["segments"] > 0).sum()) if stream in batch else 0 for stream in (LEARN, KEEP))
    step = Work(learn, keep, trains_all(kind))
    return [Work(learn, 0, full=False), step] if kind == "vaccine" else [step]


# ----------------------------------------------------------------------------------------------- PEFT


def peft(row: Row) -> dict[str, Any]:
    """Measure a compiled training step of transformers and PEFT with the first attempt ("full": with checkpointing).

    For "full", all weights are float32, with bfloat16 autocast; for "lora" (on all linear layers), the frozen weights
    are bfloat16. With one segment per sequence no mask is needed, and the flash kernel is used.
    """
    import torch

    lines, remat = row["attempts"][0]
    try:
        result = rival(row, lines, remat)
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in text and "out of memory" not in text:
            raise
        return {"out_of_memory": 0}
    return {"attempt": 0, "lines": lines, "remat": remat} | result


def rival(row: Row, lines: int, remat: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    where, lora = "cuda" if cuda else "cpu", row["kind"] == "lora"
    torch.manual_seed(0)
    settings = dict(config(row["model"]))
    hf_config = AutoConfig.for_model(settings.pop("model_type"), use_cache=False, **settings)
    dtype = torch.bfloat16 if lora and cuda else torch.float32
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=dtype)
    if remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")).to(where)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, weight_decay=0.0, fused=cuda)
    compiled = torch.compile(model.train(), backend="inductor" if cuda else "eager")
    batch = rival_batch(row, lines, hf_config.vocab_size, where)
    losses: list[float] = []

    def step() -> None:
        with torch.autocast(where, torch.bfloat16, enabled=cuda):
            loss = compiled(**batch).loss
        loss.backward()
        if row["clip"]:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if cuda:
            torch.cuda.synchronize()

    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    times = timed(step, LEAST if row["model"] == "toy" else MOST)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    return account(row, [Work(lines * row["length"], 0, full=not lora)], times, device) | {
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak_bytes(),
        "compile_seconds": first - statistics.median(times),
    }


def rival_batch(row: Row, lines: int, vocabulary: int, where: str) -> dict[str, Any]:
    """Return the same batch as torch tensors, with an attention mask that separates segments."""
    import torch

    tensors = {
        key: torch.tensor(x, device=where)
        for key, x in packed(lines, row["length"], row["segments"], vocabulary).items()
    }
    tokens = tensors["tokens"].long()
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": tensors["positions"].long()}
    if row["segments"] > 1:
        same = tensors["segments"][:, :, None] == tensors["segments"][:, None, :]
        batch["attention_mask"] = same.tril()[:, None]
    return batch
