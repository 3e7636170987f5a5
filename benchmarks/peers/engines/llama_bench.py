"""llama.cpp's own llama-bench: prefill and decode of one stream without any server or Python around them."""

from __future__ import annotations

import json
import os
import subprocess

import llama_cpp

from benchmarks.peers.session import Figures, Settings, Work, serve


class LlamaBench:
    """A process per sample; it warms itself up, and its own clock gives the figures."""

    def __init__(self, settings: Settings) -> None:
        self.version = llama_cpp.__version__
        self.first_tokens: list[int] = []
        self.settings = settings

    def sample(self, work: Work) -> Figures:
        """One prompt: its prefill, and its decode if more than one token is wanted. Others are not what it does."""
        prompt = len(work.prompts[0])
        prefill = self._seconds("-p", prompt, "-n", 0) if work.num_tokens == 1 else 0.0
        decoded = work.num_tokens - 1
        decode = self._seconds("-p", 0, "-n", decoded, "-d", prompt) if decoded else 0.0
        return {
            "seconds": prefill + decode,
            "output_tokens": work.num_tokens,
            "first_seconds": prefill,
            "decode_tokens": decoded,
            "decode_seconds": decode,
        }

    def _seconds(self, *options: str | int) -> float:
        threads = self.settings.threads
        command = [os.environ["LLAMA_BENCH"], "-m", self.settings.model, "-t", threads, "-r", 1, "-o", "json", *options]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout)[0]["avg_ns"]) / 1e9


if __name__ == "__main__":
    serve(LlamaBench)
