from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import TinyGPT, token_batch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import quiet


class Stateful(nn.Module):
    """Changes all state that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Dropout(0.5).eval()
        self.register_buffer("counter", torch.zeros(()))
        self.register_buffer("cache", torch.ones(2))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        self.cache = torch.zeros(5)
        self.register_buffer("late", torch.ones(1))
        torch.rand(1), random.random(), np.random.random()
        return torch.nn.functional.dropout(self.norm(x), 0.5, training=True)


def generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("fails", [False, True])
def test_quiet_restores_all_state_also_after_an_exception(fails: bool) -> None:
    model = Stateful().train()
    model.frozen.eval()
    flags = [module.training for module in model.modules()]
    cache, before, names = model.cache, generators(), set(model._buffers)
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with quiet(model):
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
            assert not model(torch.randn(4, 3)).requires_grad
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert generators() == before
    assert [module.training for module in model.modules()] == flags
    assert model.cache is cache
    assert set(model._buffers) == names
    assert torch.is_grad_enabled()
    for name, value in values.items():
        assert torch.equal(model.get_buffer(name), value), name


def test_quiet_keeps_the_version_of_unwritten_buffers() -> None:
    model = nn.BatchNorm1d(3)
    scale = model.running_var
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * scale).sum()
    with quiet(model):
        model(torch.randn(4, 3))
    loss.backward()  # autograd refuses if `running_var` had been written back needlessly
    assert torch.equal(weight.grad, scale)


def test_batch_statistics_updated_in_eval_mode_are_restored() -> None:
    class AlwaysTraining(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True)

    model = AlwaysTraining(3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with quiet(model):
        model(torch.randn(4, 3))
        assert not torch.equal(model.running_mean, before["running_mean"])
    assert all(torch.equal(model.get_buffer(name), value) for name, value in before.items())


def test_quiet_turns_the_autocast_cache_off_and_on_again() -> None:
    model = nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with quiet(model):
            assert not torch.is_autocast_cache_enabled()
            assert torch.is_autocast_enabled("cpu")
            model(torch.randn(2, 3))
        assert torch.is_autocast_cache_enabled()
        model(torch.randn(2, 3)).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("wrap", ["tensor", "dict", "userdict", "tuple", "list", "loader"])
def test_all_batch_types_reach_the_model_as_the_same_tokens(wrap: str) -> None:
    token_ids, seen = token_batch(), []
    model = TinyGPT()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    batch: Any = {
        "tensor": token_ids,
        "dict": {"token_ids": token_ids, "not_an_argument": token_ids},
        "userdict": UserDict(token_ids=token_ids),
        "tuple": (token_ids, torch.zeros(3)),
        "list": [token_ids],
        "loader": DataLoader(TensorDataset(token_ids, torch.zeros(3)), batch_size=3),
    }[wrap]
    Probe(model, batch).run(model)
    [(args, kwargs)] = seen
    assert torch.equal(args[0] if args else kwargs["token_ids"], token_ids)
    assert len(args) + len(kwargs) == 1


def test_custom_forward_is_called() -> None:
    model, seen = TinyGPT(), []
    Probe(model, {"a": token_batch()}, forward=lambda module, batch: seen.append(module(batch["a"]))).run(model)
    assert seen[0].shape == (3, 24, 50)


def test_probe_is_a_copy_and_fingerprints_differ() -> None:
    model, token_ids = TinyGPT(), token_batch()
    probe = Probe(model, token_ids)
    first = probe.fingerprint
    token_ids.zero_()
    assert torch.equal(probe.batch, token_batch())
    assert Probe(model, token_batch()).fingerprint == first
    assert Probe(model, token_batch(seed=1)).fingerprint != first
    assert Probe(model, {"x": token_batch()}).fingerprint != first
    assert Probe(model, token_batch().to(torch.int32)).fingerprint != first
    assert Probe(model, torch.ones(2, 2, dtype=torch.bfloat16)).fingerprint


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from token_batch(batch=8)


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "sampler", "stream", "workers", "no batching"])
def test_drawing_the_probe_advances_no_generator(kind: str) -> None:
    data, own = TensorDataset(token_batch(batch=8)), torch.Generator().manual_seed(3)
    loader: DataLoader[Any] = {
        "shuffled": lambda: DataLoader(data, batch_size=2, shuffle=True),
        "own generator": lambda: DataLoader(data, batch_size=2, shuffle=True, generator=own),
        "sampler": lambda: DataLoader(data, batch_size=2, sampler=torch.utils.data.RandomSampler(data, generator=own)),
        "stream": lambda: DataLoader(Stream(), batch_size=2),
        "workers": lambda: DataLoader(data, batch_size=2, num_workers=2, persistent_workers=True),
        "no batching": lambda: DataLoader(data, batch_size=None),
    }[kind]()
    model = TinyGPT()
    before, own_before = generators(), own.get_state().tolist()
    Probe(model, loader)
    assert generators() == before
    assert own.get_state().tolist() == own_before


def test_shuffling_loader_gives_the_same_probe_after_restart() -> None:
    data = TensorDataset(token_batch(batch=8))
    drawn = [Probe(TinyGPT(), DataLoader(data, batch_size=2, shuffle=True)).fingerprint for _ in range(3)]
    assert set(drawn) == {Probe(TinyGPT(), DataLoader(data, batch_size=2)).fingerprint}


def test_bad_probes_raise_helpful_errors() -> None:
    model = TinyGPT()
    with pytest.raises(ValueError, match="probe=str holds no tensor"):
        Probe(model, "some text")
    with pytest.raises(ValueError, match=r"probe is on meta but the model is on cpu; move it there: probe.to\('cpu'\)"):
        Probe(model, token_batch().to("meta"))
    with pytest.raises(ValueError, match=r"probe\.x is on meta"):
        Probe(model, {"x": token_batch().to("meta")})
    with pytest.raises(ValueError, match="the DataLoader is empty"):
        Probe(model, DataLoader(TensorDataset(torch.empty(0, 3))))
    with pytest.raises(ValueError, match="forward=3 is not callable"):
        Probe(model, token_batch(), forward=3)  # type: ignore[arg-type]
    model.config = SimpleNamespace(max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"24 tokens long but the model's config.max_position_embeddings is 16"):
        Probe(model, token_batch())


def test_only_token_ids_are_as_long_as_the_model_has_positions() -> None:
    model = TinyGPT()
    model.config = SimpleNamespace(max_position_embeddings=16)
    others = (torch.zeros(2, 24), torch.zeros(2, 24, dtype=torch.bool), torch.zeros(24, dtype=torch.int64))
    for other in (*others, torch.zeros(2, 24, 3, dtype=torch.int64)):
        assert Probe(model, {"ids": token_batch()[:, :16], "other": other}).batch is not None
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match=r"probe\.other is 17 tokens long"):
            Probe(model, {"ids": token_batch()[:, :16], "other": torch.zeros(2, 17, dtype=dtype)})


def test_first_flex_attention_of_a_process_is_measured() -> None:
    # In a process of its own: FlexAttention compiles itself in its first call, unless it is told not to before.
    program = """
import sys, torch
from torch.nn.attention.flex_attention import flex_attention
from attnmonitor import AttentionMonitor

class Flex(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return flex_attention(q, k, v).transpose(1, 2).flatten(2)

model = Flex()
assert "torch._dynamo" not in sys.modules or torch.__version__.startswith("2.6.")  # which loads it with FlexAttention
[layer] = AttentionMonitor(model, torch.randn(2, 6, 8), record=None).coverage.values()
assert layer.measured and layer.num_query_heads == 2, layer
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
