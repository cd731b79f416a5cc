"""Ways to spread a model over four processes, and what may go wrong on one of them: no hang, and the same training.

Each case draws a set-up (replicas, shards, meshes, pairs of processes with a model each, experts, a model that is
wrapped after attach) and a fault: a process raises, at attach or in a sample, runs out of memory, is slow or late,
skips a sample, or does not attach. Processes that are killed are in `test_dying_processes.py`. Many cases share four
processes. A case that takes longer than a minute is a hang.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fault_case import collected_warnings, in_module
from kept_samples import KeptSamples
from models import TinyGPT, token_batch, train_step
from processes import FSDP2, PATIENCE, on_processes, spread, tell
from torch import Tensor, nn
from torch.distributed import nn as dist_nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.measurement.distributed import DistributedMeasurement
from attnmonitor.measurement.probe import Probe
from attnmonitor.parallel.exchange import TIME_LIMIT
from attnmonitor.record import RunRecord

WORLD, NUM_STEPS, BROKEN = 4, 4, 2
LIMIT, LATE = 4.0, 8.0  # seconds
MODULES = ("tokens", "blocks.0", "blocks.0.attn", "blocks.0.attn.q_proj", "blocks.1.norm1", "blocks.1.mlp", "head")
HOT = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0, quantile=0.5)
ALWAYS = Rule("always", "test", "run", HOT, patience=1, grace=0)


class Experts(nn.Module):
    """Sends each process a part of the tokens, and back."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        sent = dist_nn.all_to_all_single(torch.empty_like(rows), rows.contiguous())
        done = self.expert(sent)
        return dist_nn.all_to_all_single(torch.empty_like(done), done.contiguous()).view_as(x)


