"""Processes and threads: sharded models, collectives, process-global settings, work divided among CPU cores."""
