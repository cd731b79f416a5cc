"""torchmetrics classes."""
