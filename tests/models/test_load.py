"""Names to folders, folders to models, and what is said when that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pando.cache.spec import FullAttention, SlidingWindow
from pando.errors import ConfigError, ModelNotFound, UnsupportedModel
from pando.kernels import op_table
from pando.models.load import load_model, resolve_model_path
from tests.models.paged_loop import full_logits
from tests.tiny_models import prompt_ids, tiny_checkpoint

OPS = op_table("cpu", "reference")
IDS = prompt_ids(20)


def copy_of(family: str, folder: Path) -> Path:
    """A checkpoint to damage: config and weights only."""
    folder.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_checkpoint(family) / file, folder / file)
    return folder


def edit_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "drop"}))
    return folder


def edit_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def logits(folder: Path) -> torch.Tensor:
    return full_logits(load_model(folder, dtype="float32", ops=OPS), OPS, IDS)


def test_what_a_model_exposes() -> None:
    model = load_model(tiny_checkpoint("mistral"), dtype="bfloat16", ops=OPS)
    assert (model.vocab_size, model.hidden_size, model.max_position) == (384, 64, 1024)
    assert model.dtype == torch.bfloat16
    assert model.spec.family == "mistral"
    assert model.config_dict["model_type"] == "mistral"
    assert model.cache_plan.layers == (SlidingWindow(2, 24, 24, "bfloat16", 9),) * 3


def test_cache_plan_follows_the_layers() -> None:
    model = load_model(tiny_checkpoint("gemma3"), dtype="float32", ops=OPS)
    kinds = [type(layer) for layer in model.cache_plan.layers]
    assert kinds == [SlidingWindow, FullAttention, SlidingWindow]


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    folder = copy_of("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, at in weight_map.items() if at == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(folder), logits(tiny_checkpoint("qwen3_moe")))


def test_a_missing_head_means_tied(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    expected = logits(edit_weights(folder, tensors))
    del tensors["lm_head.weight"]
    model = load_model(edit_weights(folder, tensors), dtype="float32", ops=OPS)
    assert model.spec.tied
    assert torch.equal(full_logits(model, OPS, IDS), expected)


def test_a_redundant_tied_head_is_accepted(tmp_path: Path) -> None:
    folder = copy_of("qwen3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert torch.equal(logits(edit_weights(folder, tensors)), logits(tiny_checkpoint("qwen3")))


def test_biases_are_found_in_the_tensors(tmp_path: Path) -> None:
    folder = edit_config(copy_of("llama3", tmp_path), attention_bias=False)
    assert torch.equal(logits(folder), logits(tiny_checkpoint("llama3")))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        load_model(edit_weights(folder, tensors), dtype="float32", ops=OPS)


def test_a_layer_too_many_is_named(tmp_path: Path) -> None:
    folder = edit_config(copy_of("llama", tmp_path), num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"model\.layers\.2\..* is not part of this architecture"):
        load_model(folder, dtype="float32", ops=OPS)


def test_draft_layers_of_a_checkpoint_are_left_out(tmp_path: Path) -> None:
    folder = edit_config(copy_of("llama", tmp_path), num_hidden_layers=2, num_nextn_predict_layers=1)
    assert load_model(folder, dtype="float32", ops=OPS).spec.num_layers == 2


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = edit_config(copy_of("llama", tmp_path), intermediate_size=128)
    with pytest.raises(ConfigError, match=r"down_proj\.weight has shape \[64, 96\], \[64, 128\] expected"):
        load_model(folder, dtype="float32", ops=OPS)


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    folder = edit_config(copy_of("llama", tmp_path), model_type="mystery", architectures=["MysteryForCausalLM"])
    with pytest.raises(UnsupportedModel, match=r"'mystery' \(MysteryForCausalLM\).*llama.*qwen3") as caught:
        load_model(folder, dtype="float32", ops=OPS)
    assert caught.value.code == "unsupported_model"


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    folder = edit_config(copy_of("llama", tmp_path), dtype="bfloat16")
    assert load_model(folder, dtype="auto", ops=OPS).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="int8"):
        load_model(folder, dtype="int8", ops=OPS)


def test_the_older_rope_spelling_means_the_same(tmp_path: Path) -> None:
    folder = copy_of("llama3", tmp_path)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit_config(folder, rope_parameters="drop", rope_scaling=rope, rope_theta=theta)
    assert torch.equal(logits(folder), logits(tiny_checkpoint("llama3")))


def test_dummy_weights_need_only_a_config(tmp_path: Path) -> None:
    for family in ("gpt_oss", "gemma2", "qwen3_moe", "phi3", "gpt_neox", "cohere", "ernie4_5_moe"):
        shutil.copy(tiny_checkpoint(family) / "config.json", tmp_path / "config.json")
        model = load_model(tmp_path, dtype="float32", ops=OPS, load_format="dummy")
        found = full_logits(model, OPS, IDS)
        assert found.isfinite().all()
        assert found.std() > 0
        again = load_model(tmp_path, dtype="float32", ops=OPS, load_format="dummy")
        assert torch.equal(found, full_logits(again, OPS, IDS))


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    folder = edit_config(copy_of("llama", tmp_path), eos_token_id=7)
    assert load_model(folder, dtype="float32", ops=OPS).eos_token_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert load_model(folder, dtype="float32", ops=OPS).eos_token_ids == (3, 5)


def test_longrope_follows_the_served_context() -> None:
    path = tiny_checkpoint("phi3_long")
    long = load_model(path, dtype="float32", ops=OPS)
    short = load_model(path, dtype="float32", ops=OPS, context_length=16)
    assert not torch.allclose(full_logits(long, OPS, IDS), full_logits(short, OPS, IDS), atol=1e-2)
    long.set_context_length(16)
    assert torch.equal(full_logits(long, OPS, IDS), full_logits(short, OPS, IDS))


def test_progress_ends_at_one() -> None:
    seen: list[tuple[float, str]] = []
    load_model(
        tiny_checkpoint("gemma2"),
        dtype="float32",
        ops=OPS,
        progress=lambda fraction, detail: seen.append((fraction, detail)),
    )
    assert seen[-1][0] == 1.0
    assert seen == sorted(seen, key=lambda entry: entry[0])
    assert any(detail.endswith("down_proj.weight") for _, detail in seen)


def test_a_local_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(ModelNotFound, match="no local folder, GGUF file or hub id"):
        resolve_model_path(name)


def test_the_hub_is_asked_for_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    calls: list[tuple[str, str | None, list[str]]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model_path("owner/name", "v1") == tmp_path
    assert calls == [("owner/name", "v1", ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"])]


def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelNotFound, match="owner/name.*no route"):
        resolve_model_path("owner/name")
