"""The option table: every field of `Config` as a flag, with the spellings other servers use as aliases."""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from pando.core import config as config_module
from pando.core.config import Config
from pando.errors import ConfigError

ALIASES: dict[str, tuple[str, ...]] = {
    "model_path": ("--model",),
    "tokenizer_path": ("--tokenizer",),
    "page_size": ("--block-size",),
    "context_length": ("--max-model-len",),
    "mem_fraction_static": ("--gpu-memory-utilization",),
    "max_running_requests": ("--max-num-seqs",),
    "chunked_prefill_size": ("--max-num-batched-tokens",),
    "schedule_policy": ("--scheduling-policy",),
    "disable_radix_cache": ("--no-enable-prefix-caching",),
    "disable_cuda_graph": ("--enforce-eager",),
    "cuda_graph_max_bs": ("--max-cudagraph-capture-size",),
    "random_seed": ("--seed",),
    "quantization": ("-q",),
}
"""Further spellings of a field's flag; the first spelling is always the field's own name."""

SERVER_FIELDS = (
    "host",
    "port",
    "api_key",
    "served_model_name",
    "max_queued_requests",
    "tool_call_parser",
    "reasoning_parser",
)
"""Fields that mean something to a server only."""

ALWAYS_ON: dict[str, str] = {
    "--enable-prefix-caching": "prefixes are always shared",
    "--enable-chunked-prefill": "long prompts are always cut into chunks",
    "--enable-metrics": "metrics are always at /metrics",
    "--enable-cache-report": "cached_tokens is always reported",
    "--enable-prompt-tokens-details": "cached_tokens is always reported",
    "--enable-mixed-chunk": "prefill and decode always share a step",
    "--enable-auto-tool-choice": "tool calls are always read",
}
"""Flags of other servers for what Pando does anyway: accepted, with a note."""

_ONE_DEVICE = "Pando runs a model on one device"
NOT_HERE: dict[str, str] = {
    "--tensor-parallel-size": _ONE_DEVICE,
    "--tp-size": _ONE_DEVICE,
    "--tp": _ONE_DEVICE,
    "--data-parallel-size": _ONE_DEVICE,
    "--dp-size": _ONE_DEVICE,
    "--dp": _ONE_DEVICE,
    "--pipeline-parallel-size": _ONE_DEVICE,
    "--trust-remote-code": "Pando never runs code that comes with a checkpoint",
    "--disable-overlap-schedule": "overlap is chosen with --overlap auto|on|off",
    "--no-async-scheduling": "overlap is chosen with --overlap auto|on|off",
    "--sampling-backend": "kernels are chosen with --kernels auto|native|reference",
    "--speculative-algorithm": "there is no speculative decoding",
    "--speculative-config": "there is no speculative decoding",
    "--lora-paths": "there are no adapters",
    "--enable-lora": "there are no adapters",
}
"""Flags of other servers without a counterpart: what to say instead of "unknown"."""

_KINDS: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float, "tuple[str, ...]": str}


@dataclass(frozen=True, slots=True)
class Flag:
    """One option: the Config field, its spellings (own name first), its annotation, default and sentence of help."""

    field: str
    names: tuple[str, ...]
    annotation: str
    default: object
    help: str

    @property
    def shown_default(self) -> str:
        """The default as people read it; empty where the help already explains None."""
        if self.default is None or self.default == () or self.default is False:
            return ""
        return str(self.default)


@functools.cache
def field_docs() -> dict[str, str]:
    """The string under each field of `Config`, as one line. Empty if the package was installed without sources."""
    source = config_module.__file__
    if source is None or not Path(source).is_file():
        return {}
    tree = ast.parse(Path(source).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    docs: dict[str, str] = {}
    for field, text in zip(body, body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


@functools.cache
def table() -> tuple[Flag, ...]:
    """All flags, in the order of `Config`."""
    docs = field_docs()
    return tuple(
        Flag(
            field=field.name,
            names=("--" + field.name.replace("_", "-"), *ALIASES.get(field.name, ())),
            annotation=str(field.type),
            default=None if field.default is MISSING else field.default,
            help=docs.get(field.name, ""),
        )
        for field in fields(Config)
    )


class _Note(argparse.Action):
    """Accept a flag for something that is always on, and remember to say so."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Add the note to `namespace.notes`."""
        name = option_string or ""
        namespace.notes = [*getattr(namespace, "notes", []), f"{name}: {ALWAYS_ON[name]}; the flag can go"]


def add_config_flags(parser: argparse.ArgumentParser, skip: Iterable[str] = ()) -> None:
    """Add a flag per field of `Config` not in `skip`. Only flags that are given appear in the namespace."""
    left_out = set(skip)
    group = parser.add_argument_group("engine and server options")
    for flag in table():
        if flag.field in left_out:
            continue
        text = flag.help + (f" (default {flag.shown_default})" if flag.shown_default else "")
        text = text.replace("%", "%%")
        if flag.annotation == "bool":
            group.add_argument(*flag.names, dest=flag.field, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        kind = flag.annotation.removesuffix(" | None")
        group.add_argument(
            *flag.names,
            dest=flag.field,
            action="append" if kind.startswith("tuple") else "store",
            type=_KINDS[kind],
            default=argparse.SUPPRESS,
            metavar=_METAVARS.get(kind, kind.upper()),
            help=text,
        )
    for name in ALWAYS_ON:
        parser.add_argument(name, action=_Note, nargs=0, help=argparse.SUPPRESS)


_METAVARS = {"str": "TEXT", "int": "N", "float": "X", "tuple[str, ...]": "TEXT"}


def config_from(args: argparse.Namespace, model: str | None = None) -> Config:
    """The Config that these arguments ask for. Raises ConfigError, also if two different models are named."""
    given = {name: value for name, value in vars(args).items() if name in Config.field_names()}
    if model is not None:
        if given.get("model_path", model) != model:
            raise ConfigError(f"two models are named: {model} and {given['model_path']}; give one", param="model_path")
        given["model_path"] = model
    for name in ("api_key", "served_model_name"):
        if name in given:
            given[name] = tuple(given[name])
    return Config.from_kwargs(**given)


def markdown() -> str:
    """The page docs/flags.md."""
    lines = [
        "# Flags",
        "",
        "Written by `make docs` from `pando/core/config.py`; a test checks that it is current. `pando serve` takes all",
        "of them; `pando chat`, `generate`, `plan` and `bench offline` take those that are not about the server. In",
        "Python they are the keyword arguments of `pando.Engine`, with underscores.",
        "",
        "| flag | also | default | meaning |",
        "|---|---|---|---|",
    ]
    for flag in table():
        also = " ".join(f"`{name}`" for name in flag.names[1:])
        default = f"`{flag.shown_default}`" if flag.shown_default else ""
        repeat = " May be repeated." if flag.annotation.startswith("tuple") else ""
        lines.append(f"| `{flag.names[0]}` | {also} | {default} | {(flag.help + repeat).replace('|', chr(92) + '|')} |")
    lines += ["", "Accepted and not needed, because it is always so:", ""]
    lines += [f"- `{name}`: {why}" for name, why in ALWAYS_ON.items()]
    lines += ["", 'Flags of other servers that have no counterpart get an answer instead of "unknown":', ""]
    lines += [f"- `{name}`: {why}" for name, why in NOT_HERE.items()]
    return "\n".join(lines) + "\n"
