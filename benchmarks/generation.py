"""Generation speed in tokens per second: with the key/value cache, without it, and with transformers' `generate` on the exported model.

    .venv/bin/python benchmarks/generation.py

All three use one process and one thread, and the same weights, prompts (an image and a few words each, of several lengths), number of new
tokens and batch; the best of three runs counts, without loading. On a CPU, processor time is measured, so that other programs do not
matter. The new tokens of all three are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mm.config import CheckpointConfig, Experiment, ParallelConfig
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.evaluation.generation import Generator, Prompt
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import image_input, open_tokenizer
from megatron_mm.run.evaluate_tasks import load_model
from megatron_mm.run.start import start
from megatron_mm.training.checkpoint import find_checkpoint

RUNS = 3


def experiment_of(data: Path) -> Experiment:
    """Return debug_mm1 with a decoder that dominates the model, as in a real one: 8 layers of width 384."""
    base = get_recipe("debug_mm1")
    decoder = replace(base.model.decoder, num_layers=8, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=12, num_query_groups=4)
    return replace(
        base,
        model=replace(base.model, decoder=decoder),
        data=replace(base.data, path=data),
        train=replace(base.train, steps=10, schedule_steps=10, global_batch_size=4, micro_batch_size=2),
        eval=replace(base.eval, interval=0),
        monitor=replace(base.monitor, wandb="disabled"),
        checkpoint=CheckpointConfig(asynchronous=False),
    )


def prompts_of(experiment: Experiment, batch: int) -> list[Prompt]:
    tokenizer, image = open_tokenizer(experiment), image_input(experiment)
    generator = torch.Generator().manual_seed(0)
    words = tokenizer.encode("a red circle left of a blue square above a green cross and a yellow triangle")
    place = image.ids(tokenizer.special_id, tiles=1)
    pixels = torch.randint(0, 256, (batch, 1, 3, image.size, image.size), generator=generator, dtype=torch.uint8)
    return [Prompt([tokenizer.bos_id, *place, *words[: 3 + number % 12]], [1], pixels[number]) for number in range(batch)]


def best(generate: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Return the seconds of the fastest run, and the tokens generated."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds, found = [], []
    for _ in range(RUNS):
        began = clock()
        found = generate()
        seconds.append(clock() - began)
    return min(seconds), found


def with_transformers(export: Path, prompts: list[Prompt], *, new_tokens: int, pad_id: int) -> Callable[[], list[list[int]]]:
    """Return a function that runs greedy `generate` on the export, with prompts padded on the left as it requires."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(export, trust_remote_code=True)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
    pictures = [prompt.pixels[0].permute(1, 2, 0).numpy() for prompt in prompts if prompt.pixels is not None]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    model.generation_config.eos_token_id = None  # no sequence stops early
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad_id}

    def generate() -> list[list[int]]:
        with torch.no_grad():
            return model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)[:, longest:].tolist()

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare_demo(Path(folder) / "data", samples=200)
        experiment = experiment_of(Path(folder) / "data")
        start(experiment, Path(folder) / "run")
        export = Path(folder) / "export"
        convert_to_hf(Path(folder) / "run", export, dtype="float32")
        topology = topologies.initialize(ParallelConfig(), seed=1)
        chunks = load_model(experiment, topology, find_checkpoint(Path(folder) / "run"))
        prompts = prompts_of(experiment, arguments.batch)
        pad_id, new = open_tokenizer(experiment).pad_id, arguments.new_tokens
        ways: dict[str, Callable[[], list[list[int]]]] = {}
        for name, cache in (("with the cache", True), ("without it", False)):
            generator = Generator(experiment, chunks, topology, pad_id=pad_id, cache=cache)
            ways[name] = lambda generator=generator: generator.greedy(prompts, max_new_tokens=new, end_ids=[])  # type: ignore[misc]
        ways["transformers"] = with_transformers(export, prompts, new_tokens=new, pad_id=pad_id)
        print(
            f"{arguments.batch} prompts of {min(len(p.ids) for p in prompts)} to {max(len(p.ids) for p in prompts)} tokens, {new} new ones"
        )
        found = {name: best(way) for name, way in ways.items()}
        ours, tokens = found["with the cache"]
        for name, (seconds, other) in found.items():
            same = sum(a == b for one, two in zip(tokens, other, strict=True) for a, b in zip(one, two, strict=True))
            rate = arguments.batch * new / seconds
            print(f"{name:16} {rate:8.0f} tokens/s   cache / this {seconds / ours:6.2f}   equal tokens {same} of {arguments.batch * new}")
        topologies.shutdown()


if __name__ == "__main__":
    main()
