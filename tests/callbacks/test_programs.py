"""The line of the README in programs as people write them, with the real libraries, at another place in each."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launched_programs
import pytest
import torch
from models import TinyGPT, language_loss, token_batch
from torch import Tensor, nn

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach

PROBE, STEPS = token_batch(seed=7), 3
Line = Callable[[nn.Module], None]
"""The README's line; without a monitor it does nothing."""


def fresh() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(num_layers=1, width=16, num_query_heads=2)


def batches() -> list[Tensor]:
    return [token_batch(seed=index, batch=2) for index in range(STEPS)]


def min_gpt(line: Line) -> nn.Module:
    """The optimizer is made inside of `run`."""

    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def run(self) -> None:
            optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
            for batch in batches():
                self.model.zero_grad(set_to_none=True)
                language_loss(self.model(batch), batch).backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()

    trainer = Trainer(fresh())
    line(trainer.model)
    trainer.run()
    return trainer.model


def nano_gpt(line: Line) -> nn.Module:
    """Two groups of parameters, accumulation, a scaler that is off."""
    model = fresh()
    groups = [{"params": [each for each in model.parameters() if (each.dim() > 1) is wide]} for wide in (True, False)]
    optimizer = torch.optim.AdamW(groups, 1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    line(model)
    for batch in batches():
        for part in batch.split(1):
            scaler.scale(language_loss(model(part), part) / 2).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return model


def accelerated(line: Line, *, before: bool) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if before:
        line(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if not before:
        line(model)
    for batch in batches():
        for part in batch.split(1):
            with accelerator.accumulate(model):
                accelerator.backward(language_loss(model(part), part))
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def accelerate_before(line: Line) -> nn.Module:
    return accelerated(line, before=True)


def accelerate_after(line: Line) -> nn.Module:
    return accelerated(line, before=False)


def fabric(line: Line, *, before: bool = False) -> nn.Module:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    own = fresh()
    if before:
        line(own)
    model, optimizer = fabric.setup(own, torch.optim.AdamW(own.parameters(), 1e-2))
    if not before:
        line(model)
    for batch in batches():
        optimizer.zero_grad()
        fabric.backward(language_loss(model(batch), batch))
        optimizer.step()
    return own


def fabric_before(line: Line) -> nn.Module:
    return fabric(line, before=True)


def ignite(line: Line) -> nn.Module:
    engine = pytest.importorskip("ignite.engine")
    model = fresh()

    def step(_: Any, batch: Tensor) -> float:
        optimizer.zero_grad()
        loss = language_loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    line(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    engine.Engine(step).run(batches(), max_epochs=1)
    return model


def skorch(line: Line) -> nn.Module:
    skorch = pytest.importorskip("skorch")

    class Loss(nn.Module):
        def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
            return language_loss(logits, ids)

    settings = {"optimizer": torch.optim.AdamW, "lr": 1e-2, "batch_size": 2, "train_split": None, "verbose": 0}
    net = skorch.NeuralNet(fresh(), Loss, max_epochs=1, warm_start=True, **settings)
    net.initialize()
    line(net.module_)
    data = torch.cat(batches())
    net.fit(data, data)
    return net.module_


def schedule_free(line: Line) -> nn.Module:
    schedulefree = pytest.importorskip("schedulefree")
    model = fresh()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    line(model)
    for batch in batches():
        optimizer.train()
        optimizer.zero_grad()
        language_loss(model(batch), batch).backward()
        optimizer.step()
    return model


PROGRAMS = [min_gpt, nano_gpt, accelerate_before, accelerate_after, fabric, fabric_before]
PROGRAMS += [pytest.param(each, marks=pytest.mark.soak) for each in (ignite, skorch, schedule_free)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_line_watches_the_program(program: Callable[[Line], nn.Module], tmp_path: Path) -> None:
    monitors: list[AttentionMonitor] = []

    def line(model: nn.Module) -> None:
        monitors.append(attach(model, probe=PROBE, every_n_steps=1, record=tmp_path / "run.sqlite"))

    bare, model = program(lambda model: None), program(line)
    [monitor] = monitors
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    assert monitor.history.steps == list(range(STEPS + 1))
    assert monitor.failures == 0
    [trajectory] = monitor.history["key_rms"].values()
    for weights, row in ((fresh(), trajectory[0]), (copy.deepcopy(bare), trajectory[-1])):
        with AttentionMonitor(weights, PROBE, record=None) as expected:
            [heads] = expected.sample(0).values["key_rms"].values()
        assert torch.equal(heads, row)
    monitor.close()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("library", "number"), [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("ray", 1), ("ray", 2)]
)
def test_one_line_watches_what_starts_its_own_processes(library: str, number: int, tmp_path: Path) -> None:
    pytest.importorskip("ray.train" if library == "ray" else library, exc_type=ImportError)
    command = [sys.executable, launched_programs.__file__, library, str(number)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result == {"same": True, "steps": list(range(launched_programs.STEPS + 1)), "failures": 0}


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:::(diffusers|huggingface_hub).*")
def test_one_line_watches_diffusion_training() -> None:
    diffusers = pytest.importorskip("diffusers", reason="`make soak` installs it")
    accelerate = pytest.importorskip("accelerate")

    def unet() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
        down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        blocks = {"down_block_types": down, "up_block_types": up, "cross_attention_dim": 16, "attention_head_dim": 4}
        return diffusers.UNet2DConditionModel(**sizes, **blocks)

    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sample, words = (torch.randn(2, *size, generator=generator) for size in ((4, 8, 8), (5, 16)))
        return {"sample": sample, "timestep": torch.tensor([3, 500]), "encoder_hidden_states": words}

    def trained(watched: bool) -> tuple[nn.Module, AttentionMonitor | None]:
        accelerator = accelerate.Accelerator(cpu=True)
        model, schedule = unet(), diffusers.DDPMScheduler(num_train_timesteps=1000)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        monitor = attach(model, probe=inputs(0), every_n_steps=1, record=None) if watched else None
        for step in range(STEPS):
            batch = inputs(step + 1)
            noise = torch.randn(batch["sample"].shape)
            noisy = schedule.add_noise(batch["sample"], noise, batch["timestep"])
            predicted = model(noisy, batch["timestep"], batch["encoder_hidden_states"]).sample
            accelerator.backward((predicted - noise).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return accelerator.unwrap_model(model), monitor

    (bare, _), (model, monitor) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    assert monitor is not None
    assert monitor.history.steps == list(range(STEPS + 1))
    assert {each.kind for each in monitor.coverage.values()} == {"self", "cross"}
    with AttentionMonitor(bare, inputs(0), record=None) as expected:
        sample = expected.sample(0)
    for layer, heads in monitor.last_sample.values["key_rms"].items():
        assert torch.equal(heads, sample.values["key_rms"][layer])
    monitor.close()
