"""Calibration: what a model's linears are fed, measured once on a text and kept for every format that asks.

torch and transformers are imported by ``weights``, ``forward``, ``statistics`` and ``run`` only, which a worker loads;
the plan needs ``families`` and ``shapes``.
"""
