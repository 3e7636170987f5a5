"""The training model, optimizer, schedule and data feed, on a tiny shape and without compiling."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from training.aspen.evaluate import TASKS, heldout, wire_messages  # noqa: E402
from training.aspen.model import Aspen, head_loss  # noqa: E402
from training.aspen.optimizer import MAX_GAIN, Optimizer, orthogonalized  # noqa: E402
from training.aspen.pack import Pack, write_pack  # noqa: E402
from training.aspen.shape import SHAPES, Shape  # noqa: E402
from training.aspen.train import Feed, Plan, deadline_of  # noqa: E402

TINY = Shape(hidden=48, layers=2, heads=2, kv_heads=1, ffn=80, vocab=96)


def tiny_model(seed: int = 0) -> Aspen:
    """A tiny model whose every weight matters (the usual start has zero output projections)."""
    torch.manual_seed(seed)
    model = Aspen(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_parameter_count() -> None:
    for shape in (TINY, SHAPES["4m"], SHAPES["8m"]):
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in Aspen(shape).parameters()) == shape.num_parameters()


@pytest.mark.parametrize("length", [1, 37, 200, 1100])
def test_logits_equal_transformers(length: int) -> None:
    ours = tiny_model()
    config = transformers.Qwen3Config(**{**TINY.hf_config(2, 0), "torch_dtype": "float32"})
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    tokens = torch.randint(0, TINY.vocab, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-4)


def test_documents_do_not_see_each_other() -> None:
    model = tiny_model()
    first, second = torch.randint(0, TINY.vocab, (1, 30)), torch.randint(0, TINY.vocab, (1, 150))
    documents = torch.cat((torch.zeros(1, 30), torch.ones(1, 150)), dim=1).int()
    together = torch.cat((first, second), dim=1)
    with torch.no_grad():
        packed = model(together, *model.rotary(180, torch.float32), documents)[:, 30:]
        alone = model(second, *model.rotary(150, torch.float32), torch.zeros(1, 150).int())
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_head_loss_weighs_positions() -> None:
    hidden, weight, targets = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([1, 4, 0])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(
        head_loss(hidden, weight, targets, torch.tensor([1.0, 0.0, 0.5])), expected[0] + expected[2] / 2
    )


def test_orthogonalized_flattens_singular_values() -> None:
    torch.manual_seed(0)
    for rows, columns in ((20, 50), (50, 20), (30, 30)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(rows, columns)))
        assert values.max() < 1.3 and values.median() > 0.6


def test_optimizer_learns_and_resumes() -> None:
    tokens = torch.randint(0, TINY.vocab, (4, 40))

    def losses(model: Aspen, optimizer: Optimizer, count: int) -> list[float]:
        found = []
        for _ in range(count):
            model.zero_grad()
            logits = model.logits(tokens).float()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}, 1.0)
            found.append(loss.item())
        return found

    model = tiny_model()
    optimizer = Optimizer(model.named_parameters())
    early = losses(model, optimizer, 20)
    assert early[-1] < 0.7 * early[0]
    again = tiny_model(seed=1)
    resumed = Optimizer(again.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert losses(again, resumed, 3) == pytest.approx(losses(model, optimizer, 3), rel=1e-5)


def test_gains_of_query_and_key_norms_stay_bounded() -> None:
    model = tiny_model()
    optimizer = Optimizer(model.named_parameters(), other_lr=10.0)
    name = "model.layers.0.self_attn.q_norm.weight"
    optimizer.step({name: -torch.ones(TINY.head_dim)}, 1.0)
    assert optimizer.master[name].max() == MAX_GAIN


def test_schedule() -> None:
    plan = Plan(Path(), "4m", 1000.0, 200.0, 2, 4096, 10, 300.0, "latest")
    assert plan.factor(0, 0.0) == pytest.approx(0.1)
    assert plan.factor(500, 700.0) == 1.0
    assert plan.factor(500, 900.0) == pytest.approx(0.5)
    assert plan.factor(500, 2000.0) == 0.0
    assert 0 < deadline_of("00:00", None) - deadline_of(None, 0.0) <= 86400


def test_feed_gives_every_rank_its_own_rows(tmp_path: Path) -> None:
    rows = [(np.full(16, index, np.uint16), np.full(16, 50, np.uint8)) for index in range(40)]
    write_pack(tmp_path, "p", rows, seed=1)
    assert len(Pack.open(tmp_path, "p", 16).tokens) == 40
    mix = {"packs": {"16": {"p": 1.0}}}
    feeds = [Feed(tmp_path, 0), Feed(tmp_path, 0)]
    seen: list[int] = []
    for step in range(4):
        for rank, feed in enumerate(feeds):
            tokens, weights = feed.batch(mix, 16, 5, rank, 2, seed=step)
            assert (weights == 0.5).all()
            seen += tokens[:, 0].tolist()
    assert sorted(seen) == list(range(40))
    assert feeds[0].cursors == feeds[1].cursors == {"p-16": 40}


def test_feed_numbers_documents(tmp_path: Path) -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8]])
    assert Feed(tmp_path, 0).documents(tokens).tolist() == [[0, 0, 0, 1, 1, 2, 3]]


def test_wire_messages_carry_call_ids_and_text_arguments() -> None:
    for exercise in heldout(TASKS["tool_answer"], 3):
        call, result = wire_messages(exercise)[-2:]
        calls = call["tool_calls"]
        assert isinstance(calls, list) and isinstance(calls[0]["function"]["arguments"], str)
        assert result["tool_call_id"] == calls[0]["id"]
