"""Pieces of a decoder over an explicit op table: norms, rotary tables, attention, MLP and mixture of experts."""
