"""Whatever fails on one of several processes: no process hangs, and all train on to the same weights.

Each case breaks one stage of the samples at steps 2 and 3 of a run, on one process, and is taken out again. Many cases
share a pair of processes. A pair that reports nothing for a minute is a hang.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fault_case import (
    Inject,
    collected_warnings,
    in_capture,
    in_function,
    in_module,
    in_reduction,
    raising,
    with_weights,
)
from kept_samples import KeptSamples
from models import TinyGPT, token_batch, train_step
from processes import on_processes, spread, tell
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from attnmonitor import AttentionMonitor, Sample
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.record import RunRecord

NUM_STEPS, BROKEN = 5, (2, 3)
LAYERS = ("blocks.0.attn", "blocks.1.attn")
WEIGHTS = ("tokens.weight", "blocks.0.attn.q_proj.weight", "blocks.1.attn.k_proj.weight", "blocks.1.mlp.0.weight")
MODULES = ("tokens", "blocks.0", "blocks.0.attn", "blocks.0.attn.q_proj", "blocks.0.attn.o_proj", "blocks.0.mlp.1",
           "blocks.1", "blocks.1.norm1", "blocks.1.attn.v_proj", "blocks.1.mlp.2", "head")  # fmt: skip
ERRORS = (RuntimeError("no luck"), torch.OutOfMemoryError("out of memory"), torch.linalg.LinAlgError("no convergence"),
          KeyError("what"), StopIteration(), MemoryError("host"))  # fmt: skip
HOT = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0, quantile=0.5)
ALWAYS = Rule("always", "test", "run", HOT, patience=1, grace=0)
BROKEN_ATTENTION = in_module("blocks.1.attn", RuntimeError("no luck"))  # between collectives of the forward


@dataclass(frozen=True)
class Case:
    """One fault on one process.

    Attributes:
        how: How the model is spread.
        rank: The process it happens on.
        stage: A key of `STAGES`.
        where: The module, layer or weight of that stage that breaks.
        error: What is raised.
    """

    how: str
    rank: int
    stage: str
    where: str
    error: Exception

    def inject(self, monitor: AttentionMonitor, patch: pytest.MonkeyPatch) -> None:
        STAGES[self.stage][0](self.where, self.error)(monitor, monitor.model, patch)


def act(event: Any, sample: Sample) -> None:
    pass


def at(path: str) -> Callable[[str, Exception], Inject]:
    return lambda where, error: in_function(path, error)


def in_eval(where: str, error: Exception) -> Inject:
    return lambda monitor, model, patch: patch.setattr(model, "eval", raising(error))


def in_logger(where: str, error: Exception) -> Inject:
    return lambda monitor, model, patch: patch.setattr(KeptSamples, "log_sample", raising(error))


def in_action(where: str, error: Exception) -> Inject:
    def calls(events: Any, actions: Any) -> list[Any]:
        return [(None, raising(error))]

    return lambda monitor, model, patch: patch.setattr("attnmonitor.monitor.run_alerts.calls_of", calls)


# For each stage: a function of (where, error), and the places that may break.
STAGES: dict[str, tuple[Callable[[str, Exception], Inject], tuple[str, ...]]] = {
    "the probe": (at("attnmonitor.measurement.probe.Probe.run"), ("",)),
    "eval": (in_eval, ("",)),
    "a module's forward": (in_module, MODULES),
    "a layer's capture": (in_capture, LAYERS),
    "a layer's reduction": (in_reduction, LAYERS),
    "the eigenvectors": (at("torch.linalg.eigh"), ("",)),
    "the statistics": (at("attnmonitor.metrics.statistics.key_gram"), ("",)),
    "the transfer": (at("attnmonitor.measurement.unfinished.Transfer"), ("",)),
    "weights that are NaN": (lambda where, error: with_weights(where, torch.nan), WEIGHTS),
    "the alerts": (at("attnmonitor.alerts.Alerts.observe"), ("",)),
    "the record": (at("attnmonitor.record.writer.RecordWriter.append"), ("",)),
    "a logger": (in_logger, ("",)),
    "an action": (in_action, ("",)),
}
ONLY_CONSUMERS = ("the alerts", "the record", "a logger", "an action")


def draw(seed: int) -> Case:
    chance = random.Random(seed)
    [stage] = chance.choices(list(STAGES), [len(places) for _, places in STAGES.values()])
    how = chance.choice(("ddp", "fsdp1", "fsdp2", "tp"))
    return Case(how, chance.randrange(2), stage, chance.choice(STAGES[stage][1]), chance.choice(ERRORS))


# One run, on one process of the pair


@dataclass
class End:
    trained: list[Tensor]
    samples: dict[int, Sample]
    monitor: AttentionMonitor | None


def run(case: Case | None, how: str, *, watched: bool = True) -> End:
    torch.manual_seed(0)
    plain = TinyGPT(num_kv_heads=2, dropout=0.0 if how == "tp" else 0.1)
    model = spread(plain, how)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    samples: dict[int, Sample] = {}
    monitor = None
    if watched:
        settings: dict[str, Any] = {"record": "record.sqlite", "loggers": [KeptSamples()], "alerts": [ALWAYS]}
        monitor = attach(model, optimizer, token_batch(), every_n_steps=1, actions={"always": act}, **settings)
        sample = monitor.sample
        monitor.sample = lambda step: samples.setdefault(step, sample(step))  # type: ignore[method-assign]
    torch.manual_seed(dist.get_rank())
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        for step in range(NUM_STEPS):
            if case is not None and monitor is not None and case.rank == dist.get_rank() and step == BROKEN[0] - 1:
                case.inject(monitor, patch)
            if step == BROKEN[-1]:
                patch.undo()
            batch = token_batch(seed=10 * step + (0 if how == "tp" else dist.get_rank()))
            losses.append(train_step(model, optimizer, batch))
    state = [value for values in optimizer.state.values() for value in values.values()]
    trained = [getattr(each, "_local_tensor", each).detach().clone() for each in (*model.parameters(), *state)]
    if monitor is not None:
        monitor.close()
    return End([*trained, *losses, torch.get_rng_state()], samples, monitor)


def defects(case: Case, end: End, bare: End, clean: End) -> list[str]:
    """What is wrong with a run with a fault, compared with one without a monitor and one without a fault."""
    assert end.monitor is not None
    wrong = [] if all(map(torch.equal, end.trained, bare.trained)) else ["training differs"]
    on_main = dist.get_rank() == 0
    if on_main and end.monitor.history.steps != list(range(NUM_STEPS + 1)):
        wrong.append(f"history has {end.monitor.history.steps}")
    missed = case.stage == "the record" and case.rank == 0
    if on_main and len(RunRecord.open("record.sqlite").steps) != NUM_STEPS + 1 - missed * len(BROKEN):
        wrong.append(f"record has {list(RunRecord.open('record.sqlite').steps)}")
    harmless = case.stage in ONLY_CONSUMERS or (case.how == "ddp" and case.rank == 1)
    for step, sample in end.samples.items() if on_main else ():
        lost = 0
        for metric, layers in clean.samples[step].values.items():
            for layer, expected in layers.items():
                found = sample.values[metric][layer]
                lost += int(found.isnan().any())
                if not (torch.equal(found, expected) or found.isnan().any()):
                    wrong.append(f"other numbers at step {step}: {metric} of {layer}")
        # A process may hold no part of a weight, or one after the last attention.
        may_lose = step in BROKEN and not harmless
        if lost > 0 if not may_lose else lost == 0 and case.stage != "weights that are NaN":
            wrong.append(f"{lost} layers without numbers at step {step}, {sample.failure=}")
        reasons = [sample.failure, *(layer.reason for layer in sample.coverage.values())]
        if lost and case.stage != "weights that are NaN" and not any(reasons):
            wrong.append(f"no reason given at step {step}")
    expected_failures = 0 if case.stage == "weights that are NaN" or (harmless and case.rank) else len(BROKEN)
    if on_main and end.monitor.failures != expected_failures:
        wrong.append(f"{end.monitor.failures} failures counted, not {expected_failures}")
    return wrong


def _run_cases(rank: int, seeds: range) -> list[tuple[Case, list[str]]]:
    warnings.simplefilter("ignore", AttentionMonitorWarning)
    outcomes: list[tuple[Case, list[str]]] = []
    unbroken: dict[str, tuple[End, End]] = {}
    for seed in seeds:
        case = draw(seed)
        tell(f"case {seed}: {case}")
        for path in Path().glob("record.sqlite*") if rank == 0 else ():
            path.unlink()
        if case.how not in unbroken:
            bare = run(None, case.how, watched=False)
            tell(f"without a fault, {case.how}")
            unbroken[case.how] = bare, run(None, case.how)
            tell(f"case {seed}: {case}")
            for path in Path().glob("record.sqlite*") if rank == 0 else ():
                path.unlink()
        outcomes.append((case, defects(case, run(case, case.how), *unbroken[case.how])))
    return outcomes


# After a permanent fault, and after one in a strict monitor


def _pause(rank: int, how: str) -> dict[str, Any]:
    """A fault on process 1 that stays for seven samples."""
    tell(f"pause, {how}")
    torch.manual_seed(0)
    model = spread(TinyGPT(num_kv_heads=2), how)
    monitor = AttentionMonitor(model, token_batch(), 1, record=None)
    with pytest.MonkeyPatch.context() as patch, collected_warnings() as messages:
        if rank == 1:
            BROKEN_ATTENTION(monitor, model, patch)
        paused = []
        for step in range(7):
            monitor.on_step(step)
            paused.append(monitor.paused)
    monitor.resume()
    sample = monitor.on_step(7)
    good = bool(sample and sample.values) and not any(x.isnan().any() for x in sample.values["energy_rms"].values())
    return {"paused": paused, "warnings": messages, "steps": monitor.history.steps, "good": good}


def _strict(rank: int, how: str) -> str:
    """What a strict monitor raises if the forward fails on process 1; afterwards FSDP is ready for the next forward."""
    tell(f"strict, {how}")
    model = spread(TinyGPT(num_kv_heads=2), how)
    monitor = AttentionMonitor(model, token_batch(), record=None, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            BROKEN_ATTENTION(monitor, model, patch)
        with pytest.raises(RuntimeError) as raised:
            monitor.sample(0)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            assert state._training_state.name == "IDLE"
            assert state._state_ctx.iter_forward_root is None
    assert monitor.sample(1).failure is None
    return str(raised.value)


def _aftermath(rank: int) -> dict[str, Any]:
    return {how: {"pause": _pause(rank, how), "strict": _strict(rank, how)} for how in ("fsdp2", "tp")}


def _everything(rank: int, seeds: range, with_aftermath: bool) -> dict[str, Any]:
    return {"cases": _run_cases(rank, seeds), "aftermath": _aftermath(rank) if with_aftermath else {}}


Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return on_processes(tmp_path_factory.mktemp("faults"), _everything, range(6), True)


def _nothing_wrong(found: Found, count: int) -> None:
    cases = [each["cases"] for each in found]
    assert [len(each) for each in cases] == [count, count]
    wrong = [f"process {rank}: {case}: {said}" for rank, each in enumerate(cases) for case, said in each if said]
    assert not wrong, "\n".join(wrong)
    print(Counter(case.how for case, _ in cases[0]), Counter(case.stage for case, _ in cases[0]))


def test_fault_on_one_process_hangs_none(few: Found) -> None:
    _nothing_wrong(few, 6)


@pytest.mark.soak
@pytest.mark.parametrize("first", [1000, 1050, 1100, 1150])
def test_two_hundred_random_faults_hang_none(first: int, tmp_path: Path) -> None:
    _nothing_wrong(on_processes(tmp_path, _everything, range(first, first + 50), False), 50)


@pytest.mark.parametrize("how", ["fsdp2", "tp"])
def test_permanent_fault_pauses_all_processes_at_once(how: str, few: Found) -> None:
    for rank in range(2):
        pause = few[rank]["aftermath"][how]["pause"]
        assert pause["paused"] == [False] * 4 + [True] * 3
        assert pause["steps"] == ([0, 1, 2, 3, 4, 7] if rank == 0 else [])
        assert pause["good"] == (rank == 0)
    first, second = (few[rank]["aftermath"][how]["pause"]["warnings"] for rank in range(2))
    assert "process 1: RuntimeError: no luck" in first[0]
    assert "nothing was measured in 5 samples in a row" in first[1]
    assert len(first) == 2
    assert second == []  # one process warns for all


@pytest.mark.parametrize("how", ["fsdp2", "tp"])
def test_strict_raises_on_all_and_next_forward_works(how: str, few: Found) -> None:
    assert few[1]["aftermath"][how]["strict"] == "no luck"
    assert few[0]["aftermath"][how]["strict"] == "process 1: RuntimeError: no luck"
