"""`pando doctor` and `pando plan`: what they find, and what they say when something is missing."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from pando import doctor
from pando.cli import main
from pando.core.config import Config
from pando.errors import ModelNotFound
from tests.dummy_model import dummy_config


def test_report_covers_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no-measure"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"pando", "libraries", "device", "processor", "kernels", "built-in models"} <= set(found)
    assert "torch" in found["libraries"]["text"]
    assert found["device"]["text"].endswith("GiB free")


def test_kernels_say_why_not() -> None:
    (kernels,) = [finding for finding in doctor.examine(measure=False) if finding.name == "kernels"]
    assert kernels.state in ("ok", "slow")
    assert kernels.details, "every op that is not native has a reason"


def test_measurements_are_plausible() -> None:
    calls = []
    rate = doctor.best_rate(lambda: calls.append(1), 1000.0, 0.01)
    assert rate > 1000.0 / 0.01 and len(calls) >= 2


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "uvicorn":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    broken = [finding for finding in doctor.examine(measure=False) if finding.state == "broken"]
    assert [finding.text for finding in broken] == ["missing: uvicorn; install pando-llm again"]
    assert "BROKEN" in doctor.as_text(broken)


def test_broken_finding_sets_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise ModelNotFound("the built-in model is not part of this installation")

    monkeypatch.setattr("pando.models.load.resolve_model_path", missing)
    assert main(["doctor", "--no-measure"]) == 1


def test_plan_counts_what_the_shape_says(tmp_path: Path) -> None:
    lines = "\n".join(doctor.plan_lines(dummy_config(tmp_path)))
    # 2 layers, K and V, 1 head of 16, float32.
    assert "256 bytes a token" in lines
    assert "4,096 tokens" in lines and "float32 on cpu" in lines
    assert "8 x 512 tokens" in lines


def test_plan_of_bfloat16_is_half(tmp_path: Path) -> None:
    config = dummy_config(tmp_path)
    half = Config(model_path=config.model_path, dtype="bfloat16", max_total_tokens=4096, page_size=16)
    assert "128 bytes a token" in "\n".join(doctor.plan_lines(half))


def test_plan_of_keys_and_values_in_int8_counts_their_scales(tmp_path: Path) -> None:
    config = dummy_config(tmp_path)
    rounded = Config(model_path=config.model_path, kv_cache_dtype="int8", max_total_tokens=4096)
    assert "80 bytes a token" in "\n".join(doctor.plan_lines(rounded))  # 2 layers, K and V, 16 bytes and a scale


def test_plan_of_a_hub_model_fetches_its_config_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dummy_config(tmp_path)
    fetched = []

    def download(name: str, file: str, revision: str | None) -> str:
        fetched.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    lines = doctor.plan_lines(Config(model_path="owner/model", revision="main", max_total_tokens=4096))
    assert fetched == [("owner/model", "config.json", "main")]
    assert lines[0].startswith("owner/model: ")


def test_plan_of_an_unreachable_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, file: str, revision: str | None) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ModelNotFound, match="owner/model.*no network"):
        doctor.plan_lines(Config(model_path="owner/model"))
