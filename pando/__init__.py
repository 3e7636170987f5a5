"""Pando: serve large language models; requests that share a prefix share its computation."""

__version__ = "0.1.0"
