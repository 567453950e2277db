"""Tidegate: serves large language models from Triton behind Envoy and stays useful under overload."""

__version__ = "0.1.0"
