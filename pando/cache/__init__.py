"""The unified prefix cache: one radix tree, components per kind of state, one budget. Only pool.py imports torch."""
