"""How well alerts find sick heads: `python -m benchmarks.detection` trains, breaks, scores and writes the tables."""
