"""Wheel and sdist install with each extra and work from a folder outside of the checkout."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attnmonitor import __version__

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
NOT_SOURCES = (".*", "*.egg-info", "__pycache__", "_build", "build", "dist", "attnmonitor_runs", "*_output", "wandb")
FOLDERS = {"attnmonitor": "attnmonitor", "callbacks": "attnmonitor/callbacks"}

RAW_LOOP = """
import sys
import torch
import attnmonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.metrics import EnergyEffectiveRank, KeyIncoherence
from attnmonitor.record import RunRecord

assert sys.prefix in attnmonitor.__file__, attnmonitor.__file__
model = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
monitor = attach(model, optimizer, torch.randn(2, 12, 16), every_n_steps=2)
for _ in range(4):
    optimizer.zero_grad()
    model(torch.randn(2, 12, 16)).square().mean().backward()
    optimizer.step()
monitor.close()
assert monitor.failures == 0 and monitor.coverage["self_attn"].measured
record = RunRecord.open(monitor.record_path)
assert list(record.steps) == [0, 2, 4]
assert record.trajectories("key_incoherence")["self_attn"].shape == (3, 2)

query, key = torch.randn(3, 4, 12, 8), torch.randn(3, 2, 12, 8)
rank, incoherence = EnergyEffectiveRank(num_heads=4), KeyIncoherence(num_heads=2)
rank.update(query, key), incoherence.update(key)
assert rank.compute().shape == (4,) and (incoherence.compute() >= 1).all()
print(monitor.record_path)
"""

LIGHTNING = """
import lightning
import torch
from torch.utils.data import DataLoader
from attnmonitor.callbacks.lightning import AttentionMonitorCallback

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    def forward(self, x):
        return self.layer(x)
    def training_step(self, batch, batch_index):
        return self(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

watcher = AttentionMonitorCallback(every_n_steps=2)
trainer = lightning.Trainer(max_steps=4, callbacks=[watcher], accelerator="cpu", logger=False)
trainer.fit(Module(), DataLoader(torch.randn(32, 12, 16), batch_size=4))
assert watcher.monitor.history.steps == [0, 2, 4] and watcher.monitor.failures == 0
"""

TRANSFORMERS = """
import torch
import transformers
from attnmonitor.callbacks.transformers import AttentionMonitorCallback

model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=32)
)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (16, 12))]
args = transformers.TrainingArguments("out", max_steps=4, report_to=[], use_cpu=True, per_device_train_batch_size=2)
watcher = AttentionMonitorCallback(every_n_steps=2)
trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[watcher])
trainer.train()
assert watcher.monitor.history.steps == [0, 2, 4] and watcher.monitor.failures == 0
assert any("attention/energy_rms/median" in row for row in trainer.state.log_history)
"""

DEMO = """
from pathlib import Path
from attnmonitor.cli import main

assert main(["demo", "--steps", "10", "--out", "out"]) == 0
assert {"heads.png", "report.html", "wandb", "attnmonitor_runs"} <= {path.name for path in Path("out").iterdir()}
"""

TYPED = """
import torch
from attnmonitor import AttentionMonitor, Sample
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.functional import energy_effective_rank

def watch(model: torch.nn.Module, optimizer: torch.optim.Optimizer, probe: torch.Tensor) -> AttentionMonitor:
    return attach(model, optimizer, probe, every_n_steps=10)

def last(monitor: AttentionMonitor) -> Sample | None:
    return monitor.on_step(3)

