"""Processes and threads: which rank holds which heads, collectives, process-wide settings."""
