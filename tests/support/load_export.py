"""Loads an export with every class that its config.json names, in the first transformers on the import path, and compares logits.

    python tests/support/load_export.py DIR CASE.safetensors      CASE has input_ids [b, s], pixel_values, logits [b, s, vocabulary]

It is a separate script so that it can run with another version of transformers (`PYTHONPATH=FOLDER_OF_THAT_VERSION`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

TOLERANCE = 1e-4
"""Absolute, fp32, logits of about 1: transformers' attention kernels differ from version to version."""


def main(folder: Path, case: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    inputs = load_file(case)
    expected = inputs.pop("logits")
    names = [name for name in config.get("auto_map", {"AutoModelForCausalLM": ""}) if name != "AutoConfig"]
    done = []
    for name in names:
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
        if "auto_map" in config:
            assert type(model).__name__ == config["architectures"][0], f"{name} gives a {type(model).__name__}"
        with torch.no_grad():
            found = model(**inputs).logits
            difference = float((found - expected).abs().max())
            assert difference < TOLERANCE, f"{name}: logits differ by {difference}"
            row = {key: value[-1:] for key, value in inputs.items()}
            plain = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": None, "eos_token_id": None, "pad_token_id": 0}
            with_cache = model.generate(**row, **plain, use_cache=True)
            without = model.generate(**row, **plain, use_cache=False)
        assert torch.equal(with_cache, without) and with_cache.shape[1] == row["input_ids"].shape[1] + 5
        assert with_cache[0, row["input_ids"].shape[1]] == expected[-1, -1].argmax(), "the first new token is the likeliest"
        done.append(name)
    if "auto_map" in config:
        with tempfile.TemporaryDirectory() as saved, torch.no_grad():
            model.save_pretrained(saved)  # with its code
            again = getattr(transformers, names[-1]).from_pretrained(saved, trust_remote_code=True).eval()
            assert float((again(**inputs).logits - found).abs().max()) < TOLERANCE, "saved and loaded again"
    for name in ("AutoTokenizer", *(["AutoProcessor"] if (folder / "processor_config.json").is_file() else [])):
        if (folder / "tokenizer_config.json").is_file():
            found = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
            if (folder / "chat_template.jinja").is_file():
                chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]}]
                prompt = found.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
                assert "<image>" in prompt and "what?" in prompt, f"{name}: {prompt}"
            done.append(name)
    print(f"transformers {transformers.__version__}: {', '.join(done)}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_MODULES_CACHE"] = cache
        main(Path(sys.argv[1]), Path(sys.argv[2]))
