"""The cost of a measurement, as ratios within one run."""