class Holder(nn.Module):
    """A user's module around a replica, as Fabric makes one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._forward_module = model

    def forward(self, token_ids: Tensor) -> Tensor:
        return self._forward_module(token_ids)


def _pair_mesh() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("which", "shard"))["shard"]


def _replicas_of_shards() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def _replica_in_a_pair(model: TinyGPT) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, process_group=_pair_mesh().get_group())


def _fsdp1_in_a_pair(model: TinyGPT) -> nn.Module:
    group = _pair_mesh().get_group()
    return FullyShardedDataParallel(model, process_group=group, device_id=torch.device("cpu"), use_orig_params=True)


def _fsdp2_on(mesh: Callable[[], Any]) -> Callable[[TinyGPT], nn.Module]:
    def sharded(model: TinyGPT) -> nn.Module:
        on = mesh()
        for block in model.blocks:
            fully_shard(block, mesh=on)
        return fully_shard(model, mesh=on)

    return sharded


def _experts(model: TinyGPT) -> nn.Module:
    for block in model.blocks:
        block.mlp = Experts(block.mlp)
    return model


@dataclass(frozen=True)
class Setup:
    """A way to spread a model.

    Attributes:
        of: Spreads a model.
        together: Whether all processes of a group measure together; otherwise the first one of each does.
        in_pairs: Whether processes 0 and 1, and 2 and 3, have a model each.
        late: Whether the model is spread after attach.
    """

    of: Callable[[TinyGPT], nn.Module]
    together: bool = True
    in_pairs: bool = False
    late: bool = False


SETUPS = {
    "replicas": Setup(nn.parallel.DistributedDataParallel, together=False),
    "a holder of replicas": Setup(lambda model: Holder(nn.parallel.DistributedDataParallel(model)), together=False),
    "replicas in pairs": Setup(_replica_in_a_pair, together=False, in_pairs=True),
    "replicas in pairs, wrapped after attach": Setup(_replica_in_a_pair, together=False, in_pairs=True, late=True),
    "fsdp1 in pairs, sharded after attach": Setup(_fsdp1_in_a_pair, in_pairs=True, late=True),
    "replicas, wrapped after attach": Setup(nn.parallel.DistributedDataParallel, together=False, late=True),
    "experts": Setup(_experts),
    "fsdp1": Setup(lambda model: spread(model, "fsdp1")),
    "fsdp1 in pairs": Setup(_fsdp1_in_a_pair, in_pairs=True),
}
if FSDP2:
    SETUPS |= {
        "fsdp2": Setup(lambda model: spread(model, "fsdp2")),
        "fsdp2 and tensor parallel": Setup(lambda model: spread(model, "fsdp2 x tp")),
        "shards that are replicated": Setup(_fsdp2_on(_replicas_of_shards)),
        "fsdp2 in pairs": Setup(_fsdp2_on(_pair_mesh), in_pairs=True),
        "fsdp2 in pairs, sharded after attach": Setup(_fsdp2_on(_pair_mesh), in_pairs=True, late=True),
        "fsdp2, sharded after attach": Setup(lambda model: spread(model, "fsdp2"), late=True),
    }
FAULTS = ("none", "raises", "out of memory", "slow", "late", "skips", "absent", "raises at attach")


@dataclass(frozen=True)
class Case:
    """One set-up with one fault.

    Attributes:
        setup: A key of `SETUPS`.
        pairs: Which pairs attach, where the set-up is in pairs.
        fault: One of `FAULTS`.
        rank: The process it happens on.
        module: Where it raises.
    """

    setup: str
    pairs: tuple[int, ...]
    fault: str
    rank: int
    module: str

    @property
    def how(self) -> Setup:
        return SETUPS[self.setup]

    def group(self, rank: int) -> tuple[int, ...]:
        return (rank // 2 * 2, rank // 2 * 2 + 1) if self.how.in_pairs else tuple(range(WORLD))

    @property
    def limit(self) -> float:
        """Of exchanges, from attach on."""
        is_short = self.fault == "absent" or (self.fault == "raises at attach" and self.how.late)
        return LIMIT if is_short else TIME_LIMIT

    def attaches(self, rank: int) -> bool:
        return not (self.fault == "absent" and rank == self.rank) and (not self.how.in_pairs or rank // 2 in self.pairs)


def draw(seed: int) -> Case:
    chance = random.Random(seed)
    setup = chance.choice(sorted(SETUPS))
    pairs = chance.choice(((0,), (1,), (0, 1)))
    return Case(setup, pairs, chance.choice(FAULTS), chance.randrange(WORLD), chance.choice(MODULES))


@dataclass
class End:
    trained: list[Tensor]
    monitor: AttentionMonitor | None = None
    refusal: str = ""
    warnings: tuple[str, ...] = ()
    logged: int = 0
    seconds: float = 0.0


def run(case: Case, *, watched: bool = True) -> End:
    rank, logger = dist.get_rank(), KeptSamples()
    torch.manual_seed(rank // 2 if case.how.in_pairs else 0)
    model: nn.Module = TinyGPT(num_kv_heads=2, dropout=0.0 if "tensor" in case.setup else 0.1)
    if not case.how.late:
        model = case.how.of(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    end = End([])
    schedule: Any = 1
    if case.fault == "skips" and case.rank == rank:
        schedule = [step for step in range(NUM_STEPS + 1) if step != BROKEN]
    probe = token_batch(batch=4)
    with (
        collected_warnings() as messages,
        pytest.MonkeyPatch.context() as patch,
        mock.patch("attnmonitor.parallel.exchange.TIME_LIMIT", case.limit),
        pytest.MonkeyPatch.context() as until_end,
    ):
        if watched and case.attaches(rank):
            record = f"pair{rank // 2}.sqlite" if case.how.in_pairs else "all.sqlite"
            if case.fault == "raises at attach" and case.rank == rank:
                in_module(case.module, RuntimeError("no luck"))(end.monitor, model, patch)
            try:
                settings: dict[str, Any] = {"record": record, "alerts": [ALWAYS], "loggers": [logger]}
                end.monitor = attach(model, optimizer, probe, schedule=schedule, **settings)
            except ValueError as error:
                end.refusal = str(error)
            patch.undo()
        if case.how.late:
            names = {parameter: name for name, parameter in model.named_parameters()}
            inner, model = model, case.how.of(model)
            now = dict(inner.named_parameters())
            for each in optimizer.param_groups:
                each["params"] = [now[names[parameter]] for parameter in each["params"]]
        torch.manual_seed(rank)
        losses = []
        for step in range(NUM_STEPS):
            if step == BROKEN - 1 and case.fault in ("late", "skips"):
                until_end.setattr("attnmonitor.parallel.exchange.TIME_LIMIT", LIMIT)
            if step == BROKEN - 1 and end.monitor is not None and case.rank == rank:
                inject(case, end.monitor, patch)
            if step == BROKEN:
                patch.undo()
            own = 0 if "tensor" in case.setup else rank
            losses.append(train_step(model, optimizer, token_batch(seed=10 * step + own, batch=4)))
    end.warnings, end.logged = tuple(messages), len(logger.samples)
    state = [value for values in optimizer.state.values() for value in values.values()]
    trained = [getattr(each, "_local_tensor", each).detach().clone() for each in (*model.parameters(), *state)]
    end.trained = [*trained, *losses, torch.get_rng_state()]
    if end.monitor is not None:
        end.monitor.close()
    return end


def inject(case: Case, monitor: AttentionMonitor, patch: pytest.MonkeyPatch) -> None:
    delays = {"late": (DistributedMeasurement, "take", LATE), "slow": (Probe, "run", 0.5)}
    if case.fault in delays:
        where, name, seconds = delays[case.fault]
        in_time = getattr(where, name)

        def delayed(*arguments: Any, **keywords: Any) -> Any:
            time.sleep(seconds)
            return in_time(*arguments, **keywords)

        patch.setattr(where, name, delayed)
    elif case.fault in ("raises", "out of memory"):
        error = torch.OutOfMemoryError("memory") if case.fault == "out of memory" else RuntimeError("no luck")
        in_module(case.module, error)(monitor, monitor.model, patch)


def defects(case: Case, end: End, bare: End) -> list[str]:
    """What is wrong with this process's end of a run, compared with one without a monitor."""
    rank = dist.get_rank()
    wrong = [] if all(map(torch.equal, end.trained, bare.trained)) else ["training differs"]
    if end.seconds > PATIENCE:
        wrong.append(f"{end.seconds:.0f} s")
    if not case.attaches(rank):
        return wrong
    group = case.group(rank)
    is_concerned = case.rank in group
    is_together_at_attach = case.how.together and not case.how.late
    is_waited_for = is_concerned and case.how.together and case.fault in ("late", "skips", "absent", "raises at attach")
    monitor = end.monitor
    is_refused = case.fault == "raises at attach" and case.rank == rank
    if is_refused or (is_waited_for and is_together_at_attach and case.fault in ("absent", "raises at attach")):
        missing, reason = f"process {case.rank} did not take part", "no luck"
        named = [missing] if case.fault == "absent" else [reason]
        if case.setup == "experts" and case.module == "tokens" and not is_refused:
            named.append(missing)  # after a case that one process missed, they do not know which attach is which
        return wrong if any(each in end.refusal for each in named) else [*wrong, f"{end.refusal=}"]
    if monitor is None:
        return [*wrong, f"refused: {end.refusal}"]
    if is_waited_for:
        named = f"process {case.rank} did not take part"
        if not monitor.paused:
            wrong.append("not paused")
        if not any(named in message for message in end.warnings):
            wrong.append(f"nobody is named: {end.warnings}")
        return wrong
    if rank != group[0]:
        return wrong if monitor.history.steps == [] and monitor.record_path is None else [*wrong, "two write"]
    is_lost = case.fault in ("raises", "out of memory") and (
        case.rank == rank if not case.how.together else is_concerned
    )
    steps = list(range(NUM_STEPS + 1))
    if case.fault == "skips" and case.rank == rank:
        steps.remove(BROKEN)
    if monitor.history.steps != steps or end.logged != len(steps):
        wrong.append(f"history has {monitor.history.steps}, {end.logged} logged")
    if list(RunRecord.open(monitor.record_path).steps) != steps:
        wrong.append(f"record has {list(RunRecord.open(monitor.record_path).steps)}")
    if not monitor.firing:
        wrong.append("no alert")
    if (monitor.failures > 0) is not is_lost:
        wrong.append(f"{monitor.failures} failures: {end.warnings}")
    if monitor.paused or any(values.isnan().any() for values in monitor.last_sample.values["energy_rms"].values()):
        wrong.append("the last sample has no numbers")
    return wrong


