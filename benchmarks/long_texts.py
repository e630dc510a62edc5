"""Cost of tokenizing a long text that is split over many sequences: the time to read all pieces of one document.

    .venv/bin/python benchmarks/long_texts.py [--tokens 181000] [--sequence-length 4096]

The document is one line of a .jsonl file and fills many sequences. Baseline, in the same run: each piece is read separately, for which the
whole document must be tokenized. Bare tokenization is a single pass of the tokenizer over the text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.load.texts import TextReader
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import PackedSequence, Plan
from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.sources.index import open_source
from megatron_mm.data.text.documents import read_items
from megatron_mm.data.text.items import Text
from megatron_mm.data.text.tokenizer import Tokenizer, train_tokenizer

IMAGE = ImageInput(size=32, fill=(0, 0, 0), tokens=4)
WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his", "but")


def make_document(tokens: int) -> str:
    """Return a text of about `tokens` tokens: words in random order."""
    rng = np.random.default_rng(0)
    return " ".join(rng.choice(WORDS, tokens).tolist())


def seconds(action: Callable[[], object], *, rounds: int) -> float:
    """Return the median seconds of `rounds` calls."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=181_000, help="of the document, about (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "train" / "text"
        folder.mkdir(parents=True)
        (folder / "0.jsonl").write_text(json.dumps({"text": make_document(arguments.tokens)}) + "\n")
        model = Path(root) / "tokenizer.model"
        train_tokenizer([" ".join(np.random.default_rng(n).choice(WORDS, 50)) for n in range(400)], model, vocab_size=400)
        prepare_index(folder, tokenizer=model)
        tokenizer, source = Tokenizer.open(model), open_source(folder)
        plan = Plan(
            [source], weights=[1.0], limits=Limits(arguments.sequence_length, 16), image=IMAGE, packing_window=1, seed=0,
            global_batch_size=1, micro_batch_size=1,
        )  # fmt: skip
        state, sequences = plan.initial_state(), list[PackedSequence]()
        while state.window[0] == 0:
            batch = plan.batch(state)
            sequences += batch.sequences
            state = batch.next_state
        sequences.pop()  # the first of the next epoch
        (text,) = (item for item in read_items(source, 0) if isinstance(item, Text))
        ideal = seconds(lambda: tokenizer.encode(text.text), rounds=arguments.rounds)

        def once() -> None:
            reader = TextReader([source], tokenizer, IMAGE)
            for sequence in sequences:
                reader.pieces(sequence)

        def piece_by_piece() -> None:
            for sequence in sequences:
                TextReader([source], tokenizer, IMAGE).pieces(sequence)

        ours, before = seconds(once, rounds=arguments.rounds), seconds(piece_by_piece, rounds=1)
        length, tokens = arguments.sequence_length, int(source.sizes(slice(0, 1)).text_tokens[0])
        print(f"a document of {tokens:,} tokens in {len(sequences)} sequences of {length}")
        print(f"bare tokenization {1e3 * ideal:9.1f} ms")
        print(f"loader's reader   {1e3 * ours:9.1f} ms   ratio to bare {ours / ideal:.2f}")
        print(f"piece by piece    {1e3 * before:9.1f} ms   loader's reader is {before / ours:.1f} times faster")


if __name__ == "__main__":
    main()
