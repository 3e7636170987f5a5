"""Training recipes for the models that ship with Pando."""
