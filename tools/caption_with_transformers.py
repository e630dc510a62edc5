"""Caption the images of webdataset tars with an exported model, with plain `transformers` and nothing of megatron_mm.

python tools/caption_with_transformers.py MODEL TAR_FOLDER OUT.md [--count 12]
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def pairs(folder: Path, count: int) -> list[tuple[str, bytes, str]]:
    """Return (name, encoded image, caption) of the first `count` pairs."""
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                contents = archive.extractfile(member)
                if contents is not None:
                    key, _, extension = member.name.partition(".")
                    found.setdefault(key, {})[extension] = contents.read()
    result = []
    for key, files in list(found.items())[:count]:
        extension = next(e for e in files if e not in ("txt", "json"))
        result.append((f"{key}.{extension}", files[extension], files["txt"].decode()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=12)
    arguments = parser.parse_args()
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, trust_remote_code=True)
    pictures = arguments.out.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    lines = ["| image | true | generated |", "|---|---|---|"]
    right = 0
    samples = pairs(arguments.folder, arguments.count)
    print(f"{'true':48} generated")
    for name, data, true in samples:
        image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]).convert("RGB")
        inputs = processor(images=image, text="<image>", return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        generated = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        (pictures / name).write_bytes(data)
        lines.append(f"| ![]({pictures.name}/{name}) | {true} | {generated} |")
        right += generated == true
        print(f"{true:48} {generated}")
    arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{right} of {len(samples)} captions are exactly right")


if __name__ == "__main__":
    main()
