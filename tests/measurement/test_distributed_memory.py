"""If one of two processes runs out of memory, both retry with half of the probe, or neither does.

A hook simulates the memory of a GPU: in the middle of a probe's forward it fails for more sequences than there is room
for.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import TinyGPT, token_batch, train_step
from processes import FSDP2, ON_TWO, on_processes, spread, tell
from torch import Tensor, nn

from attnmonitor import AttentionMonitor
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.parallel.collectives import CollectiveRecorder, run_with_zeros

NUM_STEPS, SHORT = 4, (1, 2)  # memory is short in the samples at these steps
ENOUGH = 1000
METRICS = ("energy_effective_rank", "energy_rms", "key_incoherence", "attention_entropy", "interaction_effective_rank")


@dataclass(frozen=True)
class Case:
    """How a model is sharded, and which process has room for how many of the probe's sequences."""

    how: str
    rank: int
    room: int
    num_sequences: int = 4


SHARDED = tuple(how for how in ON_TWO if how != "ddp")
HALF_FITS = [Case("ddp", 0, 2), *(Case(how, 1, 2) for how in SHARDED), Case("tp", 0, 2)]
NOTHING_FITS = [Case("ddp", 0, 0), *(Case(how, 1, 0) for how in SHARDED)]
ONE_SEQUENCE = [Case("tp", 1, 0, 1)]
CASES = [*HALF_FITS, *NOTHING_FITS, *ONE_SEQUENCE]


