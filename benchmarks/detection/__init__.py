"""How well the alerts find faulty heads: `python -m benchmarks.detection` records runs, scores and writes tables."""
