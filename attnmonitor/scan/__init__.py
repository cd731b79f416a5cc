"""One-shot audit of a checkpoint."""

from attnmonitor.scan.audit import Progress, Scan, audit, audit_all, bundled_text, scan
from attnmonitor.scan.checkpoint import Checkpoint

__all__ = ["Checkpoint", "Progress", "Scan", "audit", "audit_all", "bundled_text", "scan"]
