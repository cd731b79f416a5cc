"""Metrics of the weights: of the module that is there now, however its weight is kept, without a trace in the run."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, get_default_qat_qconfig, prepare_qat
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:_aminmax is deprecated"),
]

WIDTH = 32
RATIO = "interaction_participation_ratio"
METRICS = ["energy_rms", RATIO]


class Attention(nn.Module):
    """Four heads of size 8; ``after`` acts on the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.after: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            heads.unflatten(-1, (4, 8)).transpose(1, 2) for heads in (self.after(self.q(x)), self.k(x), self.v(x))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter behind dropout beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.3)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 4 * self.up(self.down(self.dropout(x)))


class DropConnect(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, 0.5, self.training)


class Noisy(nn.Linear):
    """Draws noise for its weight, in training."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(self.weight) if self.training else 0.0
        return nn.functional.linear(x, self.weight + noise, self.bias)


class FlatBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the last axis, with statistics that are not those of a fresh one."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        with torch.no_grad():
            self.weight.uniform_(0.2, 3.0), self.running_var.uniform_(0.2, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape_as(x)


class FakeQuantized(nn.Module):
    """Fake quantization of weight and activations, with observers that count."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.of_weight, self.of_input = (
            FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.of_input(x), self.of_weight(self.weight), self.bias)


class Int8(nn.Module):
    """The attributes of an int8 layer: codes in ``weight`` and one scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale[:, None]).round().to(torch.int8), False)
        self.scale, self.bias = nn.Parameter(scale, False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)


class Float8(nn.Module):
    """The attributes of an fp8 layer: ``weight`` in float8 and ``weight_scale_inv``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), False)
        self.weight_scale_inv, self.bias = nn.Parameter(scale, False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


class Packed4Bit(nn.Module):
    """The attributes of a GPTQ layer: no parameters, eight 4-bit codes in each int32 of ``qweight``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().mT
        scales = weight.abs().amax(0) / 7
        codes = ((weight / scales).round().int() + 8).reshape(-1, 8, WIDTH)
        self.register_buffer("qweight", (codes << (4 * torch.arange(8, dtype=torch.int32))[:, None]).sum(1).int())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        shifts = (4 * torch.arange(8, dtype=torch.int32))[None, :, None]
        codes = ((self.qweight[:, None] >> shifts) & 15).flatten(0, 1) - 8
        return x @ (codes * self.scales) + self.bias


class Opaque(nn.Module):
    """Codes that it multiplies with a sign of its input: no linear map."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter((linear.weight.detach() * 300).to(torch.int8), False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.sign() + x.abs().sqrt(), self.weight.to(x.dtype))


def both(change: Callable[[Any], Any]) -> Callable[[Attention], None]:
    """Apply a change to the query and the key projection."""

    def apply(attention: Attention) -> None:
        for name in ("q", "k"):
            setattr(attention, name, change(getattr(attention, name)))

    return apply


def with_hook_adapter(linear: nn.Linear) -> nn.Linear:
    linear.down, linear.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
    linear.register_forward_hook(lambda module, args, output: output + 4 * module.up(module.down(args[0])))
    return linear


def for_qat(attention: Attention) -> None:
    for name in ("q", "k"):
        linear = getattr(attention, name)
        linear.qconfig = get_default_qat_qconfig("fbgemm")
        setattr(attention, name, qat.Linear.from_float(linear))


def all_for_qat(attention: Attention) -> None:
    attention.qconfig = get_default_qat_qconfig("fbgemm")
    prepare_qat(attention.train(), inplace=True)


def fake_quantized_weight(linear: nn.Linear) -> nn.Linear:
    quantizer = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    return parametrize.register_parametrization(linear, "weight", quantizer)


def with_batch_norm(attention: Attention) -> None:
    attention.after = FlatBatchNorm()


def noisy(linear: nn.Linear) -> nn.Linear:
    other = Noisy(WIDTH, WIDTH)
    other.load_state_dict(linear.state_dict())
    return other


def tied(attention: Attention) -> None:
    attention.k.weight = attention.q.weight


def compiled(attention: Attention) -> None:
    attention.q = torch.compile(attention.q, backend="eager")
    attention.k.compile(backend="eager")


# What weights may be made of, by the run that has it.
TRAINED: dict[str, Callable[[Attention], None]] = {
    "adapters behind dropout": both(Adapted),
    "adapters in forward hooks": both(with_hook_adapter),
    "spectral norm": both(parametrizations.spectral_norm),
    "spectral norm in a hook": both(old_spectral_norm),
    "weight norm": both(parametrizations.weight_norm),
    "weight norm in a hook": both(old_weight_norm),
    "pruning": both(lambda linear: prune.l1_unstructured(linear, "weight", 0.5)),
    "DropConnect": both(lambda linear: parametrize.register_parametrization(linear, "weight", DropConnect())),
    "noise in training": both(noisy),
    "fake quantization of the weight": both(fake_quantized_weight),
    "fake quantization of all": both(FakeQuantized),
    "layers for quantization-aware training": for_qat,
    "a model for quantization-aware training": all_for_qat,
    "BatchNorm inside the projection": both(lambda linear: nn.Sequential(linear, FlatBatchNorm())),
    "BatchNorm after the projection": with_batch_norm,
    "tied weights": tied,
    "compiled projections": compiled,
}
PACKED: dict[str, Callable[[Attention], None]] = {
    "int8": both(Int8),
    "float8": both(Float8),
    "packed 4 bits": both(Packed4Bit),
}
# Fake quantization of the outputs makes the outputs no linear function: the expected numbers are of the weight alone.
QUANTIZED_OUTPUTS = "a model for quantization-aware training"


def model_of(change: Callable[[Attention], None] = lambda attention: None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Attention())
    change(model[0])
    return model


def probe() -> Tensor:
    return torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1))


