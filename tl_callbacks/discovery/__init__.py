"""Reads a model's layers, bottom to top."""

from tl_callbacks.discovery.layers import group_layers

__all__ = ["group_layers"]
