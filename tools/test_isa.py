"""Run tests with the kernels of each instruction set that this processor has: `tools/test_isa.py PYTEST_ARGUMENT ...` (`make test-isa`).

ATen, oneDNN and MKL choose their kernels by what the processor offers, and each of them adds in another order. A test whose tolerance is
right passes with all of them. Slow tests are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INSTRUCTION_SETS = {
    "sse4": ("sse4_2", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    "avx2": ("avx2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "avx512": ("avx512f", {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}),
}
"""By name: the flag of /proc/cpuinfo that it needs, and what limits the libraries to it."""


def main() -> int:
    """The exit code: 0 where all passed, else pytest's of the last that failed."""
    has, code = set(Path("/proc/cpuinfo").read_text().split()), 0
    for name, (flag, limits) in INSTRUCTION_SETS.items():
        if flag not in has:
            print(f"== {name}: this processor has no {flag}, skipped", flush=True)
            continue
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", *sys.argv[1:]], env={**os.environ, **limits})
        code = done.returncode or code
    return code


if __name__ == "__main__":
    sys.exit(main())
