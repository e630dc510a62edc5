"""Try other versions of megatron-core and print a table of what works (`make test-engines`):

    python tools/try_engines.py .venv/bin/python=0.16.0,0.16.1 .venv312/bin/python=0.17.0,0.18.2 [--tests tests/platform ...]

Each version is installed into a folder of its own, which precedes the interpreter's own megatron-core on the import path. Every family's
debug recipe trains two steps on four processes, resumes for two more in another layout, and is exported. The losses must match those in
`tests/golden_runs`; the table shows by how much they differ. A plan is made, and the tests given with `--tests` are run. Failures are
listed below the table; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden_runs"
MODEL_PARALLEL = ("--parallel.tensor", "2", "--parallel.pipeline", "2")
LAYOUTS = {
    "debug_mm1": (MODEL_PARALLEL, ()),
    "debug_mm1_moe": (("--parallel.tensor", "2", "--parallel.expert", "2"), ("--parallel.pipeline", "2")),
    "debug_infimm": (MODEL_PARALLEL, ()),
    "debug_mono_internvl": (MODEL_PARALLEL, ()),
}
"""For each recipe, the layout for training on four processes and the layout for resuming on two."""
STEPS = (2, 4)
"""Step at which training stops first, and step at which it ends."""
TOLERANCE = 2e-5
"""Relative, fp32: 1e-5 between processors (`tests/test_golden_runs.py`) plus 1e-5 between layouts (`tests/parallel/test_layouts.py`)."""
TIMEOUT = 900
"""Time limit of one command, in seconds; the tests may take four times as long."""


@dataclass
class Engine:
    """A version of megatron-core with its interpreter, and the results of its trials."""

    python: Path
    version: str
    folder: Path
    """Folder that the version is installed in."""
    out: Path
    """Folder of its runs and logs."""
    cells: dict[str, str] = field(default_factory=dict)
    """Row of the table: column to text."""
    problems: list[str] = field(default_factory=list)

    def run(self, name: str, *words: str | Path, timeout: int = TIMEOUT) -> str:
        """Run this interpreter and return its output, which is also logged; raise RuntimeError with its error line if it fails."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [str(word) for word in (self.python, *words)]
        log = self.out / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                raise RuntimeError(f"not done after {timeout} s: see {log}") from None
        text = log.read_text()
        if code:
            raise RuntimeError(f"exit code {code}: {_error(text)} (see {log})")
        return text


