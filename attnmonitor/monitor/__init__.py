"""When to sample, and where samples go."""

from attnmonitor.monitor.monitor import AttentionMonitor

__all__ = ["AttentionMonitor"]
