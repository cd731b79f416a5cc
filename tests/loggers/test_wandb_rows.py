"""The rows and steps of a user's W&B run are those of the run without the monitor, whatever the cadences."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import wandb
from models import TinyGPT, language_loss, token_batch
from wandb_files import curve, offline_run

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.lightning import AttentionMonitorCallback as LightningCallback
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.callbacks.transformers import AttentionMonitorCallback as TransformersCallback
from attnmonitor.loggers import WandbLogger

NUM_STEPS = 12
Log = Callable[[Any, int, float], None]


def _in_two_parts(run: Any, step: int, loss: float) -> None:
    run.log({"loss": loss}, step=step)
    run.log({"twice": 2 * loss}, step=step)


HOW_USERS_LOG: dict[str, Log] = {
    "without a step": lambda run, step, loss: run.log({"loss": loss}),
    "with the optimizer step": lambda run, step, loss: run.log({"loss": loss}, step=step),
    "with a count of their own": lambda run, step, loss: run.log({"loss": loss}, step=step // 4),
    "with steps far apart": lambda run, step, loss: run.log({"loss": loss}, step=100 * step),
    "with a step and commit": lambda run, step, loss: run.log({"loss": loss}, step=step, commit=True),
    "in two parts of one row": _in_two_parts,
    "first part not committed": lambda run, step, loss: (
        run.log({"twice": 2 * loss}, commit=False),
        run.log({"loss": loss}),
    ),
}
CLOCK = re.compile("runtime|timestamp|per_second")
CADENCES = {"more often": (1, 4), "as often": (2, 2), "more seldom": (4, 1)}


def users_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with something of the user in them, without what the monitor and W&B itself add."""
    kept = [
        {key: value for key, value in row.items() if not key.startswith("attention/") and not CLOCK.search(key)}
        for row in run["history"]
    ]
    # W&B adds the framework's step to rows of ours where that step is the default x-axis.
    return [row for row in kept if row.keys() - {"_step", "trainer/global_step", "train/global_step"}]


def steps_sent(run: dict[str, Any]) -> list[int]:
    return sorted(curve(run, "attention/energy_rms/median"))


