"""Aspen: the small language model that ships with Pando, and everything needed to train it again."""
