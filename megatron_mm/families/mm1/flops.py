"""FLOPs of a training step of MM1."""

from __future__ import annotations

from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.flops import FlopCount, StepWork, Trainable, count_decoder, count_vision
from megatron_mm.models.connectors import count_connector


def mm1_flops(model: MM1Config, trainable: Trainable, work: StepWork) -> float:
    """Return the FLOPs of image tower, connector and decoder."""
    images = FlopCount(trainable)
    count_vision(images, model.vision, num_images=work.num_images)
    count_connector(images, model.connector, vision=model.vision, output_size=model.decoder.hidden_size, num_images=work.num_images)
    count = FlopCount(trainable)
    count.join(images)
    count_decoder(count, model.decoder, work)
    return count.flops
