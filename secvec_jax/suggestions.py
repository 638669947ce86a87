"""Suggest the known name that an unknown one was probably meant to be, for error messages. Imports no JAX."""

import difflib
from collections.abc import Iterable
from typing import Any

KNOWN_AS: dict[str, tuple[str, ...]] = {
    # training
    "lr": ("learning_rate",),
    "optim": ("optimizer",),
    "lr_scheduler": ("schedule",),
    "lr_scheduler_type": ("schedule",),
    "scheduler": ("schedule",),
    "warmup": ("warmup_steps",),
    "wd": ("weight_decay",),
    "bs": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "lines": ("batch_size",),
    "block_size": ("max_seq_len",),
    "context_length": ("max_seq_len",),
    "length": ("max_seq_len",),
    "max_length": ("max_seq_len",),
    "max_seq_length": ("max_seq_len",),
    "seq_len": ("max_seq_len",),
    "accumulate": ("grad_accum_steps",),
    "gradient_accumulation_steps": ("grad_accum_steps",),
    "clip": ("max_grad_norm",),
    "clip_grad_norm": ("max_grad_norm",),
    "gradient_clip_val": ("max_grad_norm",),
    "iterations": ("max_steps",),
    "steps": ("max_steps",),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "gradient_checkpointing": ("remat",),
    "random_seed": ("seed",),
    "share_beginnings": ("share_prefix",),
    "early_stopping_patience": ("patience",),
    "eval_steps": ("eval_every_steps",),
    "save_interval": ("save_every_seconds",),
    "save_steps": ("save_every_seconds",),
    "save_total_limit": ("max_checkpoints",),
    "keep_checkpoints": ("max_checkpoints",),
    "load_best_model_at_end": ("best",),
    "metric_for_best_model": ("best",),
    # adapters
    "r": ("rank",),
    "lora_r": ("lora.rank", "task_lora.rank", "rank"),
    "lora_rank": ("lora.rank", "task_lora.rank", "rank"),
    "lora_alpha": ("lora.alpha", "task_lora.alpha", "alpha"),
    "lora_target_modules": ("lora.targets", "task_lora.targets", "targets"),
    "target_modules": ("targets",),
    "task_rank": ("task_lora.rank", "lora_rank"),
    "use_rslora": ("rslora",),
    "num_virtual_tokens": ("virtual_tokens",),
    "adapter": ("vectors", "adapters"),
    # models, data and output
    "base_model": ("model",),
    "model_name": ("model",),
    "model_name_or_path": ("model",),
    "pretrained": ("model",),
    "judges": ("eval_split",),
    "recipe": ("experiment",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "train_data": ("data",),
    "train_file": ("data",),
    "eval_data": ("questions",),
    "max_samples": ("limit",),
    "num_samples": ("limit",),
    "max_new_tokens": ("reply_tokens",),
    "num_fewshot": ("fewshot",),
    "apply_chat_template": ("chat",),
    "torch_dtype": ("dtype",),
    "output_dir": ("out",),
    "save_dir": ("out",),
    "force": ("overwrite",),
    "overwrite_output_dir": ("overwrite",),
    "api_base": ("judge_url",),
    "base_url": ("judge_url",),
    # devices
    "tensor_parallel_size": ("mesh",),
    "tp": ("mesh",),
    "coordinator_address": ("cluster",),
    "num_processes": ("processes",),
    "process_id": ("process",),
}
"""Names that other libraries and older versions give to settings, and ours, for "did you mean"."""


def suggestion(name: Any, known: Iterable[str]) -> str:
    """ "did you mean ...?" with the known name closest to an unknown one, or all known names if none is close."""
    known = list(known)
    nearest = nearest_name(name, known)
    return f"known are {', '.join(known)}" if nearest is None else f"did you mean {nearest!r}?"


def nearest_name(name: Any, known: Iterable[str]) -> str | None:
    """The known name closest to an unknown one, or None if none is close.

    Names may be flags (`--batch-size`) or the paths of nested settings (`lora.rank`), of which the last part suffices.
    """
    known = list(known)
    plain = {_plain(option.rpartition(".")[2]): option for option in reversed(known)}
    plain |= {_plain(option): option for option in reversed(known)}
    asked = _plain(str(name))
    last = _plain(str(name).rpartition(".")[2])
    candidates = [_plain(other) for key in (asked, last) for other in KNOWN_AS.get(key, ()) if _plain(other) in plain]
    candidates += [key for key in (asked, last) if key in plain]
    candidates += difflib.get_close_matches(asked, plain, n=1) or difflib.get_close_matches(last, plain, n=1)
    return plain[candidates[0]] if candidates else None


def _plain(name: str) -> str:
    return name.lower().lstrip("-_").replace("-", "_").replace(".", "_")
