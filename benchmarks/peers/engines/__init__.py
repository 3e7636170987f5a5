"""One adapter per engine, run as a module inside that engine's environment; see `benchmarks.peers.session`."""
