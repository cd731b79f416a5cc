"""The trajectories and alerts of a run, on disk (`writer`, `reader`) and in memory (`history`)."""

from attnmonitor.record.history import History
from attnmonitor.record.reader import RunRecord
from attnmonitor.record.schema import RecordError
from attnmonitor.record.writer import RecordWriter

__all__ = ["History", "RecordError", "RecordWriter", "RunRecord"]
