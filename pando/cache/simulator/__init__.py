"""Replays traces of requests against the prefix cache, with no tensors behind it."""