def _run_cases(rank: int, seeds: list[int]) -> list[tuple[Case, list[str], float]]:
    return [_tried(rank, seed, draw(seed)) for seed in seeds]


_bare: dict[str, End] = {}


def _tried(rank: int, seed: int, case: Case) -> tuple[Case, list[str], float]:
    tell(f"case {seed}: {case}")
    if case.setup not in _bare:
        _bare[case.setup] = run(case, watched=False)
    dist.barrier()
    for path in Path().glob("*.sqlite*") if rank == 0 else ():
        path.unlink()
    dist.barrier()
    started = time.monotonic()
    end = run(case)
    end.seconds = time.monotonic() - started
    return case, defects(case, end, _bare[case.setup]), end.seconds


def _check(found: list[list[tuple[Case, list[str], float]]], count: int) -> None:
    assert [len(each) for each in found] == [count] * WORLD
    wrong = [
        f"process {rank}: {case}: {'; '.join(said)}"
        for rank, each in enumerate(found)
        for case, said, _ in each
        if said
    ]
    assert not wrong, "\n".join(wrong)
    print(Counter(case.setup for case, *_ in found[0]), Counter(case.fault for case, *_ in found[0]))
    print(f"longest {max(seconds for each in found for *_, seconds in each):.1f} s")


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_three_hundred_setups_with_faults_hang_none(first: int, tmp_path: Path) -> None:
    _check(on_processes(tmp_path, _run_cases, list(range(first, first + 50)), world=WORLD), 50)