class Memory:
    """Room for so many sequences at once in the forwards that are not trained.

    Attributes:
        room: How many.
        error: What is raised where that is not enough.
        seen: The sequences of each such forward.
        kept: A tensor of the latest.
    """

    def __init__(self, model: TinyGPT) -> None:
        self.room, self.seen = ENOUGH, list[int]()
        self.error: type[Exception] = torch.OutOfMemoryError
        self.kept: Callable[[], Tensor | None] = lambda: None
        model.tokens.register_forward_pre_hook(self._note)
        model.blocks[1].attn.register_forward_pre_hook(self._check)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            self.seen.append(len(args[0]))

    def _check(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled() and len(args[0]) > self.room:
            self.kept = weakref.ref(args[0])
            raise self.error("CUDA out of memory")


def _model(how: str) -> tuple[nn.Module, Memory]:
    torch.manual_seed(0)
    plain = TinyGPT(num_kv_heads=2, dropout=0.0 if how == "tp" else 0.1)
    memory = Memory(plain)
    return spread(plain, how), memory


def _run(rank: int, how: str, case: Case | None) -> dict[str, Any]:
    """Train a few steps with a sample before each, and one by a second monitor that has the first half."""
    tell(f"{how}, {case}")
    model, memory = _model(how)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found: dict[str, Any] = {"samples": [], "expected": [], "forwards": []}
    if case is not None:
        batch = token_batch(batch=case.num_sequences)
        options: dict[str, Any] = {"metrics": METRICS, "record": None}
        monitor = AttentionMonitor(model, batch, **options)
        found["at attach"] = list(memory.seen)
        reference = AttentionMonitor(model, batch[: max(1, len(batch) // 2)], **options)
    torch.manual_seed(rank)
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttentionMonitorWarning)
        for step in range(NUM_STEPS):
            if case is not None:
                memory.room = case.room if rank == case.rank and step in SHORT else ENOUGH
                memory.seen.clear()
                found["samples"].append(monitor.sample(step))
                found["forwards"].append(list(memory.seen))
                memory.room = ENOUGH
                found["expected"].append(reference.sample(step).values)
            batch = token_batch(seed=10 * step + (0 if how == "tp" else rank))
            losses.append(train_step(model, optimizer, batch))
    state = [value for values in optimizer.state.values() for value in values.values()]
    trained = [getattr(each, "_local_tensor", each).detach().clone() for each in (*model.parameters(), *state)]
    texts = [str(each.message) for each in caught if issubclass(each.category, AttentionMonitorWarning)]
    return {**found, "warnings": texts, "trained": [*trained, *losses, torch.get_rng_state()]}


def _only_one_can_halve(rank: int) -> list[int]:
    """Under data parallelism each process may have a probe of its own: this time one of them a single sequence."""
    tell("only one can halve")
    model, memory = _model("fsdp1")
    monitor = AttentionMonitor(model, token_batch(batch=1 if rank else 4), record=None)
    memory.room = ENOUGH if rank else 2
    memory.seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        assert "OutOfMemoryError" in (monitor.sample(0).failure or "")
    return list(memory.seen)


def _other_failure(rank: int) -> tuple[str, list[int]]:
    """Return what a strict monitor raises where one process is out of memory and another fails otherwise."""
    tell("other failure")
    model, memory = _model("fsdp1")
    monitor = AttentionMonitor(model, token_batch(batch=4), record=None, strict=True)
    memory.room = 2 if rank else ENOUGH
    memory.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(torch.linalg, "eigh", _no_convergence)
        with pytest.raises(Exception) as raised:  # noqa: PT011
            monitor.sample(0)
    return f"{raised.type.__name__}: {raised.value}", list(memory.seen)


def _no_convergence(*_: Any, **__: Any) -> None:
    raise torch.linalg.LinAlgError("no convergence")


def _rejected_half(rank: int) -> tuple[list[int], list[int]]:
    """A model that takes batches of four only."""
    tell("rejected half")
    model, memory = _model("fsdp1")

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert len(args[0]) == 4

    inner = next(module for module in model.modules() if isinstance(module, TinyGPT))
    inner.blocks[0].register_forward_pre_hook(check)
    monitor = AttentionMonitor(model, token_batch(batch=4), record=None)
    at_attach = list(memory.seen)
    memory.seen.clear()
    memory.room = 0 if rank else ENOUGH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        assert "OutOfMemoryError" in (monitor.sample(0).failure or "")
    return at_attach, list(memory.seen)


def _alive_tensors(rank: int, error: type[Exception]) -> dict[str, Any]:
    """Return whether a tensor of the failed forward is alive at its remaining collectives, and after the sample."""
    tell("alive tensors")
    model, memory = _model("tp")
    monitor = AttentionMonitor(model, token_batch(batch=4), record=None)
    memory.error, memory.room = error, ENOUGH if rank == 0 else 2
    alive = []

    def checked(calls: Any) -> None:
        alive.append(memory.kept() is not None)
        run_with_zeros(calls)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        patch.setattr("attnmonitor.measurement.distributed.run_with_zeros", checked)
        gc.disable()
        sample = monitor.sample(0)
        after = memory.kept() is not None
        gc.enable()
    return {"failed": sample.failure is not None, "at collectives": alive, "after": after}


def _while_unpacking(rank: int) -> dict[str, Any]:
    """FSDP2 has gathered a block's weights on process 1, and then there is no memory to unpack them."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    unpack, ends = _fsdp_param_group.foreach_all_gather_copy_out, []
    for is_short in (False, True):
        tell(f"while unpacking, {is_short=}")
        model, memory = _model("fsdp2")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        monitor = AttentionMonitor(model, token_batch(batch=4), record=None)
        memory.seen.clear()

        def failing(*args: Any, memory: Memory = memory, **options: Any) -> None:
            # The root's weights are unpacked before its forward reaches the embedding, where the hook notes it.
            if memory.seen == [4] and memory.room == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            unpack(*args, **options)

        def with_room(calls: Any, memory: Memory = memory) -> None:
            memory.room = ENOUGH  # the failed forward is over
            run_with_zeros(calls)

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", AttentionMonitorWarning)
            if is_short and rank == 1:
                memory.room = 0
                patch.setattr(_fsdp_param_group, "foreach_all_gather_copy_out", failing)
                patch.setattr("attnmonitor.measurement.distributed.run_with_zeros", with_room)
            sample = monitor.sample(0)
        losses = [train_step(model, optimizer, token_batch(seed=step)) for step in range(3)]
        ends.append([each.to_local().detach().clone() for each in model.parameters()] + losses)
    return {"same": all(map(torch.equal, *ends)), "halved": "halved_probe" in sample.diagnostics}


def _everything(rank: int) -> dict[str, Any]:
    bare = {how: _run(rank, how, None)["trained"] for how in ON_TWO}
    return {
        "bare": bare,
        "cases": {case: _run(rank, case.how, case) for case in CASES},
        "only one can halve": _only_one_can_halve(rank),
        "other failure": _other_failure(rank),
        "rejected half": _rejected_half(rank),
        "alive tensors": {error: _alive_tensors(rank, error) for error in (torch.OutOfMemoryError, ValueError)},
        **({"while unpacking": _while_unpacking(rank)} if FSDP2 else {}),
    }


Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return on_processes(tmp_path_factory.mktemp("memory"), _everything)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_bit_identical_after_out_of_memory(case: Case, processes: Found) -> None:
    for rank in range(2):
        trained, bare = processes[rank]["cases"][case]["trained"], processes[rank]["bare"][case.how]
        assert len(bare) > 20
        assert all(map(torch.equal, trained, bare))


@pytest.mark.parametrize("case", HALF_FITS, ids=str)
def test_out_of_memory_retries_half_of_the_probe_on_all_ranks(case: Case, processes: Found) -> None:
    found = processes[0]["cases"][case]
    for step, (sample, expected) in enumerate(zip(found["samples"], found["expected"], strict=True)):
        assert sample.failure is None
        assert sample.failures == 0
        assert ("halved_probe" in sample.diagnostics) == (step in SHORT)
        for metric, layers in expected.items():
            for layer, values in layers.items():
                of_weights = metric == "interaction_effective_rank" and case.how != "ddp"
                assert values.isnan().all() if of_weights else not values.isnan().any()
                same = torch.equal(sample.values[metric][layer].nan_to_num(), values.nan_to_num())
                assert same == (step in SHORT or of_weights or metric == "interaction_effective_rank")
    [text] = found["warnings"]
    assert "step 1 ran out of memory and measured the first half" in text
    assert processes[1]["cases"][case]["warnings"] == []  # only one process warns


@pytest.mark.parametrize("case", [*NOTHING_FITS, *ONE_SEQUENCE], ids=str)
def test_probe_that_never_fits_is_nan_and_counted(case: Case, processes: Found) -> None:
    found = processes[0]["cases"][case]
    for step, sample in enumerate(found["samples"]):
        assert "halved_probe" not in sample.diagnostics
        assert ("OutOfMemoryError: CUDA out of memory" in (sample.failure or "")) == (step in SHORT)
        for values in sample.values["energy_rms"].values():
            assert values.isnan().all() if step in SHORT else not values.isnan().any()
    assert [sample.failures for sample in found["samples"]] == [0, 1, 2, 2]
    assert len(found["warnings"]) == 1
    measures = range(1) if case.how == "ddp" else range(2)
    tried = [1] if case.num_sequences == 1 else [4, 2]
    for rank in measures:
        forwards = [[case.num_sequences], tried, tried, [case.num_sequences]]
        assert processes[rank]["cases"][case]["forwards"] == forwards


@pytest.mark.parametrize("how", SHARDED)
def test_number_of_forwards_at_attach(how: str, processes: Found) -> None:
    for rank in range(2):
        assert processes[rank]["cases"][Case(how, 1, 2)]["at attach"] == [4, 4, 2]
        assert processes[rank]["cases"][Case("tp", 1, 0, 1)]["at attach"] == [1, 1]


def test_no_rank_retries_if_one_cannot_halve_its_probe(processes: Found) -> None:
    assert [found["only one can halve"] for found in processes] == [[4], [1]]


def test_strict_raises_the_failure_after_the_retry(processes: Found) -> None:
    assert processes[0]["other failure"] == ("_LinAlgError: no convergence", [4, 2])
    assert processes[1]["other failure"] == ("RuntimeError: process 0: _LinAlgError: no convergence", [4, 2])


def test_no_rank_retries_if_the_model_rejects_the_half(processes: Found) -> None:
    assert [found["rejected half"] for found in processes] == [([4, 4, 2], [4])] * 2


def test_failed_forward_frees_its_tensors_before_collectives(processes: Found) -> None:
    short = [found["alive tensors"][torch.OutOfMemoryError] for found in processes]
    assert short[0] == {"failed": False, "at collectives": [], "after": False}
    assert short[1] == {"failed": False, "at collectives": [False], "after": False}


def test_failed_forward_frees_its_tensors_after_the_sample(processes: Found) -> None:
    broken = [found["alive tensors"][ValueError] for found in processes]
    assert broken[1]["failed"]
    assert not broken[1]["after"]


@pytest.mark.skipif(not FSDP2, reason="FSDP2 of torch 2.6 runs on GPUs only")
def test_gathered_but_not_unpacked_weights_are_gathered_again(processes: Found) -> None:
    assert [found["while unpacking"] for found in processes] == [
        {"same": True, "halved": True},
        {"same": True, "halved": False},  # the first process has the numbers
    ]


def test_collective_that_failed_to_start_is_not_recorded(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        with CollectiveRecorder() as done:
            dist.all_reduce(torch.ones(2))
            with pytest.raises(RuntimeError, match="nobody"):
                torch.ops._c10d_functional.all_reduce(torch.ones(2), "sum", "nobody")
    finally:
        dist.destroy_process_group()
    assert len(done.calls) == 1
