"""Which table is chosen, what is said about it, and what happens where nothing was compiled."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from types import ModuleType

import pytest

from pando.errors import ConfigError
from pando.kernels import cpu, explain, op_table, select
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE

OPS = [name for name in OpTable.__dataclass_fields__ if name != "name"]
needs_native = pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An install without the extension module, in a process that has not warned yet."""
    monkeypatch.setattr(cpu, "LOAD_ERROR", "No module named 'pando.kernels._native'")
    monkeypatch.setattr(select, "_warned", set())


@needs_native
def test_auto_and_native_give_the_best_level() -> None:
    best = cpu.best_isa()
    assert op_table("cpu").name == op_table("cpu", "native").name == f"cpu-{best}"


@needs_native
def test_pando_isa_caps_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANDO_ISA", "portable")
    assert op_table("cpu").name == "cpu-portable"
    monkeypatch.setenv("PANDO_ISA", "pentium")
    with pytest.raises(ConfigError, match="PANDO_ISA is 'pentium'; choose one of portable"):
        op_table("cpu")


def test_reference_is_given_when_asked_for() -> None:
    assert op_table("cpu", "reference") is op_table("cuda", "reference") is REFERENCE


def test_unknown_preference_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="kernels is 'fast'; choose one of auto, native, reference"):
        op_table("cpu", "fast")


def test_a_device_without_native_ops(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert op_table("xpu") is REFERENCE
    assert not caplog.records
    with pytest.raises(ConfigError, match="none for 'xpu' yet: use --kernels reference or auto"):
        op_table("xpu", "native")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_cuda_gets_the_triton_kernels() -> None:
    """In a process of its own: there the kernels are not meant for the interpreter, and nothing is launched."""
    code = (
        "from pando.kernels import explain, op_table\n"
        "import sys\n"
        "assert 'triton' not in sys.modules\n"
        "assert op_table('cuda') is op_table('cuda', 'native') and op_table('cuda').name == 'triton'\n"
        "found = explain('cuda')\n"
        "assert found.table == 'triton' and found.ops['rms_norm'] == 'native triton', found\n"
        "assert found.ops['logprobs'].startswith(('native', 'torch ('))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-800:]


def test_cuda_without_triton_warns_once_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(select, "_warned", set())
    with caplog.at_level(logging.WARNING):
        assert op_table("cuda") is op_table("cuda") is REFERENCE
    (record,) = caplog.records
    assert select.TRITON_REMEDY in record.getMessage()
    with pytest.raises(ConfigError, match="triton is not installed: pip install"):
        op_table("cuda", "native")


@pytest.mark.usefixtures("uncompiled")
def test_without_compiled_kernels_auto_warns_once_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert op_table("cpu") is op_table("cpu") is REFERENCE
    (record,) = caplog.records
    assert "reference kernels" in record.getMessage() and select.REMEDY in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.usefixtures("uncompiled")
def test_without_compiled_kernels_native_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="install a C\\+\\+ compiler"):
        op_table("cpu", "native")
    assert cpu.levels() == {} and cpu.num_threads() == 1


@needs_native
def test_explain_names_every_op_and_level() -> None:
    explanation = explain("cpu")
    assert list(explanation.ops) == OPS
    assert explanation.isa == cpu.best_isa() and list(explanation.levels) == list(cpu.levels())
    assert explanation.ops["paged_attention"] == f"native cpu-{explanation.isa}"
    assert set(cpu.NOT_NATIVE) == {name for name, how in explanation.ops.items() if how.startswith("torch (")}
    assert explanation.levels[cpu.best_isa()] == "chosen"
    assert len(explanation.lines()) == 1 + len(explanation.levels) + len(OPS)


@pytest.mark.usefixtures("uncompiled")
def test_explain_without_compiled_kernels_says_why() -> None:
    explanation = explain("cpu")
    assert explanation.isa is None and list(explanation.ops) == OPS
    assert all("No module named" in how for how in explanation.ops.values())
    assert explain("cpu", "reference").ops["pack_linear"] == "reference (asked for)"


def test_an_attention_backend_that_can_not_be_had_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="attention_backend is 'fast'; choose one of auto, triton, flashinfer"):
        op_table("cpu", attention="fast")
    for name in ("triton", "flashinfer"):
        with pytest.raises(ConfigError, match="needs an NVIDIA GPU, the device is 'cpu': use --attention-backend auto"):
            op_table("cpu", attention=name)
    with pytest.raises(ConfigError, match="the kernels are 'reference': use --attention-backend auto"):
        op_table("cuda", "reference", attention="triton")
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"can not be imported .*pip install 'pando-llm\[flashinfer\]'") as failed:
        op_table("cuda", "reference", attention="flashinfer")
    assert failed.value.param == "attention_backend"


def test_flashinfer_goes_in_front_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    select._flashinfer_table.cache_clear()
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    found = op_table("cuda", "reference", attention="flashinfer")
    assert found is op_table("cuda", "reference", attention="flashinfer"), "its memory is that of one table"
    changed = {name for name in OPS if getattr(found, name) is not getattr(REFERENCE, name)}
    assert changed == {"paged_attention", "attention_plan", "plan_rows"}
    assert found.name == "reference+flashinfer"
    assert op_table("cuda", "reference", attention="auto") is REFERENCE
    select._flashinfer_table.cache_clear()
