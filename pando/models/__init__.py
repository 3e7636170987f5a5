"""Language models: one declarative decoder, small family adapters, and the checkpoint loader."""
