"""An engine in this process behind the terminal chat."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pando.cli.endpoint import Usage
from pando.cli.local import LocalEndpoint
from pando.errors import ContextLengthExceeded, InvalidRequest
from tests.dummy_model import dummy_config


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEndpoint]:
    local = LocalEndpoint(dummy_config(tmp_path_factory.mktemp("model")))
    yield local
    local.close()
    assert not {"pando-client", "pando-engine"} & {thread.name for thread in threading.enumerate()}


def test_turns_share_their_past(endpoint: LocalEndpoint) -> None:
    messages = [{"role": "user", "content": "hello there"}]
    options = {"max_new_tokens": 6, "temperature": 0.0}
    first = list(endpoint.chat(messages, options))
    assert isinstance(first[-1], Usage) and 1 <= first[-1].completion_tokens <= 6
    again = list(endpoint.chat(messages, options))
    assert isinstance(again[-1], Usage)
    assert again[-1].cached_tokens == again[-1].prompt_tokens - 1
    assert again[:-1] == first[:-1] or "".join(map(str, again[:-1])) == "".join(map(str, first[:-1]))


def test_stopping_early_leaves_it_usable(endpoint: LocalEndpoint) -> None:
    pieces = endpoint.complete("abc", {"max_new_tokens": 200, "temperature": 1.0, "sampling_seed": 1})
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    last = list(endpoint.complete("abc", {"max_new_tokens": 2}))[-1]
    assert isinstance(last, Usage) and last.prompt_tokens == 3


def test_errors_are_raised_here(endpoint: LocalEndpoint) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        list(endpoint.complete("", {}))
    with pytest.raises(InvalidRequest, match="top_p"):
        list(endpoint.complete("abc", {"top_p": 2.0}))
    with pytest.raises(ContextLengthExceeded):
        list(endpoint.complete("abc " * 600, {}))
