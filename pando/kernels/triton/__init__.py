"""Kernels for NVIDIA GPUs in Triton. Nothing outside this package imports triton, and this package only on demand.

Each module holds kernels, the functions of the op table that launch them, and `COMPILE_CASES`: the launches that the
compile test builds for real targets. On tensors of the CPU the kernels run in Triton's interpreter if
TRITON_INTERPRET=1 is set before they are imported.
"""

from __future__ import annotations

import os

# Products and sums are contracted to fused multiply-adds, as compilers for GPUs do; said aloud, because Triton warns
# of an unset default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
