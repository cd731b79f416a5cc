"""Subclasses of the Trainer that add their own metrics to what is logged, as TRL's trainers do."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_run import VOCABULARY, texts, trainer_of
from transformers import Trainer

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.transformers import AttentionMonitorCallback


class AveragingTrainer(Trainer):
    """Averages metrics over the steps between two logs, adds them to the next log and starts anew, as in TRL."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._averaged: dict[str, list[float]] = defaultdict(list)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._averaged["reward"].append(float(len(self._averaged["reward"])))
        self._averaged["entropy"].append(1.0)
        return super().compute_loss(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        averages = {name: sum(values) / len(values) for name, values in self._averaged.items()}
        super().log({**logs, **averages}, *args, **kwargs)
        self._averaged.clear()


class StrictTrainer(Trainer):
    """Takes no log without a loss."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        assert logs.keys() & {"loss", "train_loss"}, logs
        super().log(logs, *args, **kwargs)


CLOCK = ("runtime", "per_second")


def own_rows(trainer: Trainer) -> list[dict[str, Any]]:
    rows = [row for row in trainer.state.log_history if not any(key.startswith("attention/") for key in row)]
    return [{key: row[key] for key in row if not key.endswith(CLOCK)} for row in rows]


@pytest.mark.parametrize("every_n_steps", [1, 2, 3])
@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("kind", [AveragingTrainer, StrictTrainer])
def test_subclass_logs_the_same_rows(kind: Any, logging_steps: int, every_n_steps: int, tmp_path: Path) -> None:
    rows = []
    for callbacks in ([], [AttentionMonitorCallback(every_n_steps=every_n_steps, strict=True)]):
        trainer = trainer_of(tmp_path, *callbacks, kind=kind, max_steps=6, logging_steps=logging_steps)
        trainer.train()
        rows.append(own_rows(trainer))
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6 // logging_steps + 1
    [callback] = callbacks
    assert callback.monitor.history.steps == list(range(0, 7, every_n_steps))
    summaries = [row for row in trainer.state.log_history if "attention/energy_rms/median" in row]
    assert [row["step"] for row in summaries] == callback.monitor.history.steps


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:::(transformers|trl|dill|datasets|peft).*")
@pytest.mark.parametrize("program", ["SFT", "SFT packed", "SFT LoRA", "DPO", "GRPO"])
def test_trl_logs_the_same_rows(program: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="`make soak` installs it")
    datasets = pytest.importorskip("datasets")
    from checkpoints import save_tokenizer
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

    name = program.split()[0]
    save_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = tokenizer.pad_token
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    sentences = ["the cat sat on the mat", "a dog ran in the park"] * 8
    columns = {
        "SFT": {"text": sentences},
        "DPO": {"prompt": sentences, "chosen": [" yes"] * 16, "rejected": [" no"] * 16},
        "GRPO": {"prompt": sentences},
    }
    rows = []
    for watched in (False, True):
        set_seed(0)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model")  # GRPO reads the folder again
        settings = {"max_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
        extra: dict[str, Any] = {"bf16": False, "per_device_train_batch_size": 2, "disable_tqdm": True}
        arguments: dict[str, Any] = {}
        if name == "GRPO":
            extra |= {"num_generations": 2, "max_completion_length": 4}
            arguments["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
        if program == "SFT packed":
            extra |= {"packing": True, "max_length": 32}
        if program == "SFT LoRA":
            arguments["peft_config"] = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        callback = AttentionMonitorCallback(every_n_steps=1, strict=True)
        trainer = getattr(trl, f"{name}Trainer")(
            model=model,
            args=getattr(trl, f"{name}Config")(output_dir=str(tmp_path / str(watched)), **settings, **extra),
            train_dataset=datasets.Dataset.from_dict(columns[name]),
            processing_class=tokenizer,
            callbacks=[callback] if watched else [],
            **arguments,
        )
        trainer.train()
        rows.append([{key: row[key] for key in row if "time" not in key} for row in own_rows(trainer)])
    assert rows[0] == rows[1]
    assert callback.monitor is not None
    assert callback.monitor.history.steps == [0, 1, 2, 3, 4]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:::(transformers|sentence_transformers|dill|datasets).*")
def test_sentence_transformers_are_watched(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="`make soak` installs it")
    datasets = pytest.importorskip("datasets")
    from checkpoints import save_tokenizer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, set_seed

    tokenizer = save_tokenizer(tmp_path / "model")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "model")
    sentences = ["the cat sat on the mat", "a dog ran in the park"] * 8
    data = datasets.Dataset.from_dict({"anchor": sentences, "positive": sentences[::-1]})
    settings: dict[str, Any] = {"max_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    weights = []
    for watched in (False, True):
        set_seed(0)
        modules = [Transformer(str(tmp_path / "model")), Pooling(16)]
        model = library.SentenceTransformer(modules=modules, device="cpu")
        callback = AttentionMonitorCallback(every_n_steps=1, strict=True)
        library.SentenceTransformerTrainer(
            model=model,
            args=library.SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path / str(watched)), save_strategy="no", disable_tqdm=True, **settings
            ),
            train_dataset=data,
            loss=losses.MultipleNegativesRankingLoss(model),
            callbacks=[callback] if watched else [],
        ).train()
        weights.append([each.detach().clone() for each in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert callback.monitor is not None
    assert callback.monitor.history.steps == [0, 1, 2, 3, 4]


def test_sequence_to_sequence_training_is_watched(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments

    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "max_position_embeddings": 32}
    rows = [{"input_ids": ids["input_ids"], "labels": ids["labels"][:9]} for ids in texts(0)]
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes))
        callback = AttentionMonitorCallback(every_n_steps=1, record=None, strict=True)
        settings: dict[str, Any] = {"max_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(output_dir=str(tmp_path), save_strategy="no", **settings),
            train_dataset=rows,
            callbacks=[callback] if watched else [],
        ).train()
        weights.append([each.detach().clone() for each in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert callback.monitor is not None
    assert callback.monitor.history.steps == [0, 1, 2, 3]
    kinds = [each.kind for each in callback.monitor.coverage.values()]
    assert (kinds.count("self"), kinds.count("cross")) == (4, 2)
    with AttentionMonitor(model, callback.monitor.probe.batch, record=None) as expected:
        sample = expected.sample(0)
    for layer, heads in callback.monitor.last_sample.values["energy_rms"].items():
        assert torch.equal(heads, sample.values["energy_rms"][layer])
