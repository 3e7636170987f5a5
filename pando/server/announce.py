"""What a person sees while a server starts and stops: one live line per phase, then a box with everything to go on."""

from __future__ import annotations

import json
import time

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.status import Status
from rich.table import Table

from pando.core.config import Config
from pando.core.info import EngineInfo
from pando.core.messages import Load

_TITLES = {
    "starting": "starting the engine",
    "weights": "loading weights",
    "memory": "planning memory",
    "warmup": "warming up",
    "ready": "ready",
}


class Announcer:
    """Writes to the terminal; on anything else than a terminal, plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._phase = ""
        self._line = ""
        self._began = time.monotonic()
        self._phase_began = self._began

    def phase(self, load: Load) -> None:
        """The engine is doing this now."""
        title = _TITLES.get(load.phase, load.phase)
        if load.phase != self._phase:
            self._finish_phase()
            self._phase, self._phase_began = load.phase, time.monotonic()
        share = f" {load.fraction:.0%}" if 0.0 < load.fraction < 1.0 else ""
        detail = f" · {load.detail}" if load.detail else ""
        self._line = escape(f"{title}{share}{detail}")
        if self._console.is_terminal and self._status is None:
            self._status = self._console.status(self)
            self._status.start()

    def __rich__(self) -> str:
        """The live line, drawn anew several times a second so that the clock runs."""
        return f"{self._line} [dim]{time.monotonic() - self._phase_began:.1f} s[/dim]"

    def ready(self, config: Config, info: EngineInfo, *, port: int, can_chat: bool) -> None:
        """The server takes requests now."""
        self._finish_phase()
        url = base_url(config.host, port)
        rows = Table.grid(padding=(0, 2))
        for name, value in facts(config, info, url):
            rows.add_row(f"[bold]{name}[/bold]", escape(value))
        title = f"[bold green]Pando serves {escape(info.model_name)}[/bold green]"
        took = f"[dim]ready in {time.monotonic() - self._began:.1f} s · ctrl-C stops[/dim]"
        self._console.print(Panel(rows, title=title, subtitle=took, expand=False, border_style="green"))
        if not can_chat:
            self._console.print("[yellow]This model has no chat template: use completions, or give --chat-template.[/]")
        # Outside the box and unwrapped, so that it can be copied whole.
        self._console.print(curl(url, config, can_chat=can_chat), markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line."""
        self._finish_phase()
        self._console.print(escape(text))

    def _finish_phase(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._phase:
            seconds = time.monotonic() - self._phase_began
            self._console.print(f"[green]✓[/green] {self._line} [dim]{seconds:.1f} s[/dim]")
            self._phase = ""


def base_url(host: str, port: int) -> str:
    """The address to type on this machine."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def facts(config: Config, info: EngineInfo, url: str) -> list[tuple[str, str]]:
    """The box's rows: (name, value)."""
    size = f"{info.num_parameters / 1e6:,.1f} M parameters, " if info.num_parameters else ""
    full = max(1, info.max_total_num_tokens // max(1, info.context_length))
    rows = [
        ("Chat page", f"{url}/"),
        ("API base", f"{url}/v1"),
        ("Metrics", f"{url}/metrics"),
        ("Model", f"{info.model_path} ({size}{info.dtype} on {info.device}, {info.kernels} kernels)"),
        ("Context", f"{info.context_length:,} tokens"),
        ("KV pool", f"{info.max_total_num_tokens:,} tokens"),
        ("At once", f"{info.max_running_requests:,} sequences, {full:,} of them at full context"),
    ]
    if config.host not in ("127.0.0.1", "localhost", "::1") and not config.api_key:
        rows.append(("Access", f"open to everyone who reaches {config.host}; --api-key KEY closes it"))
    elif config.host in ("127.0.0.1", "localhost", "::1"):
        rows.append(("Access", "this machine only; --host 0.0.0.0 opens it to the network"))
    return rows


def curl(url: str, config: Config, *, can_chat: bool) -> str:
    """A command that answers, to copy and paste."""
    key = " -H 'Authorization: Bearer KEY'" if config.api_key else ""
    body: dict[str, object]
    if can_chat:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]}
    else:
        path, body = "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 32}
    return f"curl {url}{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
