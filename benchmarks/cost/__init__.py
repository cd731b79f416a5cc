"""What a measurement costs, as ratios within one run."""
