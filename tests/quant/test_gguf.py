"""GGUF: every block format, every architecture, tokenizers and chat templates from metadata, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pando
from pando.errors import ConfigError, ModelNotFound, UnsupportedModel
from pando.gguf import GGUFFile
from pando.kernels.reference import REFERENCE
from pando.kernels.weights import QuantizedWeight
from pando.models.gguf import GGUFSource
from pando.models.load import load_model, load_spec, resolve_model_path
from pando.quant.gguf_blocks import BLOCK_TYPES, read_blocks
from pando.quant.size import matrix_bits
from pando.tokenizer.tokenizer import Tokenizer
from tests.models.paged_loop import full_logits, greedy
from tests.quant.capture import Capture, full_activations
from tests.quant.gguf_writer import (
    FORMATS,
    blocks,
    convert,
    gguf_name,
    llama3_factors,
    model_metadata,
    neighbouring_pairs,
    plain,
    stacked_experts,
    tokenizer_metadata,
    write_gguf,
)
from tests.tiny_models import LLAMA3_ROPE, prompt_ids, tiny_checkpoint

ASPEN = resolve_model_path("aspen")
IDS = prompt_ids(20)


def logits(path: Path, capture: Capture | None = None, **options: Any) -> Tensor:
    ops = (capture or Capture()).table()
    return full_logits(load_model(path, dtype="float32", ops=ops, **options), ops, IDS)


# ---- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_stands_for_its_weights(name: str) -> None:
    columns = 2 * FORMATS[name][1]
    (_, _, raw), expected = blocks(name, 5, columns, seed=1)
    kind = BLOCK_TYPES[name]
    stored = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, kind.bytes)
    found = read_blocks(stored, kind, 5, columns)
    assert found.group_size == (16 if name == "Q6_K" else 32)
    assert torch.allclose(found.dequantize(), expected, rtol=1e-6, atol=1e-7)
    assert expected.std() > 0


def test_many_blocks_are_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, _, raw), expected = blocks("Q4_K", 7, 512, seed=2)
    monkeypatch.setattr("pando.quant.gguf_blocks.BLOCKS_AT_ONCE", 3)
    kind = BLOCK_TYPES["Q4_K"]
    stored = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, kind.bytes)
    assert torch.allclose(read_blocks(stored, kind, 7, 512).dequantize(), expected, rtol=1e-6, atol=1e-7)


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MATRICES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (256, 256),
    "mlp.up_proj": (256, 256),
    "mlp.down_proj": (256, 256),
}


def in_blocks(folder: Path, formats: dict[str, str], architecture: str, embedding: str | None = None) -> Path:
    """A GGUF file with matrices in formats by role (or "" for all), and in `folder` the plain checkpoint."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    weights = {"model.embed_tokens.weight": torch.randn(384, 256, generator=generator) * 0.3}
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(256, generator=generator)
    for name, weight in weights.items():
        tensors[gguf_name(name, architecture)] = plain(weight)
    if embedding is not None:
        tensors["token_embd.weight"], weights["model.embed_tokens.weight"] = blocks(embedding, 384, 256, 0)
    for seed, (role, shape) in enumerate(MATRICES.items(), start=1):
        name = f"model.layers.0.{role}.weight"
        stored, weight = blocks(formats.get(role, formats.get("", "")), *shape, seed)
        tensors[gguf_name(name, architecture)] = stored
        if architecture == "llama" and role[-6:] in ("q_proj", "k_proj"):
            # The file's rows are the permuted ones: undo it for the plain checkpoint.
            order = neighbouring_pairs(torch.arange(shape[0])[:, None], shape[0] // 32)[:, 0]
            weight = weight[order.argsort()]
        weights[name] = weight.contiguous()
    config = {**CONFIG, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return write_gguf(folder / "model.gguf", model_metadata(CONFIG, architecture), tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_in_a_format_is_the_plain_one_of_its_weights(name: str, tmp_path: Path) -> None:
    file = in_blocks(tmp_path / "m", {"": name}, "llama")
    capture = Capture(full_activations)
    expected = logits(tmp_path / "m")
    assert torch.allclose(logits(file, capture), expected, atol=1e-3, rtol=1e-4)
    found = [weight for weight in capture.weights if isinstance(weight, QuantizedWeight)]
    assert len(found) == 4 and {weight.activation_bits for weight in found} == {8}
    error = (logits(file) - expected).square().mean().sqrt() / expected.std()
    assert error < 0.03, "activations in int8, a scale for each group: 0.3 % of a product's spread"


def test_formats_are_mixed_inside_a_fused_projection(tmp_path: Path) -> None:
    formats = {"": "Q4_K", "self_attn.v_proj": "Q6_K", "mlp.up_proj": "Q5_K"}
    file = in_blocks(tmp_path / "m", formats, "llama", embedding="Q6_K")
    capture = Capture(full_activations)
    assert torch.allclose(logits(file, capture), logits(tmp_path / "m"), atol=1e-3, rtol=1e-4)
    head = capture.weights[-1]
    assert isinstance(head, QuantizedWeight) and head.group_size == 16, "a tied head keeps the embedding's blocks"


def test_the_plan_counts_the_blocks(tmp_path: Path) -> None:
    file = in_blocks(tmp_path / "m", {"": "Q4_0", "mlp.down_proj": "Q8_0"}, "llama", embedding="Q6_K")
    _, config = load_spec(file)
    bits = matrix_bits("auto", config.values)
    assert bits is not None
    sizes = {role: rows * columns for role, (rows, columns) in MATRICES.items()}
    down = sizes["mlp.down_proj"]
    assert bits.linear == pytest.approx((5 * (sum(sizes.values()) - down) + 9 * down) / sum(sizes.values()))
    assert bits.head == 10


# ---- architectures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("qwen3_moe", "qwen3moe")],
)
def test_an_architecture_is_the_family(family: str, architecture: str, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint(family), folder, ignore=shutil.ignore_patterns("oracle"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("sliding_window", None)  # files of these families have no windows
    config["layer_types"], config["mlp_only_layers"] = ["full_attention"] * 3, []
    (folder / "config.json").write_text(json.dumps(config))
    if family == "qwen3_moe":
        without_dense_layer(folder)
    file = convert(folder, tmp_path / "model.gguf", architecture)
    assert torch.allclose(logits(file), logits(folder), atol=1e-5)


def without_dense_layer(folder: Path) -> None:
    """The tiny mixture with experts in every layer: the dense one's are those of the first."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.1.mlp.")}
    for name, tensor in list(tensors.items()):
        if name.startswith("model.layers.0.mlp."):
            tensors[name.replace("layers.0.", "layers.1.")] = tensor.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")


def test_gemma2(tmp_path: Path) -> None:
    folder = gemma(tmp_path, "gemma2", query_pre_attn_scalar=24)
    assert torch.allclose(logits(convert(folder, tmp_path / "m.gguf", "gemma2")), logits(folder), atol=1e-5)


def test_gemma3(tmp_path: Path) -> None:
    folder = gemma(tmp_path, "gemma3", query_pre_attn_scalar=24, layer_types=["sliding_attention"] * 3)
    assert torch.allclose(logits(convert(folder, tmp_path / "m.gguf", "gemma3")), logits(folder), atol=1e-5)


def gemma(tmp_path: Path, family: str, **changes: Any) -> Path:
    """The tiny checkpoint with what files do not say at its default."""
    folder = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint(family), folder, ignore=shutil.ignore_patterns("oracle"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_llama3_bands_come_from_a_tensor(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama3")
    rope = LLAMA3_ROPE
    factors = llama3_factors(32, 10000.0, rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], 32)
    file = convert(folder, tmp_path / "m.gguf", "llama", rope_freqs=factors)
    assert torch.allclose(logits(file), logits(folder), atol=1e-4)


def test_a_linear_and_a_yarn_scaling(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint("llama"), folder, ignore=shutil.ignore_patterns("oracle"))
    config = json.loads((folder / "config.json").read_text())
    for kind, extra in (("linear", {}), ("yarn", {"original_max_position_embeddings": 128})):
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **extra}
        (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
        scaling = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
        if extra:
            scaling["llama.rope.scaling.original_context_length"] = 128
        file = convert(folder, tmp_path / "m.gguf", "llama", **scaling)
        assert torch.allclose(logits(file), logits(folder), atol=1e-5)


def test_experts_in_blocks(tmp_path: Path) -> None:
    """A stacked tensor's blocks are taken apart by expert."""
    (number, _, raw), weight = blocks("Q4_0", 3 * 16, 32, 7)
    name = "blk.0.ffn_up_exps.weight"
    head = {"general.architecture": "qwen3moe"}
    file = write_gguf(tmp_path / "m.gguf", head, {name: (number, (3, 16, 32), raw)})
    source = GGUFSource(GGUFFile(file))
    for expert in range(3):
        found = source.weight(f"model.layers.0.mlp.experts.{expert}.up_proj.weight", 16, 32)
        assert isinstance(found, QuantizedWeight)
        assert torch.allclose(found.dequantize(), weight[16 * expert : 16 * (expert + 1)], atol=1e-6)


def test_dtypes(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint("llama"), folder, ignore=shutil.ignore_patterns("oracle"))
    file = convert(folder, tmp_path / "m.gguf", "llama")
    assert load_model(file, ops=REFERENCE).dtype == torch.float32
    assert load_model(in_blocks(tmp_path / "b", {"": "Q8_0"}, "llama"), ops=REFERENCE).dtype == torch.bfloat16


# ---- the built-in model as a file -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aspen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {
        **tokenizer_metadata(ASPEN, "smollm"),
        "tokenizer.ggml.eos_token_id": 8173,
        "tokenizer.ggml.padding_token_id": 8171,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (ASPEN / "chat_template.jinja").read_text(),
    }
    return convert(ASPEN, tmp_path_factory.mktemp("aspen") / "aspen.gguf", "qwen3", **metadata)


TEXTS = (
    "Hello, world!",
    "  two spaces, 12345 digits and 3.14",
    "naïve café — 日本語 🎉\n\n\ttabs",
    "def f(x):\n    return x+1  # don't\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
)


def test_the_tokenizer_of_a_file_is_the_folders(aspen: Path) -> None:
    ours, theirs = Tokenizer.load(aspen), Tokenizer.load(ASPEN)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert [ours.token_bytes(i) for i in ids] == [theirs.token_bytes(i) for i in ids]
    assert ours.special_ids == theirs.special_ids
    assert ours.eos_token_id == 8173
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.chat_template is not None and theirs.chat_template is not None
    assert ours.chat_template.render(chat) == theirs.chat_template.render(chat)


def test_a_template_file_replaces_the_stored_one(aspen: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    template = Tokenizer.load(aspen, tmp_path / "t.jinja").chat_template
    assert template is not None and template.render([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_the_engine_serves_a_file(aspen: Path) -> None:
    options = {"max_total_tokens": 512, "num_threads": 1, "log_level": "error"}
    prompt, sampling = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", {"temperature": 0}
    replies = []
    for path, quantization in ((str(aspen), "gguf"), ("aspen", "auto")):
        with pando.Engine(path, quantization=quantization, **options) as engine:
            reply = engine.generate(prompt, {**sampling, "max_new_tokens": 12})
            assert isinstance(reply, dict)
            replies.append(reply)
            assert engine.info.eos_token_ids[0] == 8173 and engine.info.num_parameters == 4_673_216
    assert replies[0]["text"] == replies[1]["text"] != ""
    assert replies[0]["output_ids"] == replies[1]["output_ids"]


def test_the_engine_generates_what_the_reference_does_on_blocks(tmp_path: Path) -> None:
    file = in_blocks(tmp_path / "m", {"": "Q4_K", "self_attn.v_proj": "Q6_K"}, "llama")
    folder = tiny_checkpoint("llama")
    model = load_model(file, dtype="float32", ops=REFERENCE)
    prompts = [prompt_ids(9, seed=1), prompt_ids(17, seed=2)]
    rows = greedy(model, REFERENCE, prompts, 8, chunk=32, page_size=1)
    options = {"dtype": "float32", "kernels": "reference", "max_total_tokens": 512, "num_threads": 1}
    with pando.Engine(str(file), tokenizer_path=str(folder), **options) as engine:
        found = engine.generate(input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": 8})
    assert [row.tokens[row.prompt_len :] for row in rows] == [out["output_ids"] for out in found]


def test_a_folder_with_one_file(aspen: Path, tmp_path: Path) -> None:
    shutil.copy(aspen, tmp_path / "a.gguf")
    assert resolve_model_path(str(tmp_path)) == tmp_path / "a.gguf"
    assert resolve_model_path(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    shutil.copy(aspen, tmp_path / "b.gguf")
    with pytest.raises(ModelNotFound, match=r"several GGUF files \(a.gguf, b.gguf\); name one"):
        resolve_model_path(str(tmp_path))


# ---- other tokenizers ---------------------------------------------------------------------------------------------


def byte_level(tmp_path: Path, pre: str, **metadata: Any) -> Tokenizer:
    head = {"general.architecture": "llama", **tokenizer_metadata(ASPEN, pre), **metadata}
    return Tokenizer.load(write_gguf(tmp_path / "t.gguf", head, {}))


def test_pre_tokenizers_cut_differently(tmp_path: Path) -> None:
    text = "It's 12345 tests, isn't it?\n\n  yes"

    def pieces(pre: str) -> list[str]:
        tokenizer = byte_level(tmp_path, pre)
        return [piece for piece, _ in tokenizer._rust.pre_tokenizer.pre_tokenize_str(text)]

    assert "Ġ12345" in pieces("gpt-2") and pieces("gpt-2") == pieces("default")
    assert "123" in pieces("llama-bpe") and "45" in pieces("llama-bpe")
    assert {"1", "2", "3", "4", "5"} <= set(pieces("qwen2")) and "?ĊĊ" in pieces("qwen2")
    assert {"1", "2", "3", "4", "5"} <= set(pieces("smollm")) and "?ĊĊ" not in pieces("smollm")


def test_a_first_token_is_added_where_the_model_wants_it(tmp_path: Path) -> None:
    bos = {"tokenizer.ggml.bos_token_id": 8172}
    assert byte_level(tmp_path, "llama-bpe", **bos).encode("a")[0] == 8172
    assert byte_level(tmp_path, "qwen2", **bos).encode("a")[0] != 8172
    assert byte_level(tmp_path, "qwen2", **bos, **{"tokenizer.ggml.add_bos_token": True}).encode("a")[0] == 8172
    assert byte_level(tmp_path, "llama-bpe", **bos).encode("a", add_special_tokens=False)[0] != 8172


PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "a",
    "b",
    "c",
    "ab",
    "▁a",
    "▁ab",
    "bc",
]
SCORES = {"ab": -1.0, "▁a": -3.0, "▁ab": -2.0, "bc": -0.5}
SENTENCE_PIECE = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [SCORES.get(piece, -10.0) for piece in PIECES],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 8],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_sentence_piece_joins_by_score(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "s.gguf", SENTENCE_PIECE, {}))

    def names(text: str) -> list[str]:
        return [tokenizer.token_name(i) for i in tokenizer.encode(text)]

    assert names("ab") == ["<s>", "▁ab"]
    assert names("abc") == ["<s>", "▁a", "bc"], "bc has the best score and is joined first"
    assert names("a é") == ["<s>", "▁a", "▁", "<0xC3>", "<0xA9>"]
    for text in ("ab", "abc", "a é ab", "  a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, r"pre-tokenizer 'tekken', which is not known.*--tokenizer-path"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer of kind 't5'.*--tokenizer-path"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merge 'a b c' that is no pair"),
        ({"tokenizer.ggml.model": "llama"}, "no score for each token"),
    ],
)
def test_a_tokenizer_that_is_not_known_names_the_remedy(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        byte_level(tmp_path, "gpt-2", **metadata)
    assert "t.gguf" in caught.value.message


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", {"general.architecture": "mamba"}, {})
    with pytest.raises(UnsupportedModel, match=r"'mamba' is not supported \(gemma2, .*qwen3.*safetensors"):
        load_model(file, ops=REFERENCE)


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama", "llama.attention.head_count": "x"}, {})
    with pytest.raises(ConfigError, match="metadata llama.attention.head_count is 'x'; expected an integer"):
        load_model(file, ops=REFERENCE)


def edited(tmp_path: Path, change: dict[str, Any], **metadata: Any) -> Path:
    """The tiny llama with tensors replaced."""
    folder = tiny_checkpoint("llama")
    config = json.loads((folder / "config.json").read_text())
    from safetensors.torch import load_file

    tensors = {
        gguf_name(name, "llama"): plain(tensor)
        for name, tensor in stacked_experts(load_file(folder / "model.safetensors")).items()
    }
    tensors = {name: stored for name, stored in {**tensors, **change}.items() if stored is not None}
    return write_gguf(tmp_path / "m.gguf", {**model_metadata(config, "llama"), **metadata}, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ({"blk.1.ffn_up.weight": (0, (96, 32), bytes(96 * 128))}, r"up_proj\.weight has shape \[96, 32\], \[96, 64\]"),
        ({"blk.1.ffn_up.weight": (2, (96, 32), bytes(96 * 18))}, r"\(Q4_0 blocks of 32\) has shape \[96, 32\]"),
        ({"blk.1.ffn_up.weight": (20, (96, 64), bytes(96 * 36))}, "GGUF type IQ4_NL, which can not be read"),
        ({"blk.1.ffn_up.weight": (99, (96, 64), b"")}, "GGUF type type 99"),
        ({"blk.1.strange.weight": (0, (4,), bytes(16))}, r"model\.layers\.1\.strange\.weight is not part of"),
        ({"blk.1.attn_norm.weight": (2, (64,), bytes(36))}, "GGUF type Q4_0 where a plain tensor is expected"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(edited(tmp_path, change), ops=REFERENCE)


def test_a_truncated_file(tmp_path: Path) -> None:
    file = edited(tmp_path, {})
    raw = file.read_bytes()
    for size, message in ((3, "GGUF"), (100, "can not be read as GGUF"), (len(raw) - 4096, "lies outside")):
        file.write_bytes(raw[:size])
        with pytest.raises(ConfigError, match=message):
            load_model(file, ops=REFERENCE)


def test_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model at all, just some text")
    with pytest.raises(ConfigError, match="does not begin with GGUF"):
        load_model(tmp_path / "m.gguf", ops=REFERENCE)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(64))
    with pytest.raises(ConfigError, match="version 9; 2 and 3 are known"):
        load_model(tmp_path / "m.gguf", ops=REFERENCE)


def test_a_part_of_a_split_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of 3 parts; join them"):
        load_model(edited(tmp_path, {}, **{"split.count": 3}), ops=REFERENCE)


def test_blocks_are_not_rounded_again(tmp_path: Path) -> None:
    file = in_blocks(tmp_path / "m", {"": "Q4_0"}, "llama")
    with pytest.raises(ConfigError, match=r"already quantised \(gguf\)"):
        load_model(file, ops=REFERENCE, quantization="int8")
