"""The table of supported models, and that its page lists it."""

from __future__ import annotations

import re
from pathlib import Path

from pando.models.registry import known_models
from tests.tiny_models import ALL_RECIPES, hf_config, hf_config_values

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_page_lists_every_model() -> None:
    listed = PAGE.read_text(encoding="utf-8").split("<!-- supported models -->")[1]
    names = re.findall(r"`(\w+)`", listed.split("<!-- end of supported models -->")[0])
    assert tuple(names) == known_models()


def test_every_model_has_an_oracle() -> None:
    configs = (hf_config(family, hf_config_values(family)) for family in ALL_RECIPES)
    tested = {str(config.get("text_config", config)["model_type"]) for config in configs}
    assert tested == set(known_models())
