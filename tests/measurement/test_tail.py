"""What follows the last attention is skipped where nothing can notice, and nowhere else."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CausalSelfAttention, TinyGPT, everything, token_batch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from attnmonitor import DEFAULT_METRICS, AttentionMonitor
from attnmonitor.capture import capture
from attnmonitor.loggers import summary_scalars
from attnmonitor.measurement import Measured, Measurement
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.tail import SKIPPED
from attnmonitor.record import RunRecord

METRICS = ("energy_rms", "key_rank", "output_share")
PROBE = token_batch(batch=2, length=8)
GLOBAL_HOOKS: list[RemovableHandle] = []


class Model(nn.Module):
    """One attention layer and a tail; ``seen`` has every value that code of the user's read from the tail."""

    def __init__(self, tail: Callable[[Model, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.tail = tail
        self.tokens, self.attn = nn.Embedding(50, 16), CausalSelfAttention(16, 4, 2)
        self.extra = CausalSelfAttention(16, 4, 2)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 16))
        self.head, self.conv = nn.Linear(16, 50), nn.Conv1d(16, 16, 3, padding=1)
        self.norm, self.lstm = nn.BatchNorm1d(16), nn.LSTM(16, 16, batch_first=True)
        self.register_buffer("count", torch.ones(16))
        self.seen: list[float] = []
        self.kept: Any = None
        self.number = 0
        self.with_extra = False

    def forward(self, token_ids: Tensor) -> Any:
        self.number += not self.training
        x = self.tokens(token_ids)
        x = x + self.attn(x)
        return self.tail(self, x + self.mlp(x), token_ids)

    def see(self, x: Tensor) -> None:
        self.seen.append(x.detach().abs().sum().item())


def linear(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    return model.head(x)


def products(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    weight = model.tokens.weight
    x = torch.bmm(x, x.mT @ x) + x @ (weight.t() @ weight) + torch.einsum("blc,cd->bld", x, weight.t() @ weight)
    return model.conv(x.mT).mT @ weight.T


def in_place(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    x = x * 2
    x = x.add_(1).relu_().clone()
    x[:, 0] = 0
    with torch.no_grad():
        torch.add(x, 1, out=torch.empty_like(x))
    return model.head(x)


def structures(model: Model, x: Tensor, token_ids: Tensor) -> Any:
    largest, where = x.max(-1)
    first, *_ = x.unbind(1)
    out, (hidden, _) = model.lstm(model.norm(x.mT).mT.contiguous())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        chosen = torch.topk(model.head(out), 2)
    parts = (largest.sum(), where.sum(), first.sum(), hidden.sum(), chosen.values.sum(), torch.ones(3).sum())
    return {"logits": model.head(out), "parts": sum(part.float() for part in parts)}


def loss(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    return F.cross_entropy(model.head(x)[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


def experts(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    weights, chosen = model.head(x)[..., :4].softmax(-1).topk(2)
    mixed = torch.stack([x, -x, 2 * x, x + 1], -2).gather(-2, chosen[..., None].expand(*chosen.shape, 16))
    return model.head((weights[..., None] * mixed).sum(-2))


def item(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.see(x)
    return model.head(x)


def checks(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    if torch.isnan(x).any() or not x.any():
        raise FloatingPointError("the tail has no numbers")
    return model.head(x)


def routed(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    for index in (x.mean((0, 1)) > 0).nonzero().flatten().tolist():
        x = x + index * model.mlp(x)
    return model.head(x)


def counts(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.count += x.detach().mean((0, 1))
    model.count.index_add_(0, x.detach().sum((0, 1)).topk(2).indices, torch.ones(2))
    return model.head(x)


def counts_anew(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.count = model.count + x.detach().mean((0, 1))
    return model.head(x)


def statistics(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    F.batch_norm(x.mT, model.norm.running_mean, model.norm.running_var, training=True)
    return model.head(x)


def keeps(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.kept = x.detach()
    return model.head(x)


def keeps_a_view(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.kept = [{"labels": token_ids[:, 1:]}]
    return model.head(x)


def keeps_inside(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.kept = torch.zeros(2, 8, 16) if model.kept is None else model.kept
    model.kept[:].copy_(x.detach())
    return model.head(x)


def random_numbers(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    return model.head(x + torch.rand_like(x))


def python_random(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    return model.head(x if random.random() > 0.5 else -x)


def own_generator(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.kept = model.kept or torch.Generator().manual_seed(1)
    return model.head(x if model.training else x + x.new_empty(1).normal_(generator=model.kept))


def gradients(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(model.mlp(point).sum(), point)
    return model.head(x + force)


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return 2 * x


def scripted(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.kept = doubled(x.detach())
    return model.head(x)


def through_numpy(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    model.seen.append(float(abs(x.detach().numpy()).sum()))
    return model.head(x)


def with_extra_attention(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    return model.head(model.extra(x) if model.with_extra else x)


def reads_seldom(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    if model.number % 5 == 0:
        model.see(x)
    return model.head(x)


def reads_beside_its_own(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    if model.number % 5 == 0:
        model.see(x * model.tokens.weight[0])
    return model.head(x)


def lengthens(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    x = model.head(x)
    return x * 2 if not model.training and model.number % 5 == 0 else x


def shortens(model: Model, x: Tensor, token_ids: Tensor) -> Tensor:
    return model.head(model.mlp(x)) if model.training or model.number < 4 else model.mlp(x)


def generate(model: nn.Module, token_ids: Tensor) -> Tensor:
    for _ in range(2):
        token_ids = torch.cat([token_ids, model(token_ids)[:, -1:].argmax(-1)], 1)
    return token_ids


def generate_to_the_end(model: nn.Module, token_ids: Tensor) -> None:
    while not (token_ids[:, -1] == 49).all() and token_ids.shape[1] < 10:
        token_ids = torch.cat([token_ids, model(token_ids)[:, -1:].argmax(-1)], 1)


def reads(model: Model, token_ids: Tensor) -> None:
    model.see(model(token_ids))


def collects(model: Model, token_ids: Tensor) -> None:
    model.kept = [*(model.kept or ()), model(token_ids).detach()]


class Explicit(CausalSelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        weights = (query @ key.repeat_interleave(2, 1).mT / 2).exp()
        out = weights / weights.sum(-1, keepdim=True) @ value.repeat_interleave(2, 1)
        capture(self, query, key, scale=0.5, value=value, output=out)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class ReadsItsOutput(CausalSelfAttention):
    """Attention that reads seldom what its output projection returns."""

    def __init__(self, model: Model) -> None:
        super().__init__(16, 4, 2)
        self.see, self.number = model.see, 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        self.number += not self.training
        if self.number % 5 == 0:
            self.see(out)
        return out


class Counting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class CountingOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_a_mode(model: nn.Module, batch: Any) -> Any:
    with CountingOperations():
        return model(batch)


def hooked(register: str, part: str = "head") -> Callable[[Model], None]:
    def change(model: Model) -> None:
        module = model.get_submodule(part)
        getattr(module, register)(lambda *arguments, **named: None)

    return change


def seeing_hook(model: Model) -> None:
    model.head.register_forward_hook(lambda module, args, output: model.see(output))


def globally_hooked(model: Model) -> None:
    GLOBAL_HOOKS.append(nn.modules.module.register_module_forward_hook(lambda module, args, output: None))


def replaced(model: Model) -> None:
    inner = model.head.forward
    model.head.forward = lambda x: inner(x)  # type: ignore[method-assign]


def replaced_by_a_reader(model: Model) -> None:
    inner = model.head.forward
    model.head.forward = lambda x: model.see(x) or inner(x)  # type: ignore[method-assign]


def compiled(model: Model) -> None:
    model.mlp.compile(backend="eager")


def own_script(model: Model) -> None:
    model.mlp = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))


def explicit(model: Model) -> None:
    model.attn = Explicit(16, 4, 2)


def reads_its_output(model: Model) -> None:
    model.attn = ReadsItsOutput(model)


def longer(model: Model) -> None:
    model.head = nn.Sequential(CausalSelfAttention(16, 4, 2), nn.Linear(16, 50))


def switched_on(model: Model) -> None:
    model.with_extra = True


@dataclass(frozen=True)
class Case:
    """One kind of tail.

    Attributes:
        tail: What follows the attention.
        reason: A part of why it is run in full; ``""`` where it is skipped.
        before: Changes the model before attach.
        after: Changes the model after ``skips`` samples.
        skips: Number of samples that skip it before the first in full, where there is a reason.
        forward: How the model is called on the probe.
        around: The context in which samples are taken.
    """

    tail: Callable[[Model, Tensor, Tensor], Any] = linear
    reason: str = ""
    before: Callable[[Model], object] | None = None
    after: Callable[[Model], object] | None = None
    skips: int = 0
    forward: Callable[..., object] | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext


HOOKS = {
    "register_forward_hook": "forward hooks",
    "register_forward_pre_hook": "forward pre hooks",
    "register_full_backward_hook": "backward hooks",
    "register_full_backward_pre_hook": "backward pre hooks",
    "register_state_dict_post_hook": "state dict hooks",
    "register_state_dict_pre_hook": "state dict pre hooks",
    "register_load_state_dict_pre_hook": "load state dict pre hooks",
    "register_load_state_dict_post_hook": "load state dict post hooks",
}

CASES = {
    "linear": Case(),
    "products": Case(products),
    "in place": Case(in_place),
    "structures": Case(structures),
    "loss": Case(loss),
    "experts": Case(experts),
    "autocast in samples": Case(around=lambda: torch.autocast("cpu", torch.bfloat16)),
    "default device": Case(around=lambda: torch.device("cpu")),
    "two calls": Case(forward=lambda model, batch: (model(batch), model(batch.flip(1)))),
    "generates": Case(forward=generate),
    "item": Case(item, "item takes values out of a tensor"),
    "checks": Case(checks, "__bool__ takes values"),
    "routed": Case(routed, "tolist takes values"),
    "numpy": Case(through_numpy, "numpy takes values"),
    "counts": Case(counts, "is kept"),
    "counts anew": Case(counts_anew, "statistics are updated"),
    "statistics": Case(statistics, "statistics are updated"),
    "keeps": Case(keeps, "is kept"),
    "keeps a view": Case(keeps_a_view, "what __getitem__ returns or writes is kept"),
    "keeps inside": Case(keeps_inside, "is kept"),
    "random numbers": Case(random_numbers, "random numbers are drawn"),
    "random of Python": Case(python_random, "random numbers are drawn"),
    "generator of its own": Case(own_generator, "a generator of the model's own"),
    "gradients": Case(gradients, "gradient"),
    "scripted function": Case(scripted, "after the last attention cannot be skipped"),
    "generates to the end": Case(forward=generate_to_the_end, reason="__bool__ takes values"),
    "forward reads": Case(forward=reads, reason="item takes values"),
    "forward collects": Case(forward=collects, reason="is kept"),
    "forward in a mode": Case(forward=in_a_mode, reason="runs its attention under CountingOperations"),
    "explicit": Case(before=explicit, reason="attn registers its attention itself"),
    "replaced forward": Case(before=replaced),
    "replaced by a reader": Case(before=replaced_by_a_reader, reason="item takes values out of a tensor"),
    "compiled part": Case(before=compiled, reason="mlp is compiled"),
    "scripted part": Case(before=own_script, reason="is a scripted module"),
    "global hook": Case(before=globally_hooked, reason="a hook on all modules"),
    "function mode": Case(around=Counting, reason="Counting is active"),
    "dispatch mode": Case(around=CountingOperations, reason="CountingOperations is active"),
    **{how: Case(before=hooked(how), reason=f"on head ({kind})") for how, kind in HOOKS.items()},
    "hook before the tail": Case(before=hooked("register_forward_hook", "tokens"), reason="on tokens (forward hooks)"),
    "hook later": Case(after=seeing_hook, skips=1, reason="on head (forward hooks)"),
    "layer later": Case(after=longer, skips=1, reason="modules were added or replaced"),
    "reader later": Case(after=replaced_by_a_reader, skips=1, reason="modules were added or replaced"),
    "attention later": Case(with_extra_attention, after=switched_on, skips=1, reason="is called in place of"),
    "reads later": Case(reads_seldom, skips=2, reason="is called in place of"),
    "reads beside its own later": Case(reads_beside_its_own, skips=2, reason="is called in place of"),
    "attention reads later": Case(before=reads_its_output, skips=2, reason="is called in place of"),
    "longer later": Case(lengthens, skips=2, reason="is called after its last call"),
    "shorter later": Case(shortens, skips=1, reason="is not called"),
}


def run(case: Case, measure: str) -> tuple[list[Tensor], list[Measured], Model]:
    """Train three steps, with a sample after each where ``measure`` is not empty."""
    torch.manual_seed(0)
    random.seed(0)
    model, samples = Model(case.tail), []
    if case.before is not None:
        case.before(model)
    optimizer = torch.optim.SGD([*model.tokens.parameters(), *model.attn.parameters()], 0.1)
    measurement = Measurement(model, Probe(model, PROBE, forward=case.forward), METRICS)
    if measure:
        measurement.attach() if measure == "attach" else measurement.find_layers()
    for number in range(3):
        output = model(torch.randint(50, (2, 8)))
        output = output["logits"] if isinstance(output, dict) else output
        optimizer.zero_grad()
        output.tanh().mean().backward()
        optimizer.step()
        if number == case.skips and case.after is not None:
            case.after(model)
        if measure:
            with case.around():
                samples.append(measurement.take())
    return everything(model, optimizer), samples, model


@pytest.mark.parametrize("name", CASES)
def test_tail_is_skipped_or_run_in_full_with_a_reason(name: str) -> None:
    case = CASES[name]
    try:
        plain, _, _ = run(case, "")
        end_in_full, in_full, _ = run(case, "find_layers")
        end, samples, model = run(case, "attach")
    finally:
        while GLOBAL_HOOKS:
            GLOBAL_HOOKS.pop().remove()
    assert all(map(torch.equal, plain, end))
    assert all(map(torch.equal, plain, end_in_full))
    assert [sample.numbers() for sample in samples] == [sample.numbers() for sample in in_full]
    assert all(value > 0 for value in model.seen)
    routes = [sample.diagnostics["after_last_attention"] for sample in samples]
    num_skipped = case.skips if case.reason else len(samples)
    assert routes[:num_skipped] == [SKIPPED] * num_skipped
    assert all(route.startswith("in full: ") and case.reason in route for route in routes[num_skipped:]), routes
    layers = {name for sample in samples for name, layer in sample.coverage.items() if layer.measured}
    assert "attn" in {layer.partition("#")[0] for layer in layers}


class Drifting(Model):
    """Its attention gets other numbers in each forward, which no generator and no buffer says."""

    def forward(self, token_ids: Tensor) -> Any:
        self.number += 1
        return self.head(self.attn(self.tokens(token_ids) * self.number))


def test_forward_with_other_numbers_each_time_is_run_in_full() -> None:
    model = Drifting(linear)
    measurement = Measurement(model, Probe(model, PROBE), METRICS)
    measurement.attach()
    assert measurement.after_last_attention == "in full: two forwards of the probe give different numbers"
    measurement.take()
    assert measurement.after_last_attention == "in full: two forwards of the probe give different numbers"


def test_layers_finished_in_the_forward_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnmonitor.measurement.reduction.LARGEST_BATCH", 0)
    torch.manual_seed(0)
    model = TinyGPT(width=128, max_length=128)
    measurement = Measurement(model, Probe(model, token_batch(batch=4, length=128)), DEFAULT_METRICS)
    measurement.attach()
    assert measurement.after_last_attention == SKIPPED


def test_route_is_shown(tmp_path: Path) -> None:
    for case, route in ((CASES["linear"], SKIPPED), (CASES["item"], "in full: item takes values out of a tensor")):
        with AttentionMonitor(Model(case.tail), PROBE, metrics=METRICS, alerts=False, record=tmp_path) as monitor:
            sample = monitor.sample(0)
            assert str(monitor).endswith(f"\nafter the last attention: {route}")
            assert monitor.describe()["after_last_attention"] == route
        assert sample.diagnostics["after_last_attention"] == route
        assert monitor.failures == 0
        assert "after_last_attention" not in RunRecord.open(monitor.record_path).diagnostics
        assert all(isinstance(value, int | float) for value in summary_scalars(sample).values())