def _error(text: str) -> str:
    """Return the last line of a log that reports an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "Error: " in line or "ERROR: " in line or "megatron-mm: error" in line]
    return (said or lines or ["no output"])[-1][:240]


def install(engine: Engine) -> None:
    """Install megatron-core alone, in the requested version: the interpreter's environment already has its dependencies.

    Raises RuntimeError if there is no such version for this interpreter.
    """
    if engine.folder.is_dir():
        return
    aside = engine.folder.with_name(f"{engine.folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    wanted = f"megatron-core=={engine.version}"
    words = ("-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target", str(aside), wanted)
    done = subprocess.run([str(engine.python), *words], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{wanted} cannot be installed: {_error(done.stderr)}")
    aside.rename(engine.folder)


def versions(engine: Engine) -> str:
    """Fill the columns with version numbers; return what `doctor` reports about megatron-core."""
    program = "import sys, importlib.metadata as m; print(sys.version.split()[0], *(m.version(p) for p in ('torch', 'megatron-core')))"
    python, torch, core = engine.run("versions", "-c", program).split()[-3:]
    if core != engine.version:
        raise RuntimeError(f"megatron-core {core} is imported, not {engine.version}")
    engine.cells.update({"Python": python, "torch": torch})
    doctor = engine.run("doctor", "-m", "megatron_mm", "doctor")
    line = next(line for line in doctor.splitlines() if "megatron-core" in line)
    return "ok" if line.split()[0] == "ok" else line.strip()


def train(engine: Engine, recipe: str, data: Path) -> str:
    """Train, resume in another layout, compare losses, export."""
    run_dir, export = engine.out / recipe, engine.out / f"{recipe}_hf"
    for former in (run_dir, export):
        shutil.rmtree(former, ignore_errors=True)
    first, second = LAYOUTS[recipe]
    always = ("--run-dir", run_dir, "--data.path", data, "--eval.interval", "0", "--monitor.wandb", "disabled", "--data.decoder", "pillow")
    for name, processes, steps, layout in (("train", 4, STEPS[0], first), ("resume", 2, STEPS[1], second)):
        launcher = ("-m", "megatron_mm.run.launcher", "--standalone", "--nproc-per-node", str(processes), "-m", "megatron_mm")
        with _naming(name):
            engine.run(f"{recipe}_{name}", *launcher, "train", recipe, *always, "--train.steps", str(steps), *layout)
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = json.loads((GOLDEN / f"{recipe}.json").read_text())["losses"]
    off = max(abs(loss - other) / other for loss, other in zip(losses, wanted, strict=True))
    if off > TOLERANCE:
        raise RuntimeError(f"losses {losses} are {off:.1e} from {wanted}")
    with _naming("export"):
        checkpoint = run_dir / "checkpoints" / f"step_{STEPS[1]:08d}"
        engine.run(f"{recipe}_export", "-m", "megatron_mm", "convert", "to-hf", checkpoint, export)
    return f"ok, {off:.0e}"


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefix errors raised inside the context with the name of the step."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from None


def plan(engine: Engine) -> str:
    engine.run("plan", "-m", "megatron_mm", "plan", "mm1_3b", "--num-gpus", "16")
    return "ok"


def tests(engine: Engine, paths: list[str]) -> str:
    """Run the tests; return pytest's last line without its time."""
    said = engine.run("tests", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths, timeout=4 * TIMEOUT)
    return said.strip().splitlines()[-1].strip("= ").split(" in ")[0]


def trials(engine: Engine, data: Path, paths: list[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield each column of the table and the function that fills it."""
    yield "doctor", lambda: versions(engine)
    for recipe in LAYOUTS:
        yield recipe, lambda recipe=recipe: train(engine, recipe, data)  # type: ignore[misc]
    yield "plan", lambda: plan(engine)
    if paths:
        yield "tests", lambda: tests(engine, paths)


def table(engines: list[Engine]) -> str:
    """Format the table, one row per version."""
    columns = list(dict.fromkeys(column for engine in engines for column in ("Python", "torch", *engine.cells)))
    rows = [["megatron-core", *columns]] + [[engine.version, *(engine.cells.get(column, "") for column in columns)] for engine in engines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", metavar="PYTHON=VERSION,VERSION", help="an interpreter and the versions to try with it")
    parser.add_argument("--tests", nargs="*", default=[], metavar="PATH", help="tests to run on each")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "megatron_core", help="where versions are installed (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "engines_tried", help="runs and logs (default: %(default)s)")
    arguments = parser.parse_args()
    engines = []
    for words in arguments.engines:
        python, _, numbers = words.partition("=")
        for version in filter(None, numbers.split(",")):
            name = f"{version}_{Path(python).absolute().parents[1].name.strip('.')}"
            engines.append(Engine(Path(python).absolute(), version, arguments.folder / version, arguments.out / name))
    data = arguments.out / "data"
    for engine in engines:
        engine.folder.parent.mkdir(parents=True, exist_ok=True)
        engine.out.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            install(engine)
        except RuntimeError as error:
            engine.problems.append(str(error))
            print(f"{engine.version}: {error}", flush=True)
            continue
        if not data.is_dir():
            engine.run("data", "-m", "megatron_mm", "prepare", "demo", "--out", data, "--samples", "240")
        for column, trial in trials(engine, data, arguments.tests):
            try:
                engine.cells[column] = trial()
            except RuntimeError as error:
                engine.cells[column] = "FAILED"
                engine.problems.append(f"{column}: {error}")
            print(f"{engine.version}: {column} {engine.cells[column]}", flush=True)
        print(f"{engine.version}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"\n{table(engines)}")
    for engine in engines:
        for problem in engine.problems:
            print(f"{engine.version}, {problem}")
    return int(any(engine.problems for engine in engines))


if __name__ == "__main__":
    sys.exit(main())
