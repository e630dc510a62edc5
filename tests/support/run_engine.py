"""Runs an exported decoder in CTranslate2, an inference engine that needs no GPU, and compares it with transformers.

    python tests/support/run_engine.py DIR OUT      DIR is what `convert to-hf --part language` wrote, OUT a directory to make

It is a separate script so that it can run with packages that the project does not need (`PYTHONPATH=FOLDER_WITH_CTRANSLATE2`).
"""

from __future__ import annotations

import sys
from pathlib import Path

TOLERANCE = 1e-3
"""Absolute, fp32, logits of about 1: the engine's kernels add in another order."""
TEXT = "a red circle left of the blue star."


def main(folder: Path, out: Path) -> None:
    import ctranslate2
    import numpy as np
    import torch
    import transformers
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(out))
    engine = ctranslate2.Generator(str(out), device="cpu", compute_type="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    ids = tokenizer(TEXT)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, suppress_tokens=None, eos_token_id=None)
    found = np.array(engine.forward_batch([tokens], return_log_probs=False))[0]
    difference = float(np.abs(found - expected).max())
    assert difference < TOLERANCE, f"logits differ by {difference}"
    made = engine.generate_batch([tokens], max_length=8, min_length=8, sampling_topk=1, include_prompt_in_result=False)
    assert made[0].sequences_ids[0] == greedy[0, len(ids) :].tolist(), "greedy continuations differ"
    print(f"CTranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
