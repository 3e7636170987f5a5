"""Engine overhead: the share of a decode step that is not spent in the model (forward and logits).

    python benchmarks/overhead.py [--model aspen|FOLDER] [--shape 0.6b] [--batch 1 8 32] [--op-by-op]

The bounds of the project: 5 % on a model of the 0.6 B Qwen3 shape, 35 % on the built-in one. Everything else counts as
overhead: the scheduler, building inputs, sampling, reading tokens, replies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pando.core.config import Config
from pando.core.messages import Generate
from pando.core.sampling import SamplingParams
from pando.engine import EngineCore, build_engine
from pando.models import build
from pando.models.decoder import DecoderModel
from pando.models.load import resolve_model_path
from pando.transport import LocalTransport

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


class Stopwatch:
    """Adds up the time spent in the model."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Any) -> Any:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def dummy_folder() -> Path:
    """A folder with a 0.6 B-shaped config and the built-in tokenizer; its weights are drawn at load."""
    folder = Path(tempfile.mkdtemp(prefix="pando-bench-"))
    ends = json.loads((resolve_model_path("aspen") / "config.json").read_text())["eos_token_id"]
    (folder / "config.json").write_text(json.dumps({**QWEN3_06B, "eos_token_id": ends}))
    for file in resolve_model_path("aspen").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def measure(core: EngineCore, transport: LocalTransport, watch: Stopwatch, batch: int, steps: int) -> None:
    """Print step time, model time and overhead of decoding `batch` sequences of 100 tokens."""
    scheduler = core.scheduler
    sampling = SamplingParams(max_new_tokens=steps + 40, temperature=0, ignore_eos=True)
    for i in range(batch):
        ids = [20 + (7 * i + j) % 200 for j in range(100)]
        transport.send(Generate(rid=f"b{batch}-{i}", input_ids=ids, sampling=sampling, stream=True))
    for _ in range(12):
        scheduler.step()
    totals, overheads = [], []
    for _ in range(steps):
        watch.seconds, started = 0.0, time.perf_counter()
        scheduler.step()
        total = time.perf_counter() - started
        totals.append(total)
        overheads.append(1 - watch.seconds / total)
    while scheduler.num_unfinished:
        scheduler.step()
    step = statistics.median(totals)
    share = statistics.median(overheads)
    print(
        f"batch {batch:3}: step {step * 1e3:7.2f} ms, {batch / step:7.0f} tok/s, overhead {share:6.1%} "
        f"({share * step * 1e6:.0f} us)"
    )


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--shape", choices=["0.6b"], help="random weights of this shape instead of a model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--op-by-op", action="store_true", help="without the program of native instructions")
    args = parser.parse_args()
    if args.op_by_op:
        build.fuse = lambda *_, **__: None  # type: ignore[assignment]
    folder = str(dummy_folder()) if args.shape else args.model
    config = Config(
        model_path=folder,
        load_format="dummy" if args.shape else "auto",
        kernels=args.kernels,
        overlap="off",
        max_total_tokens=65536,
    )
    transport = LocalTransport()
    watch = Stopwatch()
    DecoderModel.forward = watch.wrap(DecoderModel.forward)  # type: ignore[method-assign]
    DecoderModel.logits = watch.wrap(DecoderModel.logits)  # type: ignore[method-assign]
    core = build_engine(config, transport.inbox, lambda load: None)
    print(f"{args.shape or args.model}: {core.info.num_parameters / 1e6:.1f} M, {core.info.dtype}, {core.info.kernels}")
    for batch in args.batch:
        measure(core, transport, watch, batch, args.steps)


if __name__ == "__main__":
    main()
