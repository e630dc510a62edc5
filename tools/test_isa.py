"""Run tests with the kernels of each instruction set that this processor has: `tools/test_isa.py PYTEST_ARGUMENT ...` (`make test-isa`).

ATen, oneDNN and MKL choose kernels for the processor's instruction set, and each kernel sums in a different order. A test whose tolerance
is right passes with all of them. Slow tests are left out.
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
"""For each name: the required flag of /proc/cpuinfo, and the environment variables that limit the libraries to this instruction set."""


def main() -> int:
    """Return the exit code: 0 if all runs passed, else pytest's code of the last one that failed."""
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
