"""How well the alerts detect faults, what a measurement costs, and the pages in docs/ that commands write."""
