"""Starts from packed weights: bitwise the model of the first load, for every family and kind of weight; stale files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pando
from pando.kernels import cpu, op_table
from pando.kernels.packed_cache import PackedCache
from pando.models import load, packed_weights
from pando.models.decoder import DecoderModel
from pando.models.load import load_model
from pando.models.packed_weights import Replay, cache_key, phantoms_in
from tests.models.paged_loop import full_logits
from tests.quant.test_formats import CASES, write
from tests.quant.test_gguf import in_blocks
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, prompt_ids, tiny_checkpoint

if cpu.LOAD_ERROR is not None:
    pytest.skip("no compiled kernels", allow_module_level=True)

OPS = op_table("cpu")
IDS = prompt_ids(24)
FORMATS = ("awq-g32", "gptq-act-order", "gptq-8", "packed-order", "w8a8")


class Starts:
    """Loads of one checkpoint, as if each were in a new process."""

    def __init__(self, path: Path, folder: Path, **options: Any) -> None:
        self.path, self.folder, self.options = path, folder, options

    def load(self, min_bytes: int = 0) -> tuple[DecoderModel, bool]:
        """The model, and whether it came from packed weights."""
        cache = PackedCache(self.folder, min_bytes=min_bytes)
        model = load_model(self.path, ops=OPS, packed=cache, **self.options)
        reused = cache._waiting is None
        cache.start_writing(delay=0.0)
        cache.close(wait=True)
        return model, reused

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*"))


def logits(model: DecoderModel) -> Tensor:
    return full_logits(model, OPS, IDS)


def assert_second_start_is_the_first(path: Path, folder: Path, **options: Any) -> None:
    starts = Starts(path, folder, **options)
    first, reused = starts.load()
    assert not reused and [file.suffix for file in starts.files()] == [".panels"]
    second, reused = starts.load()
    assert reused and phantoms_in(second) == 0
    assert torch.equal(logits(second), logits(first))


@pytest.mark.parametrize("family", (*FAMILIES, *EXTRA_FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    assert_second_start_is_the_first(tiny_checkpoint(family), tmp_path / "cache")


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox", "qwen3_moe", "gpt_oss"])
def test_rounded_on_load(family: str, quantization: str, tmp_path: Path) -> None:
    options = {"quantization": quantization, "dtype": "bfloat16"}
    assert_second_start_is_the_first(tiny_checkpoint(family), tmp_path / "cache", **options)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_quantised_checkpoints(family: str, name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    folder, _ = write(tmp_path, family, case.writer, case.settings, case.make)
    assert_second_start_is_the_first(folder, tmp_path / "cache")


def test_one_plain_part_of_a_fused_projection(tmp_path: Path) -> None:
    case = CASES[0]
    folder, plain = write(tmp_path, "llama", case.writer, case.settings, case.make, keep="no module")
    tensors, exact = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    module = "model.layers.1.self_attn.k_proj"
    for suffix in (".qweight", ".qzeros", ".scales"):
        del tensors[module + suffix]
    save_file({**tensors, module + ".weight": exact[module + ".weight"]}, folder / "model.safetensors")
    assert_second_start_is_the_first(folder, tmp_path / "cache")


def test_gguf_with_a_tied_head_in_blocks(tmp_path: Path) -> None:
    path = in_blocks(tmp_path, {"": "Q4_0", "attn_q": "Q8_0", "ffn_gate": "Q4_K"}, "llama", "Q6_K")
    assert_second_start_is_the_first(path, tmp_path / "cache")


def test_rounding_while_packing_changes_nothing(tmp_path: Path) -> None:
    """Native tables round while they pack; a table that does not say so gets weights rounded before."""
    path = tiny_checkpoint("qwen3")
    for quantization in ("int8", "w8a8", "int4"):
        eager = load_model(path, ops=dataclasses.replace(OPS, rounds=False), quantization=quantization)
        assert torch.equal(logits(load_model(path, ops=OPS, quantization=quantization)), logits(eager))


# -- keys


def copy_of(family: str, folder: Path) -> Path:
    shutil.copytree(tiny_checkpoint(family), folder, ignore=shutil.ignore_patterns("oracle"))
    return folder


def test_other_options_have_files_of_their_own(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3")
    for count, options in enumerate(({}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "w8a8"})):
        starts = Starts(path, tmp_path / "cache", **options)
        assert not starts.load()[1] and len(starts.files()) == count + 1
        assert starts.load()[1] and len(starts.files()) == count + 1


def test_a_changed_checkpoint_is_packed_anew(tmp_path: Path) -> None:
    starts = Starts(copy_of("qwen3", tmp_path / "model"), tmp_path / "cache")
    starts.load()
    file = starts.path / "model.safetensors"
    tensors, before = load_file(file), file.stat()
    tensors["model.layers.1.mlp.down_proj.weight"].mul_(1.5)
    save_file(tensors, file)
    model, reused = starts.load()
    assert not reused
    assert torch.equal(logits(model), logits(load_model(starts.path, ops=OPS)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not starts.load()[1], "size and time are the same as before, the content is not"


def test_the_key_knows_the_files_and_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("qwen3", tmp_path / "model")
    keys = [cache_key(folder, torch.float32, "auto")]
    assert keys[0] == cache_key(folder, torch.float32, "auto") == json.loads(json.dumps(keys[0]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    keys.append(cache_key(folder, torch.float32, "auto"))
    monkeypatch.setattr(pando, "__version__", "0.0.0")
    keys.append(cache_key(folder, torch.float32, "auto"))
    monkeypatch.setattr(packed_weights, "CODE", ("kernels",))
    keys.append(cache_key(folder, torch.float32, "auto"))
    shutil.copytree(folder, tmp_path / "other")
    keys.append(cache_key(tmp_path / "other", torch.float32, "auto"))
    assert len({json.dumps(key) for key in keys}) == len(keys)


# -- files that do not fit the model


def test_a_file_of_another_shape_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load, "cache_key", lambda *args: {"same": "key"})
    Starts(tiny_checkpoint("qwen2"), tmp_path / "cache").load()
    for file in (tmp_path / "cache").iterdir():
        name = PackedCache(tmp_path / "cache").path(tiny_checkpoint("qwen3").name, {"same": "key"}).name
        file.rename(file.with_name(name))
    with caplog.at_level(logging.INFO):
        model = load_model(tiny_checkpoint("qwen3"), ops=OPS, packed=PackedCache(tmp_path / "cache", min_bytes=0))
    assert "packed weights are not used" in caplog.text
    assert torch.equal(logits(model), logits(load_model(tiny_checkpoint("qwen3"), ops=OPS)))


def test_a_weight_that_is_not_packed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that reads a matrix with `weight` and keeps it must not get one without content."""
    build = load.build_model

    def keeping(spec: Any, loader: Any, *args: Any) -> DecoderModel:
        model = build(spec, loader, *args)
        model.config_dict = {"kept": loader.weight("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)}
        return model

    monkeypatch.setattr(load, "build_model", keeping)
    starts = Starts(tiny_checkpoint("qwen3"), tmp_path / "cache")
    for _ in range(2):
        kept = starts.load()[0].config_dict["kept"]
        assert isinstance(kept, Tensor) and not kept.is_meta


def test_fewer_calls_than_entries_are_noticed() -> None:
    replay = Replay(lambda index, dtype: OPS.pack_linear(torch.zeros(1, 1)), [[1, 1, -1, False]] * 2, {}, torch.tensor)
    ops = replay.table(OPS)
    ops.pack_linear(torch.zeros(1, 1))
    with pytest.raises(packed_weights.StaleWeights, match="2 packed weights where the model has 1"):
        replay.finish()
    with pytest.raises(packed_weights.StaleWeights, match="packed weight 1"):
        ops.pack_linear(torch.zeros(1, 2))


# -- where nothing is kept


def test_small_models_and_dummies_are_not_kept(tmp_path: Path) -> None:
    starts = Starts(tiny_checkpoint("qwen3"), tmp_path / "cache")
    assert starts.load(min_bytes=1 << 30)[1] and starts.files() == []
    starts.options = {"load_format": "dummy"}
    assert starts.load()[1] and starts.files() == []


def test_the_reference_kernels_are_not_kept(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path, min_bytes=0)
    load_model(tiny_checkpoint("qwen3"), ops=op_table("cpu", "reference"), packed=cache)
    assert cache._waiting is None
