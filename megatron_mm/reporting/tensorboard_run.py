"""TensorBoard's event files in `RUN_DIR/tensorboard`, if `monitor.tensorboard` is set and the package is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.reporting.sinks import Sink

FOLDER = "tensorboard"


class TensorBoardRun(Sink):
    """One writer; a resume purges what was written after its step."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        super().__init__()
        self.run_dir, self.resume_step = run_dir, resume_step
        self._writer: Any = None

    def start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = self.resume_step + 1 if self.resume_step else None
        self._writer = SummaryWriter(str(self.run_dir / FOLDER), purge_step=purge, max_queue=1000)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def event(self, step: int, kind: str, text: str, is_alert: bool) -> None:
        self._writer.add_text(f"events/{kind}", text, step)

    def captions(self, step: int, samples: Sequence[CaptionSample]) -> None:
        for number, sample in enumerate(samples):
            self._writer.add_image(f"captions/{number}", sample.image, step, dataformats="HWC")
            self._writer.add_text(f"captions/{number}", f"true: {sample.true}\n\ngenerated: {sample.generated}", step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(self, exit_code: int) -> None:
        self._writer.close()
