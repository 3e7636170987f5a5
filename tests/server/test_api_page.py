"""docs/api.md: its samples run, and its table has every route."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from starlette.routing import Mount, Route

from tests.server.harness import TOKENIZER, Server, live

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_samples_run() -> None:
    samples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(samples) == 2
    server = Server(TOKENIZER, served_model_names=["aspen"])
    with live(server) as url:
        for sample in samples:
            names: dict[str, Any] = {}
            exec(compile(sample.replace("http://127.0.0.1:30000", url), "docs/api.md", "exec"), names)
            if "client" in names:
                names["client"].close()
    assert len(server.engine.prompts) == 4


def test_every_route_is_listed() -> None:
    router: Any = Server().app._app  # type: ignore[attr-defined]
    paths = {route.path.replace(":path", "") for route in router.routes if isinstance(route, Route | Mount)}
    listed = set(re.findall(r"`(?:(?:GET|POST) )?(/[^` ]*)`", PAGE))
    aliases = {"/v1/tokenize", "/v1/detokenize", "/models/{name}"}
    assert paths - aliases <= listed
    assert {path for path in listed if path != "/v1/"} - {"/models"} <= paths
