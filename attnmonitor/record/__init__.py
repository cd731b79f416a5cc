"""A run's trajectories and alerts, on disk and in memory."""

from attnmonitor.record.history import History
from attnmonitor.record.reader import RecordError, RunRecord
from attnmonitor.record.writer import RecordWriter

__all__ = ["History", "RecordError", "RecordWriter", "RunRecord"]