def training_loop(folder: Path, log: Log, *, user_every: int, sample_every: int | None, **settings: Any) -> Any:
    folder.mkdir()
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with wandb.init(project="test", dir=folder, **settings) as run:
        start = run.step
        run.log({"before": 1.0}, **({"step": 0} if start == 0 else {}))
        if sample_every:
            loggers = WandbLogger(run, image_share=0)
            monitor = attach(model, optimizer, token_batch(), every_n_steps=sample_every, record=None, loggers=loggers)
        for step in range(start, start + NUM_STEPS):
            loss = language_loss(model(token_batch(step)), token_batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % user_every == 0:
                log(run, step, loss.item())
        if sample_every:
            monitor.close()
        log(run, 10_000, 0.0)
    return offline_run(folder)


@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("how", HOW_USERS_LOG)
def test_users_rows_are_untouched(how: str, cadence: str, tmp_path: Path) -> None:
    user_every, sample_every = CADENCES[cadence]
    bare = training_loop(tmp_path / "bare", HOW_USERS_LOG[how], user_every=user_every, sample_every=None)
    seen = training_loop(tmp_path / "seen", HOW_USERS_LOG[how], user_every=user_every, sample_every=sample_every)
    assert len(users_rows(bare)) > 3
    assert users_rows(seen) == users_rows(bare)
    assert steps_sent(seen) == list(range(0, NUM_STEPS + 1, sample_every))
    assert seen["summary"]["attention/global_step"] == NUM_STEPS


def test_resumed_run_keeps_users_rows(tmp_path: Path) -> None:
    parts = {}
    for sample_every in (None, 1):
        options = {"id": "same", "resume": "allow", "user_every": 4, "sample_every": sample_every}
        parts[sample_every] = [
            training_loop(tmp_path / f"{sample_every}-{part}", HOW_USERS_LOG["without a step"], **options)
            for part in range(2)
        ]
    for bare, seen in zip(parts[None], parts[1], strict=True):
        assert users_rows(seen) == users_rows(bare)
        assert len(steps_sent(seen)) == NUM_STEPS + 1


def test_run_without_users_rows_holds_all_points(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD((model := TinyGPT()).parameters(), 0.1)
    with wandb.init(project="test", dir=tmp_path) as run:
        monitor = attach(model, optimizer, token_batch(), every_n_steps=1, record=None, loggers=run)
        for step in range(6):
            language_loss(model(token_batch(step)), token_batch(step)).backward()
            optimizer.step()
        monitor.close()
    logged = offline_run(tmp_path)
    assert list(curve(logged, "attention/energy_rms/median")) == [0, 1, 2, 3, 4, 5, 6]
    assert list(curve(logged, "attention/energy_rms/heatmap.path")) == [0, 6]


def test_commit_closes_a_row_per_sample(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD((model := TinyGPT()).parameters(), 0.1)
    with wandb.init(project="test", dir=tmp_path) as run:
        loggers = WandbLogger(run, image_share=0, commit=True)
        attach(model, optimizer, token_batch(), every_n_steps=1, record=None, loggers=loggers)
        for step in range(3):
            language_loss(model(token_batch(step)), token_batch(step)).backward()
            optimizer.step()
            assert run.step == step + 2
    assert list(curve(offline_run(tmp_path), "attention/energy_rms/median")) == [0, 1, 2, 3]


def test_watch_logs_at_the_same_steps(tmp_path: Path) -> None:
    """`wandb.watch` counts forwards: the probe's must not count."""
    logged = {}
    for sample_every in (None, 2):
        folder = tmp_path / str(sample_every)
        folder.mkdir()
        optimizer = torch.optim.SGD((model := TinyGPT()).parameters(), 0.1)
        with wandb.init(project="test", dir=folder) as run:
            run.watch(model, log="all", log_freq=3)
            if sample_every:
                attach(model, optimizer, token_batch(), every_n_steps=sample_every, record=None, loggers=run)
            for step in range(NUM_STEPS):
                language_loss(model(token_batch(step)), token_batch(step)).backward()
                optimizer.step()
                run.log({"loss": 1.0})
            run.unwatch(model)
        logged[sample_every] = [
            (row["_step"], kind)
            for row in offline_run(folder)["history"]
            for kind in ("parameters", "gradients")
            if any(key.startswith(f"{kind}/") for key in row)
        ]
    assert len(logged[None]) == 8
    assert logged[2] == logged[None]


@pytest.mark.parametrize("theirs", ["flash", {"heads": 4}, {"kind": {"name": "flash"}}])
def test_entry_named_attention_in_the_configuration_stays(theirs: Any, tmp_path: Path) -> None:
    with wandb.init(project="test", dir=tmp_path, config={"attention": theirs}) as run:
        for name in ("short", "long"):
            AttentionMonitor(TinyGPT(), token_batch(), record=None, loggers=run, name=name)
        assert run.config["attention"] == theirs
        assert set(run.config["attnmonitor"].keys()) == {"short", "long"}


def test_disabled_run_costs_nothing(tmp_path: Path) -> None:
    run = wandb.init(mode="disabled", dir=tmp_path)
    optimizer = torch.optim.SGD((model := TinyGPT()).parameters(), 0.1)
    monitor = attach(model, optimizer, token_batch(), every_n_steps=1, record=None, loggers=run)
    for step in range(3):
        language_loss(model(token_batch(step)), token_batch(step)).backward()
        optimizer.step()
        run.log({"loss": 1.0})
    run.finish()
    monitor.close()
    assert (monitor.failures, len(monitor.history.steps)) == (0, 4)


PROGRAM = """
import sys, torch, wandb
from models import TinyGPT, language_loss, token_batch
from attnmonitor.callbacks.pytorch import attach
run = wandb.init(project="test", dir=sys.argv[1])
optimizer = torch.optim.SGD((model := TinyGPT()).parameters(), 0.1)
attach(model, optimizer, token_batch(), every_n_steps=1, record=None, loggers=run)
for step in range(4):
    language_loss(model(token_batch(step)), token_batch(step)).backward()
    optimizer.step()
run.log({"loss": 1.0}, step=0)
"""


@pytest.mark.parametrize("end", ["", "1 / 0"])
def test_program_end_sends_pending_points(end: str, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": ":".join(sys.path), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "HOME": "/tmp"}
    subprocess.run([sys.executable, "-c", PROGRAM + end, str(tmp_path)], env=environment, timeout=120, check=not end)
    logged = offline_run(tmp_path)
    assert [row["_step"] for row in users_rows(logged)] == [0]
    assert steps_sent(logged) == [0, 1, 2, 3, 4]


@pytest.fixture(autouse=True)
def quiet_lightning() -> Iterator[None]:
    """Lightning warns about itself and about tiny runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers|log_every_n_steps).*")
        yield


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = TinyGPT()

    def forward(self, token_ids: torch.Tensor) -> Any:
        return self.gpt(token_ids)

    def training_step(self, batch: torch.Tensor, index: int) -> Any:
        loss = language_loss(self.gpt(batch), batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val_loss", language_loss(self.gpt(batch), batch))

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("test_loss", language_loss(self.gpt(batch), batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def lightning_run(folder: Path, log_every: int, callbacks: list[Any]) -> Any:
    from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger

    folder.mkdir()
    lightning.seed_everything(0, verbose=False)
    data = torch.utils.data.DataLoader(token_batch(batch=24), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=NUM_STEPS,
        callbacks=callbacks,
        logger=LightningWandbLogger(project="test", save_dir=folder, offline=True),
        default_root_dir=folder,
        accelerator="cpu",
        log_every_n_steps=log_every,
        val_check_interval=4,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, data, data)
    trainer.test(module, data, verbose=False)
    wandb.finish()
    return offline_run(folder)


def transformers_run(folder: Path, log_every: int, callbacks: list[Any]) -> Any:
    from trainer_run import trainer_of

    folder.mkdir()
    with wandb.init(project="test", dir=folder):
        trainer = trainer_of(folder, *callbacks, max_steps=NUM_STEPS, logging_steps=log_every, report_to=["wandb"])
        trainer.train()
        trainer.log({"after": 1.0})
    return offline_run(folder)


FRAMEWORKS: dict[str, tuple[Callable[..., Any], Any]] = {
    "Lightning": (lightning_run, LightningCallback),
    "transformers": (transformers_run, TransformersCallback),
}


@pytest.mark.parametrize("cadence", CADENCES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_framework_loggers_keep_their_rows(framework: str, cadence: str, tmp_path: Path) -> None:
    run, callback = FRAMEWORKS[framework]
    log_every, sample_every = CADENCES[cadence]
    rows = []
    for name, callbacks in (("bare", []), ("seen", [callback(every_n_steps=sample_every, record=None)])):
        logged = run(tmp_path / name, log_every, callbacks)
        rows.append(users_rows(logged))
    seen, bare = rows.pop(), rows.pop()
    assert seen == bare
    assert steps_sent(logged) == list(range(0, NUM_STEPS + 1, sample_every))


@pytest.mark.parametrize("cadence", CADENCES)
def test_accelerate_tracker_keeps_its_rows(cadence: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    user_every, sample_every = CADENCES[cadence]
    rows = []
    for name in ("bare", "seen"):
        (tmp_path / name).mkdir()
        accelerator = Accelerator(cpu=True, log_with="wandb")
        accelerator.init_trackers("test", init_kwargs={"wandb": {"dir": str(tmp_path / name)}})
        torch.manual_seed(0)
        optimizer = torch.optim.SGD((model := TinyGPT()).parameters(), 0.1)
        if name == "seen":
            run = accelerator.get_tracker("wandb", unwrap=True)
            attach(model, optimizer, token_batch(), every_n_steps=sample_every, record=None, loggers=run)
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(NUM_STEPS):
            loss = language_loss(model(token_batch(step)), token_batch(step))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % user_every == 0:
                accelerator.log({"loss": loss.item()}, step=step // user_every)
        accelerator.end_training()
        logged = offline_run(tmp_path / name)
        rows.append(users_rows(logged))
    assert rows[0] == rows[1]
    assert steps_sent(logged) == list(range(0, NUM_STEPS + 1, sample_every))
