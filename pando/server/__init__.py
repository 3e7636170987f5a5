"""HTTP: every API dialect on one port, in the process that also makes text of tokens."""
