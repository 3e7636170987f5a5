"""Tiny random checkpoints of every supported family, and what transformers says they generate.

A tiny model with transformers' own initialisation repeats one token and forgives almost any bug. So every parameter is
drawn anew (noise on norms, biases, sinks and router corrections; matrices with std about 1.2 / sqrt(fan in)), and the
embedding's std and the matrices' gain are scanned until greedy decoding is varied and depends on its context. What was
reached is kept beside the checkpoint in `oracle/report.json` (see `Report`).

Checkpoints and oracle answers are kept in a temporary folder whose name depends on this file, the recipes and the
version of transformers; a second run does not import transformers at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny_recipes
from tests.tiny_recipes import ALL_RECIPES as ALL_RECIPES
from tests.tiny_recipes import COMMON, VOCAB, Recipe
from tests.tiny_recipes import EXTRA_FAMILIES as EXTRA_FAMILIES
from tests.tiny_recipes import FAMILIES as FAMILIES
from tests.tiny_recipes import HYBRID_FAMILIES as HYBRID_FAMILIES
from tests.tiny_recipes import LLAMA3_ROPE as LLAMA3_ROPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 16
FINAL_NORMS = ("model.norm.weight", "language_model.norm.weight")
TIE = 1e-4
"""A token other than the oracle's is accepted if its logit is within this of the best one."""


@dataclass(frozen=True)
class Report:
    """How discriminating a checkpoint is, on one probe prompt of 24 tokens and 16 greedy ones.

    distinct: different tokens among them. min_gap: smallest distance between best and second logit. context_effect:
    change of the last logits, in units of their spread, when the fourth-last prompt token changes.
    """

    embedding_std: float
    gain: float
    distinct: int
    min_gap: float
    context_effect: float

    @property
    def good(self) -> bool:
        """Whether most bugs would show."""
        return self.distinct >= 10 and self.min_gap > 2e-3 and self.context_effect > 0.25


def cache_root() -> Path:
    """Folder of checkpoints and answers; `PANDO_TINY_MODELS` overrides it."""
    if given := os.environ.get("PANDO_TINY_MODELS"):
        return Path(given)
    files = (Path(__file__), Path(tiny_recipes.__file__))
    source = b"".join(file.read_bytes() for file in files) + importlib.metadata.version("transformers").encode()
    return Path(tempfile.gettempdir()) / f"pando-tiny-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:12]}"


def tiny_checkpoint(family: str, tmp_root: Path | None = None) -> Path:
    """Folder of the family's checkpoint (config, safetensors, a byte-level tokenizer), built on first use."""
    folder = (tmp_root or cache_root()) / family
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its place and moved there in one step: test processes may build at the same time.
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            _build(family, Path(scratch))
            # Another process may have been first; its checkpoint is the same.
            with contextlib.suppress(OSError):
                os.rename(scratch, folder)
    return folder


def report(family: str) -> Report:
    """What the scan reached for the family's checkpoint."""
    return Report(**json.loads((tiny_checkpoint(family) / "oracle" / "report.json").read_text()))


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    """A random prompt; the same for the same arguments."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def hf_greedy(path: Path, prompt: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """`n` greedy tokens of transformers' cached float32 decode, and their log-probabilities."""
    file = _answer(path, "greedy", prompt, ".json")
    if file.is_file():
        stored = json.loads(file.read_text())
        if len(stored["tokens"]) >= n:
            return stored["tokens"][:n], stored["logprobs"][:n]
    tokens, logprobs = _generate(hf_model(path), prompt, n)[:2]
    _write(file, json.dumps({"tokens": tokens, "logprobs": logprobs}))
    return tokens, logprobs


def hf_logits(path: Path, ids: Sequence[int]) -> Tensor:
    """Float32 logits [T, V] of transformers at every position of `ids`."""
    file = _answer(path, "logits", ids, ".safetensors")
    if not file.is_file():
        with torch.inference_mode():
            logits = hf_model(path)(torch.tensor([list(ids)])).logits[0].float().contiguous()
        scratch = file.with_suffix(f".{os.getpid()}")
        file.parent.mkdir(exist_ok=True)
        save_file({"logits": logits}, scratch)
        os.replace(scratch, file)
    return load_file(file)["logits"]


def assert_greedy(
    path: Path, prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float] | None = None
) -> None:
    """Fail unless `tokens` are what transformers generates, up to ties, with log-probabilities within 1e-3."""
    expected, expected_logprobs = hf_greedy(path, prompt, len(tokens))
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(tokens))
    if same < len(tokens):
        logits = hf_logits(path, [*prompt, *tokens])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
        gap = float((logits.max(dim=1).values - chosen).max())
        assert gap < TIE, f"{path.name}: {list(tokens)} != {expected} from token {same} on (gap {gap:.2g})"
    if logprobs is not None:
        error = max((abs(a - b) for a, b in zip(logprobs[:same], expected_logprobs[:same], strict=True)), default=0.0)
        assert error < 1e-3, f"{path.name}: log-probabilities are off by {error:.2g}"


