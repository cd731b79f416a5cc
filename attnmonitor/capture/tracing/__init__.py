"""Hand-written attention: products of queries and keys, followed to their softmax."""
