"""Willow's training model and its delta rule, against transformers."""

import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from training.aspen.hybrid import Willow  # noqa: E402
from training.aspen.shape import SHAPES, HybridShape  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TINY = HybridShape(
    hidden=48,
    layers=4,
    heads=2,
    kv_heads=1,
    ffn=80,
    delta_key_heads=1,
    delta_value_heads=2,
    delta_key_dim=32,
    delta_value_dim=16,
    head_dim=32,
    rotary_dim=16,
    vocab=96,
)


def tiny_model(seed: int = 0) -> Willow:
    """A tiny model whose every weight matters (the usual start has zero output projections)."""
    torch.manual_seed(seed)
    model = Willow(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_parameter_count() -> None:
    for shape in (TINY, SHAPES["willow"]):
        assert isinstance(shape, HybridShape)
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in Willow(shape).parameters()) == shape.num_parameters()


@pytest.mark.parametrize("length", [1, 37, 200])
def test_logits_equal_transformers(length: int) -> None:
    ours = tiny_model()
    config = transformers.Qwen3_5TextConfig(**{**TINY.hf_config(2, 0), "torch_dtype": "float32"})
    theirs = transformers.Qwen3_5ForCausalLM(config).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    tokens = torch.randint(0, TINY.vocab, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-4)


def test_documents_do_not_see_each_other() -> None:
    model = tiny_model()
    first, second = torch.randint(0, TINY.vocab, (1, 30)), torch.randint(0, TINY.vocab, (1, 70))
    documents = torch.cat((torch.zeros(1, 30), torch.ones(1, 70)), dim=1).int()
    together = torch.cat((first, second), dim=1)
    with torch.no_grad():
        packed = model(together, *model.rotary(100, torch.float32), documents)[:, 30:]
        alone = model(second, *model.rotary(70, torch.float32), torch.zeros(1, 70).int())
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
