"""When to sample, and what becomes of a sample."""

from attnmonitor.monitor.monitor import AttentionMonitor

__all__ = ["AttentionMonitor"]
