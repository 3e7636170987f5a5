"""Guards of the house rules: who may import whom, where torch stays out, and how big things may get.

The layer table lives here. `python -m tests.test_architecture docs/architecture.md` writes it into that page.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pando"


@dataclass(frozen=True)
class Room:
    """A module or package: its layer (it imports strictly lower ones or itself), may it import torch, its job."""

    name: str
    layer: int
    torch: bool
    job: str


ROOMS: tuple[Room, ...] = (
    Room("errors", 0, False, "every error a user can meet, with API code and HTTP status"),
    Room("env", 0, False, "environment variables"),
    Room("log", 0, False, "log lines"),
    Room("registry", 0, False, "names to factories"),
    Room("imports", 0, False, "importing what is large"),
    Room("gguf", 1, False, "heads of GGUF files: metadata, where the tensors are"),
    Room("core", 1, False, "contracts: sampling parameters, options, messages, batches"),
    Room("tokenizer", 2, False, "text to tokens and back, chat templates, incremental detokenisation"),
    Room("grammar", 2, False, "what an output must match: schemas, grammars and tool calls as masks over tokens"),
    Room("transport", 2, False, "frames between two processes"),
    Room("kernels", 2, True, "the op table; reference and native implementations"),
    Room("device", 2, True, "memory, cores and instruction set of the machine"),
    Room("cache", 3, False, "radix tree, pages, what a request may use of them"),
    Room("cache.pool", 3, True, "the tensors behind the pages"),
    Room("forward", 4, True, "records of one forward pass; the attention backend protocol"),
    Room("attention", 5, True, "attention backends"),
    Room("quant", 5, True, "quantised weights: rounding at load, reading what is quantised on disk"),
    Room("layers", 6, True, "parts of a model"),
    Room("models", 7, True, "the decoder, a file per family, loading weights"),
    Room("runtime", 8, True, "runs batches: inputs, forward pass, sampling, memory plan"),
    Room("speculative", 9, True, "drafters"),
    Room("scheduler", 10, False, "which tokens run in the next step"),
    Room("engine", 11, True, "the only place that reads Config and builds objects"),
    Room("engine_main", 12, True, "the engine process: imports the engine and runs it"),
    Room("engine_client", 11, False, "the API side of the engine"),
    Room("engine_process", 11, False, "starts an engine in a process of its own"),
    Room("native", 12, False, "the native request and reply, over HTTP and in a process"),
    Room("api", 13, True, "`pando.Engine`"),
    Room("server", 13, False, "HTTP routes and the web page"),
    Room("lang", 14, False, "the frontend language"),
    Room("bench", 14, False, "load generation and reports"),
    Room("doctor", 14, False, "examines a machine and an installation"),
    Room("cli", 15, False, "the `pando` command"),
    Room("__main__", 16, False, "`python -m pando`"),
    Room("launch_server", 16, False, "`python -m pando.launch_server`"),
)

LAZY_TORCH_ROOMS = ("bench.offline", "doctor")
"""Torch-free to import, but their functions load the engine or measure tensors."""

TORCH_FREE_IMPORTS = (
    "pando",
    "pando.core.config",
    "pando.core.messages",
    "pando.core.batch",
    "pando.core.sampling",
    "pando.scheduler",
    "pando.cache.manager",
    "pando.tokenizer",
    "pando.grammar.manager",
    "pando.grammar.guidance",
    "pando.grammar.tools",
    "pando.grammar.wrappers",
    "pando.transport",
    "pando.engine_client",
    "pando.server.launch",
    "pando.cli",
    "pando.bench.serving",
    "pando.doctor",
)

CONFIG_FIELDS = (
    "model_path tokenizer_path revision quantization load_format packed_cache packed_cache_gb served_model_name "
    "chat_template tool_call_parser reasoning_parser device dtype kv_cache_dtype "
    "kernels attention_backend enable_deterministic_inference "
    "num_threads page_size context_length mem_fraction_static max_total_tokens kv_prefault_gb max_running_requests "
    "max_queued_requests chunked_prefill_size schedule_policy disable_radix_cache radix_eviction_policy "
    "state_checkpoints overlap disable_cuda_graph cuda_graph_max_bs enable_torch_compile random_seed host port "
    "api_key log_level"
).split()
"""A new option changes this list in the same commit, with its test and its line of docs."""

MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PUBLIC_METHODS, MAX_CONSTRUCTOR_ARGUMENTS = 600, 60, 15, 8

DATA_MODULES = ("training/aspen/faq.py", "training/aspen/banks.py")
"""Tables written as Python: as long as they are."""

DEVICE_NAMES = frozenset({"cpu", "cuda", "mps", "xpu"})
DEVICE_ROOMS = ("device", "kernels", "attention", "engine", "runtime.memory")
"""Where a device's name may be compared; everybody else asks these."""

