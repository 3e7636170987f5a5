"""Every error a user can meet, each with its API code and HTTP status. Standard library only."""

from __future__ import annotations


class PandoError(Exception):
    """Base of all errors raised on purpose.

    `status` is the HTTP status, `type` and `code` the fields of an OpenAI error body, `param` the offending field.
    """

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(PandoError, ValueError):
    """The request names a value that can not be served; the message says which and what to do."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidGrammar(InvalidRequest):
    """A grammar or schema that is broken, too large or not supported; the message holds a JSON pointer."""

    code = "invalid_grammar"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested tokens do not fit the context."""

    code = "context_length_exceeded"


class AuthenticationFailed(PandoError):
    """Missing or wrong API key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(PandoError):
    """No model of that name is served, or the folder or hub id does not exist."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"


class RequestTimeout(PandoError):
    """The request's own deadline passed."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class RequestAborted(PandoError):
    """The request was aborted by its client or by an operator."""

    status = 499
    type = "aborted"
    code = "request_aborted"


class Overloaded(PandoError):
    """The queue is full; try again later."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class CapacityExceeded(PandoError):
    """The request can not fit the KV pool even when it runs alone."""

    status = 503
    type = "server_error"
    code = "kv_capacity_exceeded"


class EngineUnavailable(PandoError):
    """The engine is loading, draining or gone."""

    status = 503
    type = "server_error"
    code = "engine_unavailable"


class StepFailed(PandoError):
    """The forward pass of this request's step failed; other requests go on."""

    status = 500
    type = "server_error"
    code = "step_failed"


class GrammarFailed(PandoError):
    """A grammar could not go on: its budget is spent, or it and the model's tokens do not fit."""

    status = 400
    type = "invalid_request_error"
    code = "grammar_error"


class ConfigError(PandoError, ValueError):
    """A start-up option, model folder or combination that can not work."""

    status = 400
    type = "invalid_request_error"
    code = "config_error"


class UnsupportedModel(ConfigError):
    """The checkpoint's architecture is not known; the message lists what is."""

    code = "unsupported_model"


class MissingExtra(PandoError, ImportError):
    """An optional library is not installed; the message names the extra."""

    code = "missing_extra"


ERRORS: dict[str, type[PandoError]] = {
    cls.code: cls
    for cls in (
        PandoError,
        InvalidRequest,
        InvalidGrammar,
        GrammarFailed,
        ContextLengthExceeded,
        AuthenticationFailed,
        ModelNotFound,
        RequestTimeout,
        RequestAborted,
        Overloaded,
        CapacityExceeded,
        EngineUnavailable,
        StepFailed,
        ConfigError,
        UnsupportedModel,
        MissingExtra,
    )
}
"""Error classes by `code`, so that a failure crosses a process border as (code, message, param)."""


def from_code(code: str, message: str, param: str | None = None) -> PandoError:
    """Rebuild the error that another process reported."""
    return ERRORS.get(code, PandoError)(message, param=param)
