"""The baseline: transformers and PEFT in PyTorch, used as in their documentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

Row = tuple[list[int], list[int]]
"""A row's token ids, and its labels: -100 for tokens without loss."""


def training(
    folder: str, adapter: str | None, batches: Sequence[Sequence[Row]], rank: int, alpha: float, rate: float
) -> tuple[dict[str, Any], Any]:
    """Make a side of `sides.alternate` whose work is an optimizer step on a batch of padded rows.

    folder: the model's folder. adapter: a PEFT folder whose LoRA is active and frozen, or None. rank: the rank of a
    LoRA on all linear layers, trained with AdamW; 0 trains all weights with SGD and momentum. The facts are the loss of
    each batch before the first step, the batch shapes and the number of trained parameters.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" not in name)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    padded = [collate([_features(row) for row in rows]) for rows in batches]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0) if rank else torch.optim.SGD(trained, rate, 0.9)
    model.train()
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in padded]

    def step(piece: int) -> None:
        loss = model(**padded[piece % len(padded)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    shape = [list(batch["input_ids"].shape) for batch in padded]
    return {"losses": losses, "shapes": shape, "trained": sum(map(torch.Tensor.numel, trained))}, step


def _features(row: Row) -> dict[str, list[int]]:
    tokens, labels = row
    return {"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens)}


def decoding(
    folder: str, prompts: Sequence[Sequence[int]], new_tokens: int, cache: str | None, replies_file: str
) -> tuple[dict[str, Any], Any]:
    """Make a side of `sides.alternate` whose work is greedy replies to all prompts in one padded batch.

    cache: "static", "dynamic" or None for the default. replies_file: where the replies are written. For
    comparability, no reply stops early.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    padded = tokenizer.pad({"input_ids": [list(prompt) for prompt in prompts]}, return_tensors="pt")
    model.generation_config.eos_token_id = None
    options = {} if cache is None else {"cache_implementation": cache}

    def reply(piece: int) -> None:
        with torch.no_grad():
            out = model.generate(**padded, max_new_tokens=new_tokens, do_sample=False, **options)
        written = out[:, padded["input_ids"].shape[1] :].tolist()
        assert all(len(row) == new_tokens for row in written)
        Path(replies_file).write_text(str(written))

    return {"shape": list(padded["input_ids"].shape)}, reply