# Each of these is a kind: a set-up in pairs of which one attaches or both, and one process that the others miss.
FEW = (
    Case("experts", (0, 1), "raises at attach", 1, "tokens"),
    Case("fsdp2 in pairs" if FSDP2 else "fsdp1 in pairs", (0, 1), "none", 0, "head"),
    Case("fsdp2 in pairs" if FSDP2 else "fsdp1 in pairs", (1,), "late", 3, "head"),
    Case("replicas in pairs", (0, 1), "raises", 2, "blocks.1"),
    Case("fsdp1", (0, 1), "absent", 1, "head"),
    Case("fsdp1", (0, 1), "skips", 2, "head"),
    Case("experts", (0, 1), "none", 2, "blocks.0.attn"),
)


def _run_few(rank: int) -> list[tuple[Case, list[str], float]]:
    return [_tried(rank, seed, case) for seed, case in enumerate(FEW)]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, list[str]]]:
    found = on_processes(tmp_path_factory.mktemp("setups"), _run_few, world=WORLD)
    return [{case: said for case, said, _ in each} for each in found]


def test_first_rank_of_each_group_records_and_alerts(few: list[dict[Case, list[str]]]) -> None:
    assert [[each[FEW[1]], each[FEW[3]]] for each in few] == [[[], []]] * WORLD


def test_group_alone_measures_and_names_its_late_process(few: list[dict[Case, list[str]]]) -> None:
    assert [each[FEW[2]] for each in few] == [[]] * WORLD


def test_attach_names_a_process_that_never_attaches(few: list[dict[Case, list[str]]]) -> None:
    assert [each[FEW[4]] for each in few] == [[]] * WORLD


def test_process_that_skips_a_sample_pauses_all(few: list[dict[Case, list[str]]]) -> None:
    assert [each[FEW[5]] for each in few] == [[]] * WORLD


def test_experts_are_measured_by_all_processes(few: list[dict[Case, list[str]]]) -> None:
    assert [each[FEW[6]] for each in few] == [[]] * WORLD


def test_process_that_fails_before_its_first_collective_says_so(few: list[dict[Case, list[str]]]) -> None:
    assert [each[FEW[0]] for each in few] == [[]] * WORLD
