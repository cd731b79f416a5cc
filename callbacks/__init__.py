"""Adapters to training frameworks, one module each; import the one you use."""
