"""attnmonitor: know what every attention head of a transformer is doing while it trains.

>>> import torch, attnmonitor
>>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
>>> with attnmonitor.AttentionMonitor(layer, torch.randn(2, 12, 16), record=None) as monitor:
...     sample = monitor.sample(global_step=0)
>>> sorted(sample.values)[0]
'attention_tau'
"""

from attnmonitor._version import __version__
from attnmonitor.metrics.catalog import DEFAULT_METRICS, METRICS, OPT_IN_METRICS, WEIGHT_METRICS
from attnmonitor.monitor import AttentionMonitor
from attnmonitor.sample import AlertEvent, HeadEvidence, LayerCoverage, Sample

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "OPT_IN_METRICS",
    "WEIGHT_METRICS",
    "AlertEvent",
    "AttentionMonitor",
    "HeadEvidence",
    "LayerCoverage",
    "Sample",
    "__version__",
]