ranks: torch.Tensor = energy_effective_rank(torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a folder outside of the repository to work in."""

    home: Path
    folder: Path

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    def run(self, *arguments: Any, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment."""
        program, *rest = map(str, arguments)
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
        done = subprocess.run(
            [self.home / "bin" / program, *rest],
            cwd=self.folder,
            env=settings,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert (done.returncode == 0) is succeeds, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def run_text(self, text: str) -> str:
        """Run a Python program given as text and return what it printed."""
        (self.folder / "program.py").write_text(text)
        return self.run("python", "program.py").stdout


@contextmanager
def installed(folder: Path, archive: Path, extra: str) -> Iterator[Environment]:
    """Yield a clean environment with the archive and one of its extras; deleted afterwards, because it holds torch."""
    environment = Environment(folder / "environment", folder / "elsewhere")
    environment.folder.mkdir()
    venv.create(environment.home, with_pip=True, symlinks=True)
    requirement = f"attnmonitor{extra} @ {archive.as_uri()}"
    quietly = ["install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt"]
    environment.run("python", "-m", "pip", *quietly, requirement)
    yield environment
    shutil.rmtree(environment.home)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the sdist as `build` does it, and the sdist."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    command = [sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [wheel], [sdist] = (list((folder / "dist").glob(each)) for each in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.fixture(scope="module")
def minimal(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    with installed(tmp_path_factory.mktemp("minimal"), archives[0], "") as environment:
        yield environment


@pytest.fixture(scope="module")
def whole(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    with installed(tmp_path_factory.mktemp("whole"), archives[0], "[all]") as environment:
        yield environment


def test_wheel_holds_exactly_the_package(archives: tuple[Path, Path]) -> None:
    expected = {
        f"{where}/{path.relative_to(ROOT / folder)}"
        for folder, where in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".typed", ".html", ".css", ".js")
    }
    with zipfile.ZipFile(archives[0]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"attnmonitor/py.typed", "attnmonitor/report/page.js", "attnmonitor/callbacks/lightning.py"} <= held


def test_sdist_holds_tests_docs_and_benchmarks(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[1]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    source = archives[1].parents[1] / "source"
    folders = ("attnmonitor", "benchmarks", "callbacks", "docs", "examples", "tests")
    files = {path.relative_to(source) for folder in folders for path in (source / folder).rglob("*") if path.is_file()}
    top = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
    assert {*map(str, files), *top} <= held


def test_minimal_install_monitors_records_and_measures(minimal: Environment) -> None:
    record = minimal.run_text(RAW_LOOP).split()[-1]
    minimal.run("python", "-m", "pip", "check")
    for program in (["attnmonitor"], ["python", "-m", "attnmonitor"]):
        assert minimal.run(*program, "--version").stdout == f"attnmonitor {__version__}\n"
    assert minimal.run("attnmonitor", "replay", record).stdout == "nothing would have fired\n"


def test_sdist_installs_and_monitors(archives: tuple[Path, Path], tmp_path: Path) -> None:
    with installed(tmp_path, archives[1], "") as environment:
        environment.run_text(RAW_LOOP)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            "import attnmonitor.callbacks.lightning",
            "attnmonitor.callbacks.lightning needs lightning: pip install 'attnmonitor[lightning]'",
        ),
        (
            "import attnmonitor.callbacks.transformers",
            "attnmonitor.callbacks.transformers needs accelerate: pip install 'attnmonitor[transformers]'",
        ),
        (
            "from attnmonitor.loggers import WandbLogger; WandbLogger()",
            "WandbLogger needs wandb: pip install 'attnmonitor[wandb]'",
        ),
        (
            "from attnmonitor.plots import heatmap",
            "attnmonitor.plots needs matplotlib: pip install 'attnmonitor[plots]'",
        ),
        (
            "from attnmonitor.report import write_report; write_report('run.sqlite')",
            "write_report needs plotly: pip install 'attnmonitor[report]'",
        ),
        (
            "from attnmonitor.scan import scan; scan('model')",
            "scan needs transformers: pip install 'attnmonitor[transformers]'",
        ),
    ],
)
def test_missing_extra_is_named_at_import_or_call(minimal: Environment, use: str, message: str) -> None:
    error = minimal.run("python", "-c", use, succeeds=False).stderr.strip().splitlines()[-1]
    assert error == f"ModuleNotFoundError: {message}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["scan", "model"], "scan: error: scan needs transformers: pip install 'attnmonitor[transformers]'"),
        (["report", "run.sqlite"], "report: error: write_report needs plotly: pip install 'attnmonitor[report]'"),
        (["demo"], "demo: error: No module named 'lightning'; pip install 'attnmonitor[all]'"),
    ],
)
def test_missing_extra_is_named_by_each_command(minimal: Environment, command: list[str], message: str) -> None:
    assert minimal.run("attnmonitor", *command, succeeds=False).stderr == f"attnmonitor {message}\n"


@pytest.mark.parametrize(("extra", "program"), [("[lightning]", LIGHTNING), ("[transformers]", TRANSFORMERS)])
def test_one_extra_suffices_for_its_adapter(
    extra: str, program: str, archives: tuple[Path, Path], tmp_path: Path
) -> None:
    with installed(tmp_path, archives[0], extra) as environment:
        environment.run_text(program)
        environment.run("python", "-m", "pip", "check")


def test_all_extras_run_both_adapters_and_the_demo(whole: Environment) -> None:
    for program in (LIGHTNING, TRANSFORMERS, DEMO):
        whole.run_text(program)
    whole.run("python", "-m", "pip", "check")


@pytest.mark.parametrize("name", ["minimal", "whole"])
def test_import_adds_less_than_0_3_seconds_to_torch(name: str, request: pytest.FixtureRequest) -> None:
    environment = request.getfixturevalue(name)

    def seconds(modules: str) -> float:
        """Return CPU time, which does not depend on other processes; importing runs on one core."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment.run("python", "-c", f"import {modules}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    seconds("torch, attnmonitor")  # compiles
    added = statistics.median(seconds("torch, attnmonitor") - seconds("torch") for _ in range(5))
    print(f"{name}: import attnmonitor adds {added:.2f} s")
    assert added < 0.3


def test_types_are_visible_to_an_outside_script(minimal: Environment) -> None:
    script = minimal.folder / "typed.py"
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ".mypy", "--python-executable", minimal.python]

    def complaints(text: str) -> str:
        script.write_text(text)
        return subprocess.run(
            [*mypy, script], cwd=minimal.folder, capture_output=True, text=True, timeout=600, check=False
        ).stdout

    assert complaints(TYPED).startswith("Success")
    assert 'incompatible type "str"; expected "int"' in complaints(TYPED.replace("on_step(3)", "on_step('three')"))
