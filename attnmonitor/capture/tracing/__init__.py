"""Hand-written attention: a product of queries and keys, followed to its softmax and its values.

``products.py`` reads any matmul, bmm or einsum as queries times keys; ``repeats.py`` finds the keys before they were
repeated per query head; ``tracer.py`` observes the operations on a product, ``trace.py`` holds them for a replay.
"""
