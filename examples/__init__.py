"""Runs a user would copy, one file each; ``attnmonitor demo`` is `attnmonitor.examples.demo`."""
