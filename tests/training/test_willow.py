"""The shipped hybrid model: its folder, its mathematics, and a few of its answers."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pando.kernels import op_table  # noqa: E402
from pando.models.load import load_model, resolve_model_path  # noqa: E402
from tests.models.paged_loop import full_logits  # noqa: E402
from training.aspen.build import build_model  # noqa: E402
from training.aspen.evaluate import TASKS, LocalModel, heldout  # noqa: E402
from training.aspen.shape import SHAPES  # noqa: E402

FOLDER = resolve_model_path("willow")


def test_folder_is_complete_and_small() -> None:
    names = {file.name for file in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"chat_template.jinja", "model.safetensors", "README.md", "NOTICE"} <= names
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12e6


def test_config_is_that_of_the_shape() -> None:
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    assert config == SHAPES["willow"].hf_config(config["eos_token_id"], config["pad_token_id"])
    assert config["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 2


def test_tokenizer_and_template_are_those_of_aspen() -> None:
    aspen = resolve_model_path("aspen")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (FOLDER / name).read_bytes() == (aspen / name).read_bytes()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_training_model_computes_what_transformers_does() -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3_5ForCausalLM"
    ours = build_model(SHAPES["willow"])
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"})
    tokens = torch.randint(0, 8192, (2, 150), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=2e-3, rtol=1e-3)


def test_pando_computes_what_transformers_does() -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ops = op_table("cpu", "reference")
    tokens = torch.randint(0, 8192, (90,), generator=torch.Generator().manual_seed(4))
    ours = full_logits(load_model(FOLDER, dtype="float32", ops=ops), ops, tokens.tolist())
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], atol=2e-3, rtol=1e-3)


def test_answers() -> None:
    model = LocalModel(FOLDER)
    for name in ("comparison", "facts", "introduction"):
        exercises = heldout(TASKS[name], 10)
        answers = model(exercises, TASKS[name].max_new_tokens)
        right = sum(exercise.check(answer) for exercise, answer in zip(exercises, answers, strict=True))
        assert right >= 7, f"{name}: {answers}"
