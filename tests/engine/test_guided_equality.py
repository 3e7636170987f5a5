"""Jumps and drafts change how many steps run, never which tokens come: three kinds of tokenizer, two kinds of model.

Also at depth 1, where the next step is planned before this one's tokens are known, as on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer

from pando.core.config import Config
from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.engine import EngineCore, build_engine
from pando.scheduler.grammar_gate import GrammarGate
from pando.scheduler.overlap import Overlap
from tests.scheduler.harness import Bench, ListInbox
from tests.tiny_tokenizers import byte_level_rust, sentencepiece_rust

WIDE = 128_256
"""Entries of a large vocabulary."""
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city_name": {"type": "string", "maxLength": 9},
        "country": {"enum": ["France", "Norway", "München"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 2},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city_name", "country", "count", "tags", "is_capital"],
    "additionalProperties": False,
}
SPECS = {
    "schema": GrammarSpec("json_schema", json.dumps(SCHEMA), GrammarOptions(strict=True, whitespace="spaced")),
    "regex": GrammarSpec("regex", r"The (quick|lazy) (fox|dog) [a-z]{1,6}: [0-9]{2}-[0-9]{3}; The end\."),
}
PROMPTS = ['{"city_name": "Paris", "country": "France"}', "The quick fox runs: 12-345; The lazy dog"]


def wide() -> RustTokenizer:
    """The byte-level tokenizer among 128,256 entries that no text of the tests uses."""
    state = json.loads(byte_level_rust().to_str())
    vocabulary, taken = state["model"]["vocab"], {token["id"] for token in state["added_tokens"]}
    free = (number for number in range(WIDE) if number not in taken)
    state["model"]["vocab"] = {}
    used = set(vocabulary.values()) | taken
    for name, number in vocabulary.items():
        state["model"]["vocab"][name] = number
    for number in free:
        if number not in used:
            state["model"]["vocab"][f"zq{number:x}"] = number
    rust: RustTokenizer = RustTokenizer.from_str(json.dumps(state))
    return rust


def folder_of(root: Path, name: str) -> Path:
    """A model's folder without weights."""
    folder = root / name
    folder.mkdir()
    rust, end = {
        "byte level": (byte_level_rust, "<|im_end|>"),
        "sentencepiece": (sentencepiece_rust, "</s>"),
        "128k": (wide, "<|im_end|>"),
    }[name]
    tokenizer = rust()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    size = tokenizer.get_vocab_size(True)
    ends = {"eos_token_id": tokenizer.token_to_id(end), "vocab_size": size}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **ends}))
    return folder


def started(model: str, overlap: bool, **more: object) -> tuple[EngineCore, Bench]:
    inbox = ListInbox()
    settings = {"max_total_tokens": 2048, "packed_cache": "off", "overlap": "on" if overlap else "off", **more}
    core = build_engine(Config(model_path=model, **settings), inbox, lambda load: None)  # type: ignore[arg-type]
    return core, Bench(core.scheduler, core.executor, core.scheduler.admission.cache, inbox)


def ended(core: EngineCore) -> None:
    core.executor.close()


@pytest.fixture(autouse=True)
def quick_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether requests wait must not depend on how long anything takes."""
    monkeypatch.setattr(Overlap, "price", 0.2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outputs(core: EngineCore, bench: Bench, jump: bool, draft: bool, run: str) -> dict[str, list[int]]:
    """Tokens of a batch of guided requests beside a free one."""
    gate = core.scheduler._gates._gates[0]
    assert isinstance(gate, GrammarGate)
    gate._jump, gate._draft = jump, draft
    rids = []
    for number, (name, spec) in enumerate(sorted(SPECS.items())):
        for temperature in (0.0, 1.0):
            for which, prompt in enumerate(PROMPTS):
                rid = f"{run} {name} {temperature} {which}"
                ids = core.tokenizer.encode(prompt)
                bench.add(rid, ids, 150, temperature=temperature, grammar=spec, seed=7 * number + which)
                rids.append(rid)
    bench.add(f"{run} free", [5, 6, 7, 8], 40, ignore_eos=True)
    with torch.inference_mode():
        bench.run()
    for rid in rids:
        assert bench.finish(rid).kind == "stop", rid
        text = core.tokenizer.decode(bench.tokens[rid])
        if " schema " in rid:
            assert list(json.loads(text)) == list(SCHEMA["properties"])  # type: ignore[call-overload]
    bench.cache.check()
    return {rid.removeprefix(run): bench.tokens[rid] for rid in [*rids, f"{run} free"]}


def check(core: EngineCore, bench: Bench) -> None:
    stats, steps, found = core.scheduler.stats, [], []
    for run, (jump, draft) in enumerate(((False, False), (True, False), (True, True))):
        before = stats.steps
        found.append(outputs(core, bench, jump, draft, f"run {run}"))
        steps.append(stats.steps - before)
    assert found[0] == found[1] == found[2]
    assert stats.forced_tokens > 0 and steps[1] <= steps[0]
    assert stats.draft_tokens > 0
    ended(core)


@pytest.mark.parametrize("overlap", [False, True], ids=["depth 0", "depth 1"])
@pytest.mark.parametrize("name", ["byte level", "sentencepiece", "128k"])
def test_same_tokens_on_three_tokenizers(tmp_path: Path, name: str, overlap: bool) -> None:
    folder = folder_of(tmp_path, name)
    core, bench = started(str(folder), overlap, load_format="dummy", dtype="float32")
    assert core.info.vocab_size >= (WIDE if name == "128k" else 300)
    check(core, bench)


@pytest.mark.parametrize("overlap", [False, True], ids=["depth 0", "depth 1"])
def test_same_tokens_of_a_recurrent_model(overlap: bool) -> None:
    """Forced runs extend a recurrent state as a prompt does. After a wrong guess it goes back."""
    core, bench = started("willow", overlap, dtype="float32")
    check(core, bench)
