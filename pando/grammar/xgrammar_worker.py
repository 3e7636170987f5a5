"""The process in which xgrammar compiles: its compiler can neither be interrupted nor bounded from inside.

Speaks lines of JSON on standard input and output. First line in: {"tokens": [base64], "vocab_size", "stop_ids",
"memory_bytes"}; then one job a line: {"kind", "source", "separators"} answered by {"grammar"} or {"error"}.
"""

from __future__ import annotations

import base64
import json
import resource
import sys
from typing import Any

import xgrammar


def compile_job(compiler: Any, job: dict[str, Any]) -> dict[str, str]:
    """Compile one source; what went wrong is an answer, too."""
    kind, source = job["kind"], job["source"]
    try:
        if kind == "json_schema":
            form = {"any_whitespace": False, "separators": tuple(job["separators"])}
            if job["separators"][0] is None:
                form = {"any_whitespace": True, "max_whitespace_cnt": job["max_whitespace"]}
            grammar = compiler.compile_json_schema(source, strict_mode=False, **form)
        elif kind == "regex":
            grammar = compiler.compile_regex(source)
        elif kind == "ebnf":
            grammar = compiler.compile_grammar(source)
        elif kind == "lark":
            grammar = compiler.compile_lark(source)
        else:
            grammar = compiler.compile_structural_tag(source)
        return {"grammar": grammar.serialize_json()}
    except (RuntimeError, ValueError, TypeError) as error:
        return {"error": str(error)[:2000]}


def main() -> None:
    """Serve jobs until standard input ends."""
    head = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (head["memory_bytes"], head["memory_bytes"]))
    tokens = [base64.b64decode(token) for token in head["tokens"]]
    info = xgrammar.TokenizerInfo(
        tokens, xgrammar.VocabType.RAW, vocab_size=head["vocab_size"], stop_token_ids=head["stop_ids"]
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(compile_job(compiler, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
