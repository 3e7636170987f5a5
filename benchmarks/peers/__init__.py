"""Pando and other CPU engines on the same models and token ids, in one interleaved run: `python -m benchmarks.peers`.

| module | job |
|---|---|
| `workload` | the test models' shapes, the scenarios, the token ids |
| `machine` | processor time of others, memory of a process tree (also inside the peers: standard library only) |
| `limits` | what this machine can do: read bandwidth, arithmetic peaks; and the bound of a scenario that follows |
| `registry`, `environments` | the engines, and their virtual environments |
| `models`, `convert_gguf`, `convert_openvino` | make the test models in every engine's format |
| `prepare` | has all of these made |
| `session`, `engines/` | inside a peer's environment: one engine loaded, jobs from stdin, samples to stdout |
| `process`, `runner` | start an engine; all engines one after the other, round by round |
| `summary`, `report`, `plot` | medians and spreads; the tables; the plot |
"""
