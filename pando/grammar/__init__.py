"""What an output must match: JSON schemas, regular expressions, grammars and tool calls as masks over tokens.

`protocols` is the contract; `guidance` the default backend, `xgrammar_backend` an extra. `preflight` prepares JSON
schemas, `tools` compiles tool calls, `wrappers` composes states, `manager` compiles beside the engine and caches.
"""
