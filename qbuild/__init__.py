"""qbuild: make for quantized language models. Importing it does nothing."""

__version__ = "0.1.0"
