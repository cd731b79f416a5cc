from __future__ import annotations

import csv
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TEXT, save_llama, save_tokenizer
from models import TinyGPT, token_batch, train
from safetensors.torch import load_file, save_file

import attnmonitor
from attnmonitor import DEFAULT_METRICS, WEIGHT_METRICS
from attnmonitor.alerts import DEFAULT_RULES, replay, replay_text, save_rules
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.cli import main
from attnmonitor.record import RunRecord
from attnmonitor.scan import scan


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a run, the middle one first by name."""
    folder = tmp_path_factory.mktemp("models") / "run"
    for seed, step in enumerate((5, 40, 200)):
        save_llama(folder / f"checkpoint-{step}", seed=seed)
        save_tokenizer(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def checkpoint(run_folder: Path) -> Path:
    return run_folder / "checkpoint-40"


@pytest.fixture(scope="module")
def text(run_folder: Path) -> Path:
    file = run_folder.parent / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def command(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# scan


def test_scan_prints_layer_table_and_published_values(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("scan", checkpoint, "--text", text, "--length", 32) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].endswith("2 × 4 query / 2 KV heads of size 8; 4 sequences of 32 tokens")
    assert sum(line.startswith("layers.0") for line in lines) == 1
    assert lines[-1].startswith("r90 of the energy field")
    assert "published" not in lines[-1], "the papers' figures are of heads of size 64 and 128"


@pytest.mark.parametrize("without", [[], ["rich.console"]])
def test_terminal_shows_progress_with_and_without_rich(
    without: list[str], checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    for module in without:
        monkeypatch.setitem(sys.modules, module, None)
    assert command("scan", checkpoint, "--text", text, "--length", 32) == 0
    assert "measuring checkpoint-40" in terminal.getvalue()


def test_scan_json_on_stdout_is_only_json(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("scan", checkpoint, "--text", text, "--length", 32, "--batch", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == scan(checkpoint, text=TEXT, length=32, batch=2).to_json()
    assert found["summary"]["energy_effective_rank"].keys() == {"min", "median", "max"}


def test_scan_writes_json_and_csv_files_that_agree(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    metrics = ["key_rank", "energy_rms"]
    files = ["--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv"]
    assert command("scan", checkpoint, "--text", text, "--length", 32, *files, "--metrics", *metrics) == 0
    assert files_in(tmp_path) == ["out.csv", "out.json"]
    layers = json.loads((tmp_path / "out.json").read_text())["layers"]
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (4 + 2)
    for row in rows:
        [layer] = [layer for layer in layers if layer["name"] == row["layer"]]
        assert float(row["value"]) == layer[row["metric"]][int(row["head"])]


def test_lengths_give_a_row_each_and_load_model_once(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    loaded = []
    load = LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    assert command("scan", checkpoint, "--text", text, "--length", "16,32,64") == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[2] for row in rows[1:]] == ["16", "32", "64"]
    assert len(loaded) == 1


def test_folder_of_checkpoints_gives_ordered_rows_and_plot(
    run_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, table = tmp_path / "plot.png", tmp_path / "all.json"
    assert command("scan", run_folder, "--text", text, "--length", 16, "--plot", plot, "--json", table) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0].rsplit("-")[-1] for row in rows[1:4]] == ["5", "40", "200"]
    assert [Path(found["model"]).name for found in json.loads(table.read_text())] == [
        "checkpoint-5",
        "checkpoint-40",
        "checkpoint-200",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert files_in(tmp_path) == ["all.json", "plot.png"]


def test_trainer_run_is_audited_checkpoint_by_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Trainer, TrainingArguments

    run, out = tmp_path / "run", tmp_path / "out.json"
    tokenizer = save_tokenizer(run)
    tokens = tokenizer(TEXT)["input_ids"]
    data = [{"input_ids": tokens[at : at + 16], "labels": tokens[at : at + 16]} for at in range(0, 320, 16)]
    settings = TrainingArguments(
        str(run), max_steps=7, save_steps=3, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(save_llama(tmp_path / "start"), settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    capsys.readouterr()
    arguments = ["--text", text, "--length", 16, "--metrics", "energy_rms", "--json", out, "--plot", tmp_path / "a.png"]
    assert command("scan", run, *arguments) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:5]] == [
        *(str(run / f"checkpoint-{step}") for step in (3, 6, 7)),
        str(run),
    ]
    medians = [found["summary"]["energy_rms"]["median"] for found in json.loads(out.read_text())]
    # One bar per checkpoint between the lowest and the highest; the last checkpoint is the final model.
    name, bars, course = rows[5].split(maxsplit=2)
    assert (name, len(bars), bars[2]) == ("energy_rms", 4, bars[3])
    assert bars[medians.index(min(medians))] == "▁"
    assert bars[medians.index(max(medians))] == "█"
    assert course == f"median {medians[0]:.3g} → {medians[-1]:.3g}"
    assert medians[2] == medians[3]


def test_models_of_different_shape_have_no_course(
    run_folder: Path, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run_folder.parent / "other"
    save_llama(other, num_hidden_layers=1)
    save_tokenizer(other)
    shown = ["--text", text, "--length", 16, "--metrics", "energy_rms"]
    assert command("scan", checkpoint, other, *shown) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert command("scan", checkpoint, other, *shown, "--plot", "out.png") == 2
    assert "the models do not have the same layers" in capsys.readouterr().err


def test_metric_without_values_leaves_its_column_empty(
    run_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import attnmonitor.measurement.weights

    nothing = lambda model, forward, layers: dict.fromkeys(layers, "no weights were seen")  # noqa: E731
    monkeypatch.setattr(attnmonitor.measurement.weights, "discover_projections", nothing)
    assert command("scan", run_folder, "--text", text, "--length", 16) == 0
    out, err = capsys.readouterr()
    assert [row.split().count("–") for row in out.splitlines()[1:4]] == [2, 2, 2]
    assert "spectral_gap  ···  median nan → nan" in out
    assert "has no learned rank: no weights were seen" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "./nowhere"], "'./nowhere' is neither a folder"),
        (["scan", "MODEL", "--text", "nowhere.txt"], "nowhere.txt"),
        (["scan", "MODEL", "--text", "TEXT", "--length", "9999"], "length=9999 is more than the 128 positions"),
        (["scan", "MODEL", "--text", "SHORT", "--length", "64"], "the text is 5 tokens long"),
        (["scan", "MODEL", "--metrics", "rank"], "unknown metric 'rank'"),
        (["scan", "MODEL", "--json", "nowhere/out.json"], "nowhere/out.json: there is no folder"),
        (["scan", "MODEL", "--plot", "out.png"], "draws several models"),
        (["scan", "MODEL", "--text", "TEXT", "--length", "16", "--device", "nodevice"], "nodevice"),
        (["report", "nowhere.sqlite"], "nowhere.sqlite"),
        (["replay", "nowhere.sqlite"], "nowhere.sqlite"),
        (["replay", "RECORD", "--rules", "SHORT"], "not JSON"),
        (["report", "SHORT.sqlite"], "SHORT.sqlite"),
    ],
)
def test_bad_input_gives_message_and_code_2_but_no_file(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("SHORT", "SHORT.sqlite"):
        (tmp_path / name).write_text("short", encoding="utf-8")
    with attach_to_tiny(record=tmp_path / "RECORD.sqlite") as monitor:
        monitor.sample(0)
    capsys.readouterr()
    before = files_in(tmp_path)
    stand_in = {"MODEL": checkpoint, "TEXT": text, "RECORD": tmp_path / "RECORD.sqlite"}
    output = [] if "--json" in arguments or arguments[0] != "scan" else ["--json", "out.json"]
    assert command(*(stand_in.get(argument, argument) for argument in arguments), *output) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"attnmonitor {arguments[0]}: error: ")
    assert message in err
    assert "Traceback" not in err
    assert files_in(tmp_path) == before


def test_existing_file_survives_a_failing_scan(checkpoint: Path, tmp_path: Path) -> None:
    old = tmp_path / "out.json"
    old.write_text("old", encoding="utf-8")
    assert command("scan", checkpoint, "--length", 9999, "--json", old) == 2
    assert old.read_text(encoding="utf-8") == "old"
    assert files_in(tmp_path) == ["out.json"]


def test_unmeasured_layer_is_named_and_others_reported(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.models.llama import modeling_llama

    genuine = modeling_llama.LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 0:
            self.config._attn_implementation = "eager"
            with monkeypatch.context() as patched:
                # Attention without a softmax: nothing can follow it.
                patched.setattr(torch.nn.functional, "softmax", lambda x, **_: x.exp() / x.exp().sum(-1, keepdim=True))
                return genuine(self, *args, **kwargs)
        self.config._attn_implementation = "sdpa"
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    assert command("scan", checkpoint, "--text", text, "--length", 16, "--json") == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [layer["name"] for layer in found["layers"]] == ["model.layers.1.self_attn"]
    assert list(found["not_measured"]) == ["model.layers.0.self_attn"]
    assert "model.layers.0.self_attn is not measured: " in err


def test_checkpoint_without_projections_exits_with_2(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_llama(tmp_path)
    save_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    arguments = ["scan", tmp_path, "--text", text, "--length", 16, "--metrics", "energy_rms", "--json"]
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert command(*arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["notes"] == ["'_orig_mod.' was stripped from its tensors' names"]
    assert "'_orig_mod.' was stripped" in err
    rest = {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    for told in (err, json.loads(out)["error"]):
        assert "model.layers.0.self_attn.q_proj.weight (missing)" in told


# report and replay


def attach_to_tiny(**settings: Any) -> Any:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return attach(model, optimizer, token_batch(), every_n_steps=1, **settings)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, optimizer, token_batch(), every_n_steps=1, record=tmp_path / "run.sqlite"):
        train(model, optimizer, 3)
    return tmp_path / "run.sqlite"


def test_report_writes_one_page_beside_record_or_at_out(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", record) == 0
    assert capsys.readouterr().out.strip() == str(record.with_suffix(".html"))
    page = record.with_suffix(".html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html")
    assert command("report", record, "--compare", record, "--out", record.with_name("two.html")) == 0
    assert sorted(path.name for path in record.parent.glob("*.html")) == ["run.html", "two.html"]


def test_replay_prints_events_of_other_rules(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from attnmonitor.alerts import Rule, Threshold

    loud = Threshold("query_rms", signal="value", fire_above=-20.0, clear_below=-21.0)
    rules = [Rule("anything", "test", "query_head", loud, patience=1, grace=0)]
    save_rules(rules, tmp_path / "rules.json")
    assert command("replay", record, "--rules", tmp_path / "rules.json") == 0
    out = capsys.readouterr().out
    assert out.strip() == replay_text(replay(RunRecord.open(record), rules))
    assert len(out.splitlines()) == 2 * 4
    assert command("replay", record) == 0
    assert capsys.readouterr().out.strip() == replay_text(replay(RunRecord.open(record), DEFAULT_RULES))


# The program


def test_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import attnmonitor.cli.demo as demo

    runs = []
    monkeypatch.setattr(demo, "run", lambda out, num_steps: runs.append((out, num_steps)))
    monkeypatch.setattr(demo, "write_pages", lambda *_: None)
    assert command("demo", "--out", "somewhere", "--steps", 7) == 0
    assert runs == [(Path("somewhere"), 7)]


def test_missing_extra_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "attnmonitor.cli.demo", None)
    assert command("demo") == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'attnmonitor[all]'")


def test_the_module_runs_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["attnmonitor", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("attnmonitor", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"attnmonitor {attnmonitor.__version__}"


def test_a_missing_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_default_metrics_are_all_in_the_json(checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("scan", checkpoint, "--text", text, "--length", 8, "--batch", 1, "--json") == 0
    layer = json.loads(capsys.readouterr().out)["layers"][0]
    assert set(layer) == {"name", *DEFAULT_METRICS, *WEIGHT_METRICS}
