"""Packaging. On a machine without a GPU install torch's CPU build first, so that no CUDA packages come with it (see Makefile)."""

from setuptools import find_packages, setup

setup(
    name="megatron_mm",
    version="0.1.0",
    description="Pre-training of multimodal language models with tensor, pipeline, expert and data parallelism",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_mm", "megatron_mm.*"]),
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "matplotlib",
        "numpy",
        "pillow",
        "psutil",  # used by megatron-core's checkpoint writer, which does not declare it
        "safetensors",
        "sentencepiece",
        "transformers>=4.50",
        "tyro",
        "wandb",
    ],
    extras_require={
        # NVIDIA's apex is optional too, and built from source: PyPI's package of that name is something else.
        "gpu": ["transformer-engine[pytorch]", "nvidia-dali-cuda130"],
        "dali": ["nvidia-dali-cuda130"],
        "dev": ["mypy", "pytest", "pytest-timeout", "ruff"],
    },
    entry_points={"console_scripts": ["megatron-mm = megatron_mm.cli.main:main"]},
)
