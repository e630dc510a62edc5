"""A Weights & Biases run that can fail without the training noticing.

The library may raise from any call once its service process has died, may wait for a network, and starts another directory for
each offline start. So every call is wrapped, the first failure switches W&B off with one warning, the run id is kept in the run
directory, and steps have an axis of their own, `train/step`.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.families.serialize import to_dict

logger = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
_SECRET = re.compile(r"(?i)(key|token|secret|passw|credential)[^/]*=|://[^/]*:[^/]*@|AKIA[0-9A-Z]{12}|hf_[A-Za-z0-9]{20}")


def redact(value: Any) -> Any:
    """The same values without anything that looks like a credential."""
    if isinstance(value, dict):
        return {name: redact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return "[redacted]" if isinstance(value, str) and _SECRET.search(value) else value


class WandbRun:
    """One run, resumed under the same id."""

    def __init__(self, experiment: Experiment, run_dir: Path, *, world_size: int) -> None:
        self._run: Any = None
        config = experiment.monitor
        if config.wandb == "disabled":
            return
        id_file = run_dir / RUN_ID_FILE
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n")

        def start() -> None:
            import wandb

            before = os.umask(0o077)  # what W&B stores is for its owner alone
            try:
                self._run = wandb.init(
                    project=config.project,
                    entity=config.entity,
                    name=config.run_name or run_dir.name,
                    id=id_file.read_text().strip(),
                    resume="allow",
                    mode=config.wandb,
                    dir=str(run_dir),
                    config=redact({**to_dict(experiment), "world_size": world_size}),
                    settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, init_timeout=60),
                )
            finally:
                os.umask(before)
            self._run.define_metric("train/step")
            self._run.define_metric("*", step_metric="train/step")

        self._guard("start", start)

    def _guard(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever the library raises, training continues
            logger.warning(
                "W&B failed to %s (%s: %s) and is switched off; metrics.jsonl is still written", what, type(error).__name__, error
            )
            self._run = None

    def log(self, values: dict[str, Any]) -> None:
        """Log numbers; `train/step` is among them."""
        if self._run is not None:
            self._guard("log", lambda: self._run.log(values))

    def log_captions(self, step: int, samples: list[CaptionSample]) -> None:
        """Log a table of images, true captions and generated captions."""
        if self._run is None:
            return

        def send() -> None:
            import wandb

            rows = [[wandb.Image(sample.image), sample.true, sample.generated] for sample in samples]
            self._run.log({"train/step": step, "captions": wandb.Table(columns=["image", "true", "generated"], data=rows)})

        self._guard("log captions", send)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Log a picture file."""
        if self._run is None:
            return

        def send() -> None:
            import wandb

            self._run.log({"train/step": step, name: wandb.Image(str(path))})

        self._guard("log a picture", send)

    def finish(self, exit_code: int) -> None:
        """End the run."""
        if self._run is not None:
            self._guard("finish", lambda: self._run.finish(exit_code=exit_code))
            self._run = None
