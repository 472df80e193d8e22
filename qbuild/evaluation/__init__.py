"""How far a quantized model is from its source, measured on text by a forward pass with one layer in memory.

What is kept of the source is what its last layer gives (``run.states``), not its logits: exact, and as many times
smaller as the vocabulary is larger than the model is wide. Its head gives the same logits again, a few rows at a time.

torch is imported by ``readers``, ``measure`` and ``run``, which a worker loads; the plan needs ``footprint``.
"""
