"""No code from a file is run, and only the logger that the user chose sends data."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_llama, save_tokenizer
from models import TinyGPT, token_batch
from torch import nn

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import load_rules
from attnmonitor.loggers import WandbLogger
from attnmonitor.record import RecordError, RunRecord
from attnmonitor.scan import scan

# Python's audit events report every class that a pickle looks up and every address that is looked up or connected to.
# An audit hook cannot be removed, hence a separate process.
EVERYTHING_A_USER_DOES = """
import sys, tempfile
from pathlib import Path
import torch, transformers
from torch.utils.data import DataLoader

seen = []
watched = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
sys.addaudithook(lambda event, args: seen.append((event, str(args)[:200])) if event in watched else None)

sys.path.insert(0, {tests!r})
from checkpoints import save_llama, save_tokenizer
from models import TinyGPT, token_batch, train
from attnmonitor.alerts import DEFAULT_RULES, load_rules, replay, save_rules
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.record import RunRecord
from attnmonitor.report import write_report
from attnmonitor.scan import scan

folder = Path(tempfile.mkdtemp())
model = TinyGPT()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with attach(model, optimizer, DataLoader(token_batch(), batch_size=2), every_n_steps=1, record=folder / "run.sqlite"):
    train(model, optimizer, 3)
record = RunRecord.open(folder / "run.sqlite")
record.trajectories("key_incoherence")
write_report(folder / "run.sqlite")
save_rules(DEFAULT_RULES, folder / "rules.json")
replay(record, load_rules(folder / "rules.json"))
save_llama(folder / "model"), save_tokenizer(folder / "model")
scan(folder / "model", length=32, batch=2)
assert not seen, seen

import pickle, socket
pickle.loads(pickle.dumps(Path))
try:
    socket.create_connection(("127.0.0.1", 9), timeout=0.1)
except OSError:
    pass
assert {{event for event, _ in seen}} >= {{"pickle.find_class", "socket.connect"}}, seen
print("finished")
"""


def test_no_unpickling_and_no_network(tmp_path: Path) -> None:
    program = EVERYTHING_A_USER_DOES.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.stdout.endswith("finished\n"), done.stderr[-3000:]


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_pickle_in_place_of_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    trap, mark = tmp_path / "run.sqlite", tmp_path / "it ran"
    trap.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(RecordError, match="not a database"):
        RunRecord.open(trap)
    with pytest.raises(ValueError, match=re.escape(f"rules file {trap}: not JSON")):
        load_rules(trap)
    torch.save({"state": Trap(mark)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "state.pt", weights_only=True)
    assert not mark.exists()
    pickle.loads(trap.read_bytes())
    assert mark.exists()


def test_scan_runs_a_checkpoints_code_only_when_asked(tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "it ran"
    save_llama(folder)
    save_tokenizer(folder)
    code = f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

Path({str(mark)!r}).touch()
"""
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "OwnConfig", "AutoModel": "OwnModel", "AutoModelForCausalLM": "OwnModel"}
    config |= {"model_type": "own", "auto_map": {auto: f"modeling_own.{name}" for auto, name in classes.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        scan(folder, length=32, batch=2)
    assert not mark.exists()
    assert scan(folder, length=32, batch=2, trust_remote_code=True).values["energy_rms"]
    assert mark.exists()


def test_no_name_of_the_model_becomes_part_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.chdir(tmp_path)
    hostile = "../../<script>alert(1)</script>\n{{}}"
    model = nn.Module()
    model._modules[hostile] = TinyGPT()
    logged: set[str] = set()
    with wandb.init(mode="offline", project="p", dir=tmp_path) as run:
        log = run.log
        monkeypatch.setattr(run, "log", lambda row, **settings: logged.update(row) or log(row, **settings))
        monitor = AttentionMonitor(
            model,
            token_batch(),
            record=tmp_path / "run.sqlite",
            loggers=WandbLogger(run),
            forward=lambda model, batch: model._modules[hostile](batch),
        )
        monitor.sample(0)
        monitor.close()
    assert len(logged) > 90
    assert all(re.fullmatch(r"attention(/[a-z0-9_]+)+", key) for key in logged)
    assert next(iter(RunRecord.open(tmp_path / "run.sqlite").trajectories("energy_rms"))).startswith(hostile)
