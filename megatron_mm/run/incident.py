"""Collects the positions of all processes when a run stopped, and concludes which process caused it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_WAITING = ("distributed_c10d.py", "p2p_communication.py", "param_and_grad_buffer.py", "parallel/sums.py", "parallel/text_sharing.py")
"""A process waits for others if one of these files is near the top of its stack."""
_NEAR = 4
"""Number of frames that count as near the top."""
_PY_SPY_SECONDS = 20


@dataclass(frozen=True)
class Here:
    """A process of a run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Standing(Here):
    """Position of a process."""

    step: int
    phase: str
    seconds: float
    """Seconds since its last progress."""
    since: float
    """Time of its last progress, seconds since 1970."""
    last_collective: str
    frames: list[str] = field(default_factory=list)
    """Frames of its main thread, innermost first: FILE:LINE FUNCTION."""
    problem: str = ""
    """The error that ended it; empty if it hangs."""

    @property
    def waits_for_others(self) -> bool:
        return bool(self.problem) or any(place in frame for frame in self.frames[:_NEAR] for place in _WAITING)

    @property
    def where(self) -> str:
        """Description of the position; the same for all processes at that position."""
        return f"step {self.step}, {self.phase}; last collective: {self.last_collective}; in {self.frames[0] if self.frames else '?'}"


def write(value: Here, path: Path) -> None:
    """Write a process's file so that a reader sees all of it or nothing."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(asdict(value)) + "\n")
    partial.rename(path)


def frames_of(thread: int) -> list[str]:
    """The Python frames of a thread, innermost first; paths are cut to their last three parts."""
    found: list[str] = []
    frame = sys._current_frames().get(thread)
    while frame is not None and len(found) < 40:
        parts = frame.f_code.co_filename.split(os.sep)
        found.append(f"{'/'.join(parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return found


def frames_of_error(error: BaseException) -> list[str]:
    """The Python frames in which an error was raised, in the form of `frames_of`."""
    found = [
        f"{'/'.join(part.filename.split(os.sep)[-3:])}:{part.lineno} {part.name}" for part in traceback.extract_tb(error.__traceback__)
    ]
    return found[::-1][:40]


def read_folder(folder: Path) -> tuple[list[Standing], list[Here]]:
    """Read the positions that processes have written, by rank, and which processes have written none since they started."""
    standings = [Standing(**json.loads(path.read_text())) for path in sorted(folder.glob("rank-*.json"))]
    ranks = {standing.rank for standing in standings}
    everybody = [Here(**json.loads(path.read_text())) for path in sorted(folder.glob("rank-*.here"))]
    return standings, [here for here in everybody if here.rank not in ranks]


def report(standings: Sequence[Standing], silent: Sequence[Here], *, folder: Path) -> str:
    """Compose the report: its first line names the process that caused the stop, as far as can be determined; the positions of all
    processes follow."""
    lost = [standing for standing in standings if standing.problem]
    step = max((standing.step for standing in standings), default=0)
    longest = max((standing.seconds for standing in standings), default=0.0)
    what = f"contact with other processes was lost in step {step}" if lost else f"no progress for {longest:.0f} s in step {step}"
    lines = [f"{what}: {_blame(standings, silent, lost=bool(lost))}", "positions of the processes:"]
    groups: dict[str, list[Standing]] = {}
    for standing in standings:
        groups.setdefault(standing.where, []).append(standing)
    lines += [f"  {_ranks([s.rank for s in group])}: {where}" for where, group in sorted(groups.items(), key=lambda item: len(item[1]))]
    if silent:
        lines.append(f"  {_ranks([here.rank for here in silent])}: nothing was heard from {'it' if len(silent) == 1 else 'them'}")
    if lost:
        lines.append(f"  the error of {lost[0]}: {lost[0].problem}")
    lines.append(f"stacks of all threads: {folder}. Start the same command again to resume from the newest checkpoint")
    return "\n".join(lines)


def _blame(standings: Sequence[Standing], silent: Sequence[Here], *, lost: bool) -> str:
    if silent:
        said = ", ".join(map(str, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
        return f"{said} {'has' if len(silent) == 1 else 'have'} {'ended' if lost else 'ended, or stopped responding'}"
    busy = [standing for standing in standings if not standing.waits_for_others]
    if busy and len(busy) < len(standings):
        said = "; ".join(f"{standing} hangs in {_short(standing)}" for standing in busy[:8])
        return f"{said}. The others wait for {'it' if len(busy) == 1 else 'them'}"
    if len(standings) == 1 or not standings:
        return "; ".join(f"{standing} hangs in {_short(standing)}" for standing in standings)
    places: dict[tuple[int, str, str], list[Standing]] = {}
    for standing in standings:
        places.setdefault((standing.step, standing.phase, standing.last_collective.partition(",")[0]), []).append(standing)
    if len(places) > 1:
        fewest, *others = sorted(places.values(), key=_few_and_early)
        if _few_and_early(fewest) < _few_and_early(others[0]):
            apart = ", ".join(map(str, fewest[:8])) + (f" and {len(fewest) - 8} more" if len(fewest) > 8 else "")
            verb = "is" if len(fewest) == 1 else "are"
            return f"all wait for one another, and {apart} {verb} apart from the others, in {_short(fewest[0])}"
        first = min(standings, key=lambda standing: standing.since)
        return f"all wait for one another, and {first} has waited longest, in {_short(first)}"
    return f"all wait for one another in the same place ({_short(standings[0])}): the network or a device does not respond"


def _few_and_early(group: Sequence[Standing]) -> tuple[int, int]:
    return len(group), group[0].step


def _short(standing: Standing) -> str:
    own = next((frame for frame in standing.frames if "megatron_mm" in frame), standing.frames[0] if standing.frames else "?")
    return f"step {standing.step}, phase {standing.phase!r} ({own}), last collective {standing.last_collective}"


def _ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    said = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {said}"


def spy_on(silent: Sequence[Here], folder: Path) -> None:
    """Record with py-spy the stacks of silent processes on this host, if it is installed and has permission."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    for here in silent if program else ():
        if here.host == socket.gethostname():
            command = [str(program), "dump", "--nonblocking", "--pid", str(here.pid)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                continue
            (folder / f"rank-{here.rank:05d}.stacks").write_text(done.stdout + done.stderr)
