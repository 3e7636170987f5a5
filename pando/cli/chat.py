"""`pando chat [MODEL | --url URL]`: talk with a model in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from pando.cli.endpoint import Endpoint, Message, Usage
from pando.cli.flags import SERVER_FIELDS, add_config_flags
from pando.cli.generate import SAMPLING, add_request_flags, open_endpoint, sampling_options
from pando.errors import PandoError

SUMMARY = "talk with a model in the terminal"

HELP = '''\
  /set NAME VALUE   set a sampling parameter (/set alone lists them)
  /system TEXT      set the system prompt and start afresh (/system alone removes it)
  /stats            totals of this session
  /reset            forget the conversation
  /help, /quit      this list; leave (also ctrl-D)
  """               open or close a text of several lines; a \\ at a line's end goes on, too
  ctrl-C            stop the answer that is being written'''


@dataclass
class Totals:
    """Sums over the turns of a session: tokens and seconds."""

    turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decode_seconds: float = 0.0

    def line(self) -> str:
        """One line for people."""
        share = 100 * self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        speed = self.completion_tokens / self.decode_seconds if self.decode_seconds else 0.0
        return (
            f"{self.turns} turns, {self.prompt_tokens} prompt tokens ({share:.0f} % from the cache), "
            f"{self.completion_tokens} new tokens, {speed:.0f} tok/s"
        )


@dataclass
class Session:
    """One conversation: its messages, its settings and what is known about its turns."""

    endpoint: Endpoint
    write: Callable[[str], None]
    options: dict[str, object] = field(default_factory=dict)
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)

    def handle(self, line: str) -> bool:
        """Run a command or a turn; False ends the session."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self.turn(line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit", "bye"):
            return False
        command = {
            "set": self.set,
            "system": self.set_system,
            "stats": self.stats,
            "reset": self.reset,
            "help": self.help,
        }.get(name)
        if command is None:
            self.write(f"no command /{name}; /help lists them\n")
        else:
            command(rest.strip())
        return True

    def set(self, text: str) -> None:
        """`/set NAME VALUE`; without a value the parameter goes back to the model's default."""
        kinds = {name: kind for _, name, kind, _ in SAMPLING}
        if not text:
            for _, name, _, explanation in SAMPLING:
                self.write(f"  {name:16} {self.options.get(name, 'default')!s:8} {explanation}\n")
            return
        name, _, value = text.partition(" ")
        name = name.replace("-", "_")
        if name not in kinds:
            self.write(f"no parameter {name}; known: {', '.join(kinds)}\n")
            return
        if not value:
            self.options.pop(name, None)
            return
        try:
            self.options[name] = kinds[name](value)
        except ValueError:
            self.write(f"{value!r} is not a number\n")

    def set_system(self, text: str) -> None:
        """`/system TEXT`."""
        self.system = text or None
        self.reset("")

    def stats(self, _: str) -> None:
        """`/stats`."""
        self.write(self.totals.line() + "\n")

    def reset(self, _: str) -> None:
        """`/reset`."""
        self.messages = []
        self.write("a new conversation\n")

    def help(self, _: str) -> None:
        """`/help`."""
        self.write(HELP + "\n")

    def turn(self, text: str) -> None:
        """Send `text`, write the answer as it comes and a line of figures after it.

        An answer stopped with ctrl-C stays in the conversation as far as it got; after an error the turn is forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        start = time.perf_counter()
        first: float | None = None
        answer = ""
        usage: Usage | None = None
        try:
            with closing(self.endpoint.chat(system + self.messages, self.options)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    if isinstance(piece, Usage):
                        usage = piece
                        continue
                    first = first or time.perf_counter()
                    answer += piece
                    self.write(piece)
        except KeyboardInterrupt:
            self.write(" (stopped)")
        except PandoError as error:
            self.messages.pop()
            self.write(f"{error.message}\n")
            return
        self.messages.append({"role": "assistant", "content": answer})
        end = time.perf_counter()
        self.write("\n")
        if usage is not None:
            self._account(usage, (first or end) - start, end - (first or end))

    def _account(self, usage: Usage, wait: float, decode: float) -> None:
        totals = self.totals
        totals.turns += 1
        totals.prompt_tokens += usage.prompt_tokens
        totals.cached_tokens += usage.cached_tokens
        totals.completion_tokens += usage.completion_tokens
        totals.decode_seconds += decode
        # The first token is paid for by the wait, so the speed counts the ones after it.
        speed = (usage.completion_tokens - 1) / decode if decode > 0 and usage.completion_tokens > 1 else 0.0
        cut = ", cut at the length limit" if usage.finish_reason == "length" else ""
        self.write(
            dim(
                f"[{speed:.0f} tok/s, first token {wait * 1000:.0f} ms, prompt {usage.prompt_tokens} tokens, "
                f"{usage.cached_tokens} cached{cut}]"
            )
            + "\n"
        )


def dim(text: str) -> str:
    """`text` in grey where the terminal has colours."""
    from pando import env

    plain = env.read("NO_COLOR") is not None or not sys.stdout.isatty()
    return text if plain else f"\033[2m{text}\033[0m"


def read_turn(read: Callable[[str], str]) -> str:
    """The next input; triple quotes or a backslash at the end make it span lines. EOFError at the end of input."""
    line = read(">>> ")
    if line.lstrip().startswith('"""'):
        lines = [line.lstrip()[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(read("... "))
        return "\n".join([*lines[:-1], lines[-1].rstrip()[:-3]]).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("... "))
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="built-in name, folder or hub id (default aspen)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_request_flags(parser)
    add_config_flags(parser, skip=SERVER_FIELDS)
    parser.set_defaults(run=run, prog=parser.prog)


def write(text: str) -> None:
    """Write to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def run(args: argparse.Namespace) -> int:
    """Talk until /quit or the end of input; returns the exit code."""
    if sys.stdin.isatty():
        # Importing it is what gives input() its line editing and history.
        import readline  # noqa: F401
    with closing(open_endpoint(args, args.model)) as endpoint:
        session = Session(endpoint, write, sampling_options(args), args.system)
        write(f"{endpoint.model}: write something; /help lists the commands, ctrl-D leaves\n")
        while True:
            try:
                line = read_turn(input)
            except EOFError:
                write("\n")
                return 0
            except KeyboardInterrupt:
                write(" (/quit or ctrl-D leaves)\n")
                continue
            if not session.handle(line):
                return 0
