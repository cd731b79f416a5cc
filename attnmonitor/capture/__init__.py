"""Queries and keys of every attention layer during one forward."""
