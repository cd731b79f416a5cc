"""One short session on a GPU: correctness first, then what a sample costs there."""
