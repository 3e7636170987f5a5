"""`pando simulate` from its arguments to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pando.cache.simulator.models import preset
from pando.cli import main
from pando.cli.simulate import _model

QUICK = ["simulate", "--generate", "lmsys", "--sessions", "2", "--seed", "5", "--no-progress"]
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def test_one_run_is_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "out.json"
    assert main([*QUICK, "--policy", "lru", "--budget", "device=1e9", "--report", str(report)]) == 0
    facts = json.loads(report.read_text())
    assert facts["policy"] == "lru" and facts["budget"] == {"device": 1_000_000_000}
    assert 0 < facts["token_hit_rate"] < 1 and 0 < facts["flops_saved"] < 1 and facts["requests_per_second"] > 0
    assert f"{facts['token_hit_rate']:.4f}" in capsys.readouterr().out


def test_several_runs_make_a_curve(tmp_path: Path) -> None:
    report, page = tmp_path / "out.json", tmp_path / "out.html"
    budgets = ["--budget", "device=4e8", "--budget", "device=1e9"]
    assert (
        main([*QUICK, "--policy", "lru", "--policy", "reuse", *budgets, "--report", str(report), "--plot", str(page)])
        == 0
    )
    runs = json.loads(report.read_text())["runs"]
    assert [(run["policy"], run["budget"]["device"]) for run in runs] == [
        ("lru", 400_000_000), ("lru", 1_000_000_000), ("reuse", 400_000_000), ("reuse", 1_000_000_000)
    ]  # fmt: skip
    assert page.read_text().count("<polyline") == 2


@pytest.mark.parametrize(
    "words, says",
    [
        (["--policy", "mru"], "unknown eviction policy"),
        (["--admission", "never"], "never"),
        (["--budget", "much"], "not a number of bytes"),
        (["--model", "gpt-9"], "hybrid-7b"),
        (["--page-size", "0"], "at least one"),
    ],
)
def test_mistakes_are_named(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *words]) == 2
    assert says in capsys.readouterr().err


def test_a_config_says_what_the_preset_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model, same = _model(str(tmp_path), "bfloat16"), preset("dense-8b")
    assert model.plan.bytes_per_token == same.plan.bytes_per_token
    assert model.flops.flops(3000) == pytest.approx(same.flops.flops(3000), rel=1e-12)


def test_a_config_with_windows(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    types = ["sliding_attention", "full_attention"] * 16
    path.write_text(
        json.dumps(
            {
                **LLAMA,
                "model_type": "gpt_oss",
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "sliding_window": 128,
                "layer_types": types,
            }
        )
    )
    model = _model(str(path), "bfloat16")
    assert [window for window, _, _ in model.flops.spans] == [0, 128]
    assert model.flops.spans[0][2] == model.flops.spans[1][2] == 16 * 4 * 32 * 128