def monitor_of(model: nn.Module, **settings: Any) -> AttentionMonitor:
    options = {"record": None, "metrics": METRICS, "weights_every": 1, "alerts": False, **settings}
    return AttentionMonitor(model, probe(), **options)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    changed = [n for n, x in state.items() if x.shape != other[n].shape or not torch.equal(x, other[n])]
    assert changed == []


def expected_ratio(attention: Attention) -> Tensor:
    """The metric from the derivative of queries and keys by the layer's input, dense and in float64."""
    attention.eval()
    point = torch.randn(1, 1, WIDTH)
    heads = []
    for function in (lambda x: attention.after(attention.q(x)), attention.k):
        derivative = torch.autograd.functional.jacobian(function, point)
        heads.append(derivative.reshape(4, 8, WIDTH).double())
    variances = torch.linalg.svdvals(heads[0].mT @ heads[1]).square()
    return (variances.sum(-1) ** 2 / variances.square().sum(-1)).float()


@pytest.mark.parametrize("kind", [*TRAINED, *PACKED])
def test_numbers_are_of_the_weight_in_eval_mode(kind: str) -> None:
    model = model_of({**TRAINED, **PACKED}[kind])
    monitor = monitor_of(model, strict=True)
    found = []
    for training in (True, False, True):
        model.train(training)
        before, random_state = state_of(model), torch.get_rng_state()
        found.append(monitor.sample(0).values[RATIO]["0"])
        assert_equal(before, state_of(model))
        assert torch.equal(random_state, torch.get_rng_state())
        assert model[0].q.training is training
    assert monitor.coverage["0"].weights_reason == ""
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(
        found[0], expected_ratio(model[0]), rtol=5e-3 if "quantization" in kind else 1e-3, atol=0
    )


