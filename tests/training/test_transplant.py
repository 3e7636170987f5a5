"""Willow's warm start from aspen, and the objectives that align it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training.aspen.align import Mixers, Stream  # noqa: E402
from training.aspen.hybrid import AttentionLayer, Willow  # noqa: E402
from training.aspen.model import Aspen, Layer  # noqa: E402
from training.aspen.shape import SHAPES, HybridShape, Shape  # noqa: E402
from training.aspen.transplant import DONORS, load_aspen, transplant  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
DONOR = Shape(hidden=32, layers=7, heads=4, kv_heads=2, ffn=48, vocab=64, head_dim=32)
TARGET = HybridShape(
    hidden=32,
    layers=8,
    heads=4,
    kv_heads=2,
    ffn=48,
    delta_key_heads=2,
    delta_value_heads=4,
    delta_key_dim=16,
    delta_value_dim=16,
    head_dim=32,
    rotary_dim=32,
    vocab=64,
    rope_theta=1e5,
)


@pytest.fixture
def donor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a tiny aspen in which every weight matters."""
    torch.manual_seed(0)
    model = Aspen(DONOR)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    monkeypatch.setitem(SHAPES, "tiny", DONOR)
    path = tmp_path / "donor.pt"
    torch.save({"shape": "tiny", "optimizer": {"master": model.state_dict()}}, path)
    return path


def grown(path: Path, shape: HybridShape = TARGET) -> Willow:
    torch.manual_seed(1)
    model = Willow(shape)
    transplant(load_aspen(path), model)
    return model


def layers_of(path: Path, model: Willow) -> list[tuple[Layer, AttentionLayer]]:
    """Each transplanted attention layer after its donor."""
    donors = load_aspen(path).model.layers
    found = []
    for index, layer in zip(DONORS, model.model.layers, strict=True):
        if index is not None and isinstance(layer, AttentionLayer):
            source = donors[index]
            assert isinstance(source, Layer)
            found.append((source, layer))
    return found


def test_attention_layers_do_what_their_donors_do(donor: Path) -> None:
    model, documents = grown(donor), torch.zeros(2, 50).int()
    found = layers_of(donor, model)
    assert len(found) == 2
    theirs, ours = load_aspen(donor).rotary(50, torch.float32), model.rotary(50, torch.float32)
    for source, layer in found:
        x = torch.randn(2, 50, 32)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, *ours, documents), source(x, *theirs, documents), atol=1e-4, rtol=1e-4)


def test_partial_rotation_keeps_the_fast_half(donor: Path) -> None:
    half = replace(TARGET, rotary_dim=16, rope_theta=1e5**0.5)
    model = grown(donor, half)
    cos, _ = model.rotary(9, torch.float32)
    full, _ = load_aspen(donor).rotary(9, torch.float32)
    torch.testing.assert_close(cos[:, :8], full[:, :8])
    # With the slow half at rest, nothing changes at position 0.
    (source, layer), *_ = layers_of(donor, model)
    x, documents = torch.randn(3, 1, 32), torch.zeros(3, 1).int()
    with torch.no_grad():
        ours = layer(x, *model.rotary(1, torch.float32), documents)
        theirs = source(x, *load_aspen(donor).rotary(1, torch.float32), documents)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_layers_start_harmless(donor: Path) -> None:
    model = grown(donor)
    x, documents = torch.randn(2, 20, 32), torch.zeros(2, 20).int()
    tables = model.rotary(20, torch.float32)
    with torch.no_grad():
        for index, layer in zip(DONORS, model.model.layers, strict=True):
            if index is None:
                torch.testing.assert_close(layer(x, *tables, documents), x)


@pytest.mark.parametrize("objective", [Mixers, Stream])
def test_objectives_fall_and_train_what_they_say(donor: Path, objective: type[Mixers] | type[Stream]) -> None:
    model = grown(donor).bfloat16()
    align, tokens = objective(model, donor), torch.randint(0, 64, (2, 40))
    documents = torch.zeros(2, 40).int()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with torch.compiler.set_stance("force_eager"):
        for _ in range(30):
            model.zero_grad()
            total, count = align(tokens, documents)
            losses.append(total / count)
            optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    delta = {name for name in trained if ".linear_attn." in name}
    assert delta, "delta nets are trained"
    others = {name for name in trained - delta if not name.endswith("input_layernorm.weight")}
    assert bool(others) == (objective is Stream)
    assert "model.embed_tokens.weight" not in trained
