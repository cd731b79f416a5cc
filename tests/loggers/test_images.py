"""Heatmaps in loggers that take images, and the summary printed at the end of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from matplotlib.image import imread
from models import TinyGPT, token_batch, train
from synthetic_runs import SyntheticRun

from attnmonitor import METRICS, AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.loggers import MetricsLogger
from attnmonitor.monitor.final_report import print_final_report


def watched(logger: Any, num_steps: int = 4, **settings: Any) -> AttentionMonitor:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    settings = {"record": None, "strict": True, "metrics": ["energy_rms", "key_rank"], **settings}
    monitor = attach(model, optimizer, token_batch(), every_n_steps=2, loggers=logger, **settings)
    train(model, optimizer, num_steps)
    monitor.close()
    return monitor


@pytest.fixture
def mlflow_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MLFlowLogger:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return MLFlowLogger(tracking_uri=(tmp_path / "runs").as_uri())


def test_mlflow_gets_scalars_and_first_and_last_heatmap(mlflow_logger: MLFlowLogger, tmp_path: Path) -> None:
    monitor = watched(MetricsLogger(mlflow_logger, image_share=1e-9))
    mlflow_logger.finalize("success")
    client, run_id = mlflow_logger.experiment, mlflow_logger.run_id
    values = monitor.history["energy_rms"]["blocks.1.attn"][:, 3].tolist()
    logged = client.get_metric_history(run_id, "attention/energy_rms/layer_01/head_03")
    assert [(point.step, point.value) for point in logged] == list(zip([0, 2, 4], values, strict=True))
    for metric in monitor.history:
        # What stands between the parts of a name is MLflow's: `~` and `+`, in 2.20 `#` and `%`.
        pictures = sorted(tmp_path.glob(f"runs/*/{run_id}/artifacts/images/attention?{metric}?heatmap*.png"))
        assert [re.findall(r"step\W(\d+)", picture.name) for picture in pictures] == [["0"], ["4"]]
        assert all(imread(picture).shape[1] > 300 for picture in pictures)


def test_mlflow_requests_are_split(mlflow_logger: MLFlowLogger) -> None:
    sample = next(SyntheticRun(12, 12, 1).samples())
    MetricsLogger(mlflow_logger, image_share=0).log_sample(sample)
    logged = mlflow_logger.experiment.get_run(mlflow_logger.run_id).data.metrics
    heads = {key: value for key, value in logged.items() if re.search(r"/head_\d+$", key)}
    assert len(heads) == 144 * sum(METRICS[metric].head_curves for metric in sample.values)
    assert heads["attention/key_rms/layer_11/head_11"] == float(
        sample.values["key_rms"]["model.layers.11.self_attn"][11]
    )


@pytest.mark.parametrize("image_share", [0, 0.002])
def test_scalar_loggers_get_no_image(image_share: float, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    watched(MetricsLogger(logger, image_share=image_share))
    logger.save()
    assert "heatmap" not in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_summary_has_verdict_cost_and_record_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = watched([], record=tmp_path / "run.sqlite")
    print_final_report(monitor)
    printed = capsys.readouterr().out
    assert monitor.last_sample is not None
    words = f"attnmonitor: {monitor.last_sample.verdict}".split()
    assert printed.split()[: len(words)] == words
    assert "blocks.1" in printed
    assert f"attnmonitor report {tmp_path / 'run.sqlite'}" in printed
    assert f"watching took {monitor.seconds:.1f} s" in printed


def test_summary_without_samples_or_console(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyGPT()
    with AttentionMonitor(model, token_batch(), record=None) as monitor:
        print_final_report(monitor)
        assert capsys.readouterr().out == ""
        monitor.sample(0)

    def raise_closed(*_: object) -> None:
        raise BrokenPipeError("nobody listens")

    monkeypatch.setattr("builtins.print", raise_closed)
    with pytest.warns(UserWarning, match="could not be printed: nobody listens"):
        print_final_report(monitor)
