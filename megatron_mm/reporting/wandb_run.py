"""A Weights & Biases run whose failures do not affect training.

The library may raise from any call once its service process has died, may wait for the network, and creates a new directory for each
offline start. So the first failure switches W&B off with one warning (`sinks.Sink`), and the run id is kept in the run directory.

Steps have a separate axis, `train/step`. Tokens, images and hours are logged with every step under `axis/`, so that any of them can be the
x axis of a chart. A resume is a step in the curve `events/resume` and a line in the config's `resumes`; alerts are W&B's own.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.families.serialize import to_dict
from megatron_mm.platform.secrets import contains_secret
from megatron_mm.reporting.sinks import Sink

logger = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
_INIT_SECONDS = 60
"""Seconds to wait for W&B's server, in a thread."""


def redact(value: Any) -> Any:
    """The same values without anything that looks like a credential."""
    if isinstance(value, dict):
        return {name: redact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return "[redacted]" if isinstance(value, str) and contains_secret(value) else value


class WandbRun(Sink):
    """One run, resumed under the same id."""

    name = "W&B"

    def __init__(self, experiment: Experiment, run_dir: Path, *, world_size: int, part: str = "", own_run: bool = False) -> None:
        """
        Args:
            part: what logs here, if it is not training; it leaves the run's configuration unchanged.
            own_run: whether the part logs to a separate W&B run, because a W&B run has only one writer.
        """
        super().__init__()
        self.experiment, self.run_dir, self.world_size = experiment, run_dir, world_size
        self.part, self.own_run = part, own_run
        self._run: Any = None
        self._counts: Counter[str] = Counter()
        self.is_on = experiment.monitor.wandb != "disabled"

    def start(self) -> None:
        """Takes as long as the network does. If the server cannot be reached, the numbers of this start are stored in the run directory
        instead."""
        mode = self.experiment.monitor.wandb
        try:
            self._run = self._init(mode)
        except Exception as error:  # whatever the library raises
            if mode != "online":
                raise
            import wandb

            wandb.teardown()  # its service holds the run that it could not start
            self._run = self._init("offline")
            logger.warning(
                "W&B cannot be reached (%s): the numbers since this start are kept in %s; upload them later with `wandb sync`",
                str(error).strip().partition("\n")[0],
                self.run_dir / "wandb",
            )
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")

    def _init(self, mode: Any) -> Any:
        import wandb

        id_file = self.run_dir / RUN_ID_FILE
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n")
        config = self.experiment.monitor
        run_id, name = id_file.read_text().strip(), config.run_name or self.run_dir.name
        settings = {"console": "off", "silent": True, "disable_git": True, "save_code": False, "init_timeout": _INIT_SECONDS}
        before = os.umask(0o077)  # only the owner may read what W&B stores
        try:
            return wandb.init(
                project=config.project,
                entity=config.entity,
                name=f"{name} {self.part}" if self.own_run else name,
                id=f"{run_id}-{self.part}" if self.own_run else run_id,
                resume="allow",
                mode=mode,
                dir=str(self.run_dir),
                config=None if self.part and not self.own_run else redact({**to_dict(self.experiment), "world_size": self.world_size}),
                settings=wandb.Settings(**settings),
            )
        finally:
            os.umask(before)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"train/step": step, **values})

    def event(self, step: int, kind: str, text: str, is_alert: bool) -> None:
        self._counts[kind] += 1
        self._run.log({"train/step": step, f"events/{kind}": self._counts[kind]})
        if kind == "resume":
            known = list(self._run.config.get("resumes") or [])
            self._run.config.update({"resumes": [*known, f"step {step}: {text}"]}, allow_val_change=True)
        if is_alert:
            self._run.alert(title=kind, text=f"step {step}: {text}", level="WARN")

    def captions(self, step: int, samples: Sequence[CaptionSample]) -> None:
        import wandb

        rows = [[wandb.Image(sample.image), sample.true, sample.generated] for sample in samples]
        self._run.log({"train/step": step, "captions": wandb.Table(columns=["image", "true", "generated"], data=rows)})

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self._run.log({"train/step": step, name: wandb.Image(str(path))})

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