VAGUE_MODULES = frozenset({"utils", "util", "helpers", "helper", "misc", "common"})


# ---- reading the tree ---------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """`pando.cache.pool` for .../pando/cache/pool.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    """All modules of the package by dotted name."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(module: str) -> Room | None:
    """The most specific room that holds a `pando.` module; None for the package's own __init__."""
    name = module.removeprefix("pando").removeprefix(".")
    while name:
        for room in ROOMS:
            if room.name == name:
                return room
        name = name.rpartition(".")[0]
    return None


def is_type_checking(node: ast.If) -> bool:
    """True for `if TYPE_CHECKING:`."""
    return "TYPE_CHECKING" in ast.dump(node.test)


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """(absolute dotted name, line, for type checkers only) of every import, at any depth."""

    def walk(node: ast.AST, typing_only: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, typing_only
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = module.split(".") if is_package else module.split(".")[:-1]
                    kept = parents[: len(parents) - child.level + 1]
                    base = ".".join([*kept, base] if base else kept)
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield (full if full in modules() else base), child.lineno, typing_only
            else:
                yield from walk(child, typing_only or (isinstance(child, ast.If) and is_type_checking(child)))

    yield from walk(tree, False)


def package_imports(module: str) -> Iterator[tuple[str, int, bool]]:
    """The imports of one module of the package."""
    path = modules()[module]
    return imports(tree_of(path), module, path.name == "__init__.py")


def where(path: Path, line: int) -> str:
    """file:line, relative to the repository."""
    return f"{path.relative_to(ROOT)}:{line}"


# ---- layers -------------------------------------------------------------------------------------------------------


def test_every_module_has_a_room() -> None:
    homeless = [name for name in modules() if name != "pando" and room_of(name) is None]
    assert not homeless, f"give these modules a row in ROOMS: {homeless}"


def layer_faults() -> list[str]:
    """Imports that go sideways or upwards."""
    faults = []
    for module, path in modules().items():
        room = room_of(module)
        for target, line, _ in package_imports(module):
            if room is None or target.split(".")[0] != "pando":
                continue
            if target == "pando":
                continue  # the version; anything else there is loaded on demand, see test_package_is_light
            other = room_of(target)
            assert other is not None, f"{where(path, line)}: {target} is in no room"
            same_package = room.name.split(".")[0] == other.name.split(".")[0]
            if not same_package and other.layer >= room.layer:
                faults.append(f"{where(path, line)}: {module} (L{room.layer}) imports {target} (L{other.layer})")
    return faults


def test_imports_go_down() -> None:
    assert not layer_faults(), "\n".join(layer_faults())


def test_layer_check_sees_a_fault() -> None:
    tree = ast.parse("def f():\n    from pando.server import x\n    import pando.engine")
    found = [target for target, _, _ in imports(tree, "pando.core.batch", False)]
    assert found == ["pando.server", "pando.engine"]
    core, server = room_of("pando.core.batch"), room_of("pando.server.http")
    assert core is not None and server is not None and core.layer < server.layer
    relative = ast.parse("from . import spec\nfrom ..core import batch")
    assert [t for t, _, _ in imports(relative, "pando.cache.manager", False)] == [
        "pando.cache.spec",
        "pando.core.batch",
    ]


def test_no_package_cycles() -> None:
    edges: dict[str, set[str]] = {}
    for module in modules():
        room = room_of(module)
        targets = (room_of(target) for target, _, _ in package_imports(module) if target.startswith("pando."))
        if room is not None:
            top = room.name.split(".")[0]
            edges.setdefault(top, set()).update(t.name.split(".")[0] for t in targets if t is not None)
    seen: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"packages import each other in a circle: {' -> '.join([*trail, name])}"
        if name in seen:
            return
        for target in sorted(edges.get(name, set()) - {name}):
            visit(target, (*trail, name))
        seen.add(name)

    for name in edges:
        visit(name, ())


def test_torch_stays_in_its_rooms() -> None:
    faults = []
    for module, path in modules().items():
        room = room_of(module)
        may = room is not None and (room.torch or any(module.startswith(f"pando.{name}") for name in LAZY_TORCH_ROOMS))
        for target, line, typing_only in package_imports(module):
            if target.split(".")[0] in ("torch", "triton") and not may and not typing_only:
                faults.append(f"{where(path, line)}: {module} imports {target}")
    assert not faults, "\n".join(faults)


TRITON_ROOM = "pando.kernels.triton"
"""The only place that imports triton; the table in it is loaded by `pando.kernels.select` alone."""


def test_triton_stays_in_its_room() -> None:
    faults = []
    for module, path in modules().items():
        inside = module == TRITON_ROOM or module.startswith(f"{TRITON_ROOM}.")
        for target, line, _ in package_imports(module):
            may = inside or (target == f"{TRITON_ROOM}.table" and module == "pando.kernels.select")
            if not may and (target.split(".")[0] == "triton" or target.startswith(TRITON_ROOM)):
                faults.append(f"{where(path, line)}: {module} imports {target}")
    assert not faults, "\n".join(faults)


def run_python(code: str) -> str:
    """What a fresh interpreter says about `code` on standard error; empty if it ends well."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else done.stderr.strip()[-800:]


def test_imports_leave_torch_out() -> None:
    """One interpreter imports them all; the first one that brings torch along is named."""
    code = (
        "import importlib, sys\n"
        f"for name in {TORCH_FREE_IMPORTS!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = sorted({'torch', 'transformers', 'triton'} & set(sys.modules))\n"
        "    if heavy:\n"
        "        sys.exit(f'import {name} loads {heavy}')\n"
    )
    assert run_python(code) == ""
    assert "loads ['torch']" in run_python(code.replace("'pando',", "'pando', 'torch',", 1)), "the check sees torch"


# ---- sizes and names ----------------------------------------------------------------------------------------------


def python_files() -> list[Path]:
    """Everything we write in Python."""
    folders = ("pando", "tests", "training", "benchmarks", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """All functions and classes in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def test_modules_are_short() -> None:
    counts = {str(path.relative_to(ROOT)): line_count(path) for path in python_files()}
    long = [f"{name}: {count} lines" for name, count in counts.items() if count > MAX_MODULE_LINES]
    assert not [text for text in long if not text.startswith(DATA_MODULES)]


def line_count(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def test_functions_are_short() -> None:
    long = []
    for path in python_files():
        for node in definitions(path):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if not isinstance(node, ast.ClassDef) and length > MAX_FUNCTION_LINES:
                long.append(f"{where(path, node.lineno)}: {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_classes_are_narrow() -> None:
    faults = []
    for path in modules().values():
        for node in definitions(path):
            if not isinstance(node, ast.ClassDef):
                continue
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            public = [item.name for item in methods if not item.name.startswith("_")]
            if len(public) > MAX_PUBLIC_METHODS:
                faults.append(f"{where(path, node.lineno)}: {node.name} has {len(public)} public methods")
            for init in (item for item in methods if item.name == "__init__"):
                count = len(init.args.posonlyargs + init.args.args + init.args.kwonlyargs) - 1
                if count > MAX_CONSTRUCTOR_ARGUMENTS:
                    faults.append(f"{where(path, init.lineno)}: {node.name}() takes {count} arguments")
    assert not faults, "\n".join(faults)


def test_modules_have_telling_names() -> None:
    vague = [str(path.relative_to(ROOT)) for path in python_files() if path.stem in VAGUE_MODULES]
    assert not vague, f"name these after what they hold: {vague}"


def test_modules_say_what_they_are() -> None:
    silent = [str(path.relative_to(ROOT)) for path in modules().values() if not ast.get_docstring(tree_of(path))]
    assert not silent, f"no docstring: {silent}"


# ---- the scheduler and devices ------------------------------------------------------------------------------------


def is_record(node: ast.ClassDef) -> bool:
    """True for frozen dataclasses and structs: plain results, whose kind may be asked."""
    return "frozen" in "".join(ast.dump(part) for part in [*node.decorator_list, *node.keywords])


def class_names(*packages: str) -> set[str]:
    """Names of the classes defined in these packages, records left out."""
    return {
        node.name
        for module, path in modules().items()
        if any(module == f"pando.{name}" or module.startswith(f"pando.{name}.") for name in packages)
        for node in definitions(path)
        if isinstance(node, ast.ClassDef) and not is_record(node)
    }


def test_scheduler_asks_no_type() -> None:
    """The loop must not know features by class: no isinstance on cache, backend or runner types."""
    concrete = class_names("cache", "attention", "runtime", "models", "speculative")
    faults = []
    for module, path in modules().items():
        if not module.startswith("pando.scheduler"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                asked |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
                faults += [f"{where(path, node.lineno)}: isinstance(..., {name})" for name in sorted(asked & concrete)]
    assert not faults, "\n".join(faults)


def device_comparisons(tree: ast.Module) -> Iterator[int]:
    """Lines that compare something with a device's name."""
    for node in ast.walk(tree):
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.MatchValue):
            parts = [node.value]
        if any(isinstance(n, ast.Constant) and n.value in DEVICE_NAMES for part in parts for n in ast.walk(part)):
            yield node.lineno if isinstance(node, ast.Compare) else node.value.lineno  # type: ignore[attr-defined]


def test_device_names_are_compared_in_few_places() -> None:
    allowed = tuple(f"pando.{name}" for name in DEVICE_ROOMS)
    faults = [
        where(path, line)
        for module, path in modules().items()
        if not any(module == name or module.startswith(f"{name}.") for name in allowed)
        for line in device_comparisons(tree_of(path))
    ]
    assert not faults, f"compare device names in {allowed} only: {faults}"


def test_device_check_sees_comparisons() -> None:
    text = "a = x == 'cpu'\nb = y in ('cuda', 'mps')\nmatch z:\n    case 'cpu':\n        pass\nc = 'cpu'"
    assert sorted(device_comparisons(ast.parse(text))) == [1, 2, 4]


# ---- frozen surfaces ----------------------------------------------------------------------------------------------


def test_config_fields_are_frozen() -> None:
    from pando.core.config import Config

    assert list(Config.field_names()) == CONFIG_FIELDS


def exported_names() -> dict[str, list[str]]:
    """`__all__` of each module that has one: a plain list at top level."""
    found: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in tree_of(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                assert isinstance(node, ast.Assign)
                found[module] = list(ast.literal_eval(node.value))
    return found


def test_exported_names_exist() -> None:
    exported = exported_names()
    assert {"pando", "pando.cli", "pando.kernels"} <= set(exported)
    assert [module for module, names in exported.items() if len(names) != len(set(names))] == []
    code = (
        "import importlib, sys\n"
        f"for module, names in {exported!r}.items():\n"
        "    missing = [name for name in names if not hasattr(importlib.import_module(module), name)]\n"
        "    if missing:\n"
        "        sys.exit(f'{module}.__all__ names {missing}')\n"
    )
    assert run_python(code) == ""


def test_public_surface_is_frozen() -> None:
    """What `import pando` offers; a new name changes this list in the same commit."""
    assert exported_names()["pando"] == ["Engine", "__version__"]


# ---- the page -----------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- layer table: written by make docs -->", "<!-- end of layer table -->"


def layer_table() -> str:
    """The table as Markdown, without rooms that are not built."""
    built = {room.name for module in modules() if (room := room_of(module)) is not None}
    lines = ["| layer | room | torch | what is in it |", "|---|---|---|---|"]
    for room in ROOMS:
        if room.name in built:
            path = PACKAGE / room.name.replace(".", "/")
            shown = f"pando/{path.relative_to(PACKAGE)}" + ("/" if path.is_dir() else ".py")
            lines.append(f"| L{room.layer} | `{shown}` | {'T' if room.torch else ''} | {room.job} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """`page` with the current table between its markers."""
    head, _, rest = page.partition(BEGIN)
    _, found, tail = rest.partition(END)
    assert found, "docs/architecture.md has lost the markers of the layer table"
    return f"{head}{BEGIN}\n{layer_table()}\n{END}{tail}"


def test_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == with_table(page), "run `make docs`"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text(encoding="utf-8")), encoding="utf-8")