@pytest.mark.parametrize("kind", TRAINED)
def test_run_is_bit_identical_with_weight_metrics(kind: str) -> None:
    def run(*, monitored: bool) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        model = model_of(TRAINED[kind]).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if monitored:
            attach(model, optimizer, probe(), every_n_steps=1, record=None, metrics=METRICS, weights_every=1)
        torch.manual_seed(2)
        for _ in range(3):
            model(torch.randn(2, 16, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        return state_of(model), momenta, torch.get_rng_state()

    (plain, momenta, random_state), (watched, others, other_state) = run(monitored=False), run(monitored=True)
    assert_equal(plain, watched)
    assert all(torch.equal(x, y) for x, y in zip(momenta, others, strict=True))
    assert torch.equal(random_state, other_state)


def merged(attention: Attention) -> None:
    both(Adapted)(attention)
    for name in ("q", "k"):
        adapted = getattr(attention, name)
        with torch.no_grad():
            adapted.base.weight += 4 * adapted.up.weight @ adapted.down.weight
        setattr(attention, name, adapted.base)


def new_forward(attention: Attention) -> None:
    attention.q.forward = lambda x: nn.functional.linear(x, attention.q.weight.tril())


def without_parametrization(attention: Attention) -> None:
    both(parametrizations.spectral_norm)(attention)
    both(lambda linear: parametrize.remove_parametrizations(linear, "weight"))(attention)


def exchanged(attention: Attention) -> None:
    attention.q, attention.k = attention.v, Adapted(attention.q)


SURGERY = {
    **{name: change for name, change in (TRAINED | PACKED).items() if name != QUANTIZED_OUTPUTS},
    "adapters merged": merged,
    "a forward of the instance": new_forward,
    "a parametrization removed": without_parametrization,
    "projections exchanged": exchanged,
}


@pytest.mark.parametrize("kind", SURGERY)
def test_numbers_follow_a_change_of_the_module(kind: str) -> None:
    model = model_of()
    monitor = monitor_of(model, strict=True)
    first = monitor.sample(0).values[RATIO]["0"]
    with torch.no_grad():
        SURGERY[kind](model[0])
    model.train()(probe()).square().mean().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    found = monitor.sample(1).values[RATIO]["0"]
    assert not torch.equal(first, found)
    assert torch.equal(found, monitor_of(model).sample(1).values[RATIO]["0"])
    torch.testing.assert_close(found, expected_ratio(model[0]), rtol=5e-3 if "quantization" in kind else 1e-3, atol=0)


def test_block_swapped_in_is_the_one_measured() -> None:
    model, other = model_of(), Attention()
    monitor = monitor_of(model, strict=True)
    monitor.sample(0)
    gone = weakref.ref(model[0])
    model[0] = other
    gc.collect()
    assert gone() is None  # the monitor keeps no module that the model has no more
    torch.testing.assert_close(monitor.sample(1).values[RATIO]["0"], expected_ratio(other), rtol=1e-3, atol=0)


class Activated(nn.Module):
    """A projection with an activation of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(nn.functional.linear(x, self.weight))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Opaque, r"0\.q \(Opaque, int8\): its output is not a linear function of its input"),
        (lambda linear: nn.Sequential(linear, nn.GELU()), r"0\.q \(Sequential, float32\): its output is not a linear"),
        (Activated, r"0\.q \(Activated, float32\): its output is not a linear"),
    ],
)
def test_weight_that_cannot_be_read_is_nan_with_reason(other: Callable[[nn.Linear], nn.Module], reason: str) -> None:
    model = model_of()
    monitor = monitor_of(model, strict=True)
    expected = monitor.sample(0)
    linear = model[0].q
    model[0].q = other(linear)
    sample = monitor.sample(1)
    assert sample.values[RATIO]["0"].isnan().all()
    assert sample.values["energy_rms"]["0"].isfinite().all()
    assert re.match(reason, sample.coverage["0"].weights_reason)
    model[0].q = linear
    sample = monitor.sample(2)
    assert torch.equal(sample.values[RATIO]["0"], expected.values[RATIO]["0"])
    assert sample.coverage["0"].weights_reason == ""


def test_weights_of_another_forward_are_not_measured() -> None:
    """The user's forward runs the model with other weights than those in its modules."""
    model = model_of()
    others = {name: value + 1 for name, value in model.named_parameters()}
    monitor = monitor_of(model, forward=lambda model, x: torch.func.functional_call(model, others, x))
    sample = monitor.sample(0)
    assert sample.values[RATIO]["0"].isnan().all()
    assert "runs it with other weights than those it has outside of a forward" in sample.coverage["0"].weights_reason


def test_other_number_of_heads_is_nan_with_reason() -> None:
    model = model_of()
    monitor = monitor_of(model)
    forward = model[0].forward
    model[0].forward = lambda x: (
        nn.functional.scaled_dot_product_attention(
            *(f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (model[0].q, model[0].k, model[0].v))
        )
        .transpose(1, 2)
        .flatten(2)
    )
    sample = monitor.sample(0)
    assert sample.values[RATIO]["0"].isnan().tolist() == [True] * 4
    assert "4 query heads at attach, 2 now" in sample.coverage["0"].weights_reason
    model[0].forward = forward
    assert monitor.sample(1).values[RATIO]["0"].isfinite().all()


def test_large_bias_in_half_precision_rounds_no_weight_away() -> None:
    model = model_of().to(torch.bfloat16)
    monitor = monitor_of(model, forward=lambda model, x: model(x.to(torch.bfloat16)))
    before = monitor.sample(0).values[RATIO]["0"]
    with torch.no_grad():
        model[0].q.bias.fill_(100), model[0].k.bias.normal_(std=30)
    torch.testing.assert_close(monitor.sample(1).values[RATIO]["0"], before, rtol=1e-2, atol=0)


def test_autocast_around_a_sample_changes_no_weight() -> None:
    monitor = monitor_of(model_of())
    expected = monitor.sample(0).values[RATIO]["0"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(monitor.sample(1).values[RATIO]["0"], expected)
        begun_within = monitor_of(model_of()).sample(0)
    assert torch.equal(begun_within.values[RATIO]["0"], expected), begun_within.coverage["0"].weights_reason


def test_reading_calls_no_hook_of_the_user() -> None:
    model, calls, asked = model_of(), [], []

    def count(*_: Any) -> None:
        calls.append(1)

    def skip(hook: Any) -> bool:
        asked.append(hook)
        return False

    model[0].q.register_forward_hook(count)
    model[0].k.register_forward_pre_hook(count)
    monitor = monitor_of(model, skip_hooks=skip)
    calls.clear()
    monitor.sample(0)
    assert len(calls) == 2  # those of the probe's forward
    assert set(asked) == {count}


def test_skipped_hooks_are_left_out_of_reads_as_well() -> None:
    model, calls = model_of(), []

    def count(*_: Any) -> None:
        calls.append(1)

    model[0].q.register_forward_hook(count)
    monitor_of(model, skip_hooks=lambda hook: hook is count).sample(0)
    assert calls == []


def test_attention_of_torch_is_measured_by_its_parameters() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True))
    parametrizations.spectral_norm(model[0].self_attn, "in_proj_weight")
    monitor = monitor_of(model, strict=True)
    before = state_of(model)
    found = monitor.sample(0).values[RATIO]["0.self_attn"]
    assert_equal(before, state_of(model))
    weight = model.eval()[0].self_attn.in_proj_weight.detach().double().unflatten(0, (3, 4, 8))
    variances = torch.linalg.svdvals(weight[0].mT @ weight[1]).square()
    expected = (variances.sum(-1) ** 2 / variances.square().sum(-1)).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def offloaded(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("at", ["before attach", "after attach"])
def test_offloaded_weights_are_brought_in_and_read(at: str) -> None:
    model = model_of()
    expected = expected_ratio(model[0])
    if at == "before attach":
        offloaded(model)
    monitor = monitor_of(model, strict=True)
    if at == "after attach":
        monitor.sample(0)
        offloaded(model)
    torch.testing.assert_close(monitor.sample(1).values[RATIO]["0"], expected, rtol=1e-3, atol=0)
    assert all(parameter.is_meta for parameter in model.parameters())
