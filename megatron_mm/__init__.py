"""megatron_mm: pre-training of multimodal language models with tensor, pipeline, expert and data parallelism."""

__version__ = "0.1.0"
