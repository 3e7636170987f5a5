"""The training kernel of the gated delta rule, against transformers' chunked form and its automatic gradients."""

import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule  # noqa: E402

from training.aspen.delta_rule import gated_delta_rule, short_convolution  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
KEY_DIM = 32


def inputs(length: int, key_heads: int, value_heads: int, value_dim: int) -> list[torch.Tensor]:
    """Two sequences: q, k, v, g and beta, as the model makes them, with correlated keys."""
    torch.manual_seed(length)
    q = torch.nn.functional.normalize(torch.randn(2, length, key_heads, KEY_DIM), dim=-1) * KEY_DIM**-0.5
    k = torch.nn.functional.normalize(torch.randn(2, length, key_heads, KEY_DIM) + 0.5, dim=-1)
    v = torch.randn(2, length, value_heads, value_dim)
    g, beta = -torch.rand(2, length, value_heads) * 0.3, torch.rand(2, length, value_heads)
    return [tensor.requires_grad_() for tensor in (q, k, v, g, beta)]


def expected(tensors: list[torch.Tensor], starts: list[int], length: int) -> torch.Tensor:
    """The reference's output, document by document."""
    q, k, v, g, beta = tensors
    pieces = []
    for begin, end in zip(starts, [*starts[1:], length], strict=True):
        part = slice(begin, end)
        # The reference scales queries itself.
        out, _ = torch_chunk_gated_delta_rule(
            q[:, part] * KEY_DIM**0.5, k[:, part], v[:, part], g[:, part], beta[:, part]
        )
        pieces.append(out)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(
    ("length", "starts", "key_heads", "value_heads", "value_dim"),
    [(1, [0], 1, 1, 16), (32, [0], 2, 2, 32), (75, [0, 31, 32, 64], 1, 2, 48), (130, [0, 70], 2, 4, 64)],
)
def test_outputs_and_gradients_equal_the_chunked_form(
    length: int, starts: list[int], key_heads: int, value_heads: int, value_dim: int
) -> None:
    tensors = inputs(length, key_heads, value_heads, value_dim)
    begins = torch.zeros(2, length, dtype=torch.bool)
    begins[:, starts] = True
    out, _ = gated_delta_rule(*tensors, begins)
    reference = expected(tensors, starts, length)
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), tensors)
    wanted = torch.autograd.grad((reference * weights).sum(), tensors)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_unknown_value_dim_is_refused() -> None:
    tensors = inputs(4, 1, 1, 80)
    with pytest.raises(AssertionError, match="value dim 80"):
        gated_delta_rule(*tensors, torch.zeros(2, 4, dtype=torch.bool))


def test_convolution_equals_torch_within_documents() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, requires_grad=True)
    taps = torch.randn(4, 32, requires_grad=True)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, [0, 2, 17]] = True
    pieces = []
    for begin, end in ((0, 2), (2, 17), (17, 40)):
        padded = torch.nn.functional.pad(x[:, begin:end].transpose(1, 2), (3, 0))
        pieces.append(torch.nn.functional.conv1d(padded, taps.T[:, None], groups=32).transpose(1, 2))
    expected_out = torch.nn.functional.silu(torch.cat(pieces, dim=1))
    out = short_convolution(x, taps, starts)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weights).sum(), (x, taps)),
        torch.autograd.grad((expected_out * weights).sum(), (x, taps)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)
