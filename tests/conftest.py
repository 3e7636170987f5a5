"""PANDO_TEST_NATIVE names an extension module to test in place of the installed one (`make sanitize`)."""

from __future__ import annotations

import importlib.util
import os
import sys

if path := os.environ.get("PANDO_TEST_NATIVE"):
    assert "pando.kernels" not in sys.modules, "too late: the installed module is loaded"
    spec = importlib.util.spec_from_file_location("pando.kernels._native", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["pando.kernels._native"] = module
    spec.loader.exec_module(module)
