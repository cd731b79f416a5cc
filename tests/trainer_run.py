"""Small models, data and a quiet transformers Trainer, for the tests that train with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 61


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def texts(seed: int, count: int = 16) -> list[dict[str, Tensor]]:
    rows = torch.randint(VOCABULARY, (count, 20), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_of(
    folder: Path,
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    **settings: Any,
) -> Trainer:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    data = {"train_dataset": texts(1), "eval_dataset": texts(2)}
    for name in ("train_dataset", "eval_dataset", "data_collator"):
        if name in settings:
            data[name] = settings.pop(name)
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    return kind(model or llama(), arguments, callbacks=list(callbacks), **data)
