"""Calibrated quantization of linear layers, and the checkpoints it is stored in."""