@functools.lru_cache(maxsize=4)
def hf_model(path: Path) -> PreTrainedModel:
    """transformers' model of a checkpoint, float32, with the attention that knows soft-caps and sinks."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    auto_class = _auto_class(AutoConfig.from_pretrained(path))
    return auto_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def _auto_class(config: Any) -> Any:
    import transformers

    multimodal = hasattr(config, "text_config")
    return transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM


def _answer(path: Path, kind: str, ids: Sequence[int], suffix: str) -> Path:
    key = hashlib.sha256(json.dumps([int(i) for i in ids]).encode()).hexdigest()[:16]
    return path / "oracle" / f"{kind}-{key}{suffix}"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, file)


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: Sequence[int], n: int) -> tuple[list[int], list[float], float]:
    """Greedy tokens, their log-probabilities, and the smallest gap between best and second logit."""
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :]
    logits = torch.cat(out.logits).float()
    best = logits.topk(2).values
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.tolist(), float((best[:, 0] - best[:, 1]).min())


def _build(family: str, folder: Path) -> None:
    """Write config, weights, tokenizer and report of a family into `folder`."""

    recipe = ALL_RECIPES[family]
    config = _config(recipe, {**COMMON, **recipe.values})
    config._attn_implementation = "eager"
    model = _auto_class(config).from_config(config).eval()
    initial = {name: p.detach().clone() for name, p in _parameters(model).items()}
    best: Report | None = None
    for std, gain in itertools.product((1.0, 0.3, 0.1, 0.05, 0.02), (1.0, 1.5, 2.0)):
        _redraw(model, initial, recipe.seed, std, gain)
        found = _probe(model, std, gain)
        if best is None or (found.distinct, found.min_gap) > (best.distinct, best.min_gap):
            best = found
        if found.good:
            break
    assert best is not None
    _redraw(model, initial, recipe.seed, best.embedding_std, best.gain)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    _write(folder / "oracle" / "report.json", json.dumps(asdict(best)))
    _save_tokenizer(folder)


def hf_config_values(family: str) -> dict[str, Any]:
    """What a published config of the family would say; what older ones leave to defaults is left out."""
    values = {**COMMON, **ALL_RECIPES[family].values}
    return {name: value for name, value in values.items() if name != "layer_types"}


def hf_config(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """The config transformers makes of `values`, with every default filled in."""
    return _config(ALL_RECIPES[family], values).to_dict()


def _config(recipe: Recipe, values: dict[str, Any]) -> Any:
    import transformers

    if recipe.multimodal is not None:
        values = {"text_config": values, **recipe.multimodal}
    return getattr(transformers, recipe.config)(**values)


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    buffers = {
        name: b for name, b in model.named_buffers() if name.endswith(("e_score_correction_bias", "expert_bias"))
    }
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def _redraw(model: PreTrainedModel, initial: dict[str, Tensor], seed: int, std: float, gain: float) -> None:
    """Draw every parameter anew; vectors keep their initial value as mean (1 for a norm, 0 for Gemma's)."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    for name, parameter in _parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is embedding:
            parameter.copy_(noise * std)
        elif name.endswith(FINAL_NORMS) and model.config.tie_word_embeddings:
            # A small tied embedding (so that a token does not simply predict itself) would make small logits.
            offset = 1.0 - initial[name]
            parameter.copy_((1.0 + noise * 0.3) / (std * parameter.numel() ** 0.5) - offset)
        elif name.endswith("A_log"):
            # A state that lasts about as long as the prompts: one that forgets at once would hide most mistakes.
            parameter.copy_(noise * 0.7 - 2.5)
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            parameter.copy_(noise * 0.5)
        elif parameter.ndim == 1:
            parameter.copy_(initial[name] + noise * 0.3)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.3)
        else:
            # Fused experts are [E, in, out] in gpt-oss, [E, out, in] elsewhere.
            fan_in = parameter.shape[1 if "gpt_oss" in model.config.model_type and parameter.ndim == 3 else -1]
            parameter.copy_(noise * (1.2 * gain / fan_in**0.5))


@torch.inference_mode()
def _probe(model: PreTrainedModel, std: float, gain: float) -> Report:
    prompt = prompt_ids(24)
    tokens, _, min_gap = _generate(model, prompt, PROBE_TOKENS)
    other = [*prompt[:-4], (prompt[-4] + 1) % VOCAB, *prompt[-3:]]
    first, second = (model(torch.tensor([ids])).logits[0, -1] for ids in (prompt, other))
    effect = float((first - second).abs().max() / first.std())
    return Report(std, gain, len(set(tokens)), min_gap, effect)


def _save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: one token per byte, and unused two-byte tokens up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in "abcdefghijkl" for b in "abcdefghijkl"]
    vocab = {token: index for index, token in enumerate([*letters, *pairs[: VOCAB - len(letters)]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "model_max_length": 1024}
    _write(folder / "tokenizer_config.json", json.dumps(settings))
