"""Reads how images were prepared for a released image tower, from the files next to its weights.

transformers writes preprocessor_config.json (since version 5 for some processors a part of processor_config.json); open_clip writes a
`preprocess_cfg` in open_clip_config.json. A different normalisation is an error, because the tower was trained with its own. A different
way of making images square is allowed, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mm.hf.fields import number_in

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_OPEN_CLIP_RESIZE = {"shortest": "crop", "squash": "squash", "longest": "pad"}
_BICUBIC = 3
_TOLERANCE = 1e-6
"""Allowed difference of means and standard deviations that are written with different numbers of digits."""


def image_settings(read: Callable[[str], Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Return file name -> the settings in the file, as far as present: `mean`, `std` and `resize` in the form of `VisionConfig`.

    Args:
        read: name of a file next to the weights -> its document, or None.

    Raises ValueError for pixels that are not normalised or not divided by 255, or images that are not resized bicubically.
    """
    processor = read("preprocessor_config.json") or (read("processor_config.json") or {}).get("image_processor")
    found = {}
    if processor is not None:
        found["preprocessor_config.json"] = _of_transformers(processor)
    open_clip = (read("open_clip_config.json") or {}).get("preprocess_cfg")
    if open_clip is not None:
        found["open_clip_config.json"] = _of_open_clip(open_clip)
    return found


def same_colours(one: Any, other: Any) -> bool:
    """Return whether two means or standard deviations are equal up to the number of digits written."""
    return len(one) == len(other) and all(math.isclose(a, b, abs_tol=_TOLERANCE) for a, b in zip(one, other, strict=True))


def _of_transformers(document: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(document.get("image_processor_type") or document.get("feature_extractor_type") or "")
    is_clip = kind.startswith("CLIP")
    _require(document, "preprocessor_config.json", do_normalize=True, do_rescale=True, resample=_BICUBIC)
    factor = number_in(document, "rescale_factor", where="preprocessor_config.json: ", default=1 / 255)
    if factor is None or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise ValueError(f"preprocessor_config.json has rescale_factor {factor}, but pixels are divided by 255 here")
    found: dict[str, Any] = {}
    for name, theirs, default in (("mean", "image_mean", _CLIP_MEAN), ("std", "image_std", _CLIP_STD)):
        value = document.get(theirs, default if is_clip else None)
        if value is not None:
            found[name] = _colours(value, f"preprocessor_config.json: {theirs}")
    if "resize" in document:  # one of our exports
        return {**found, "resize": document["resize"]}
    if not is_clip:
        return found
    size = document.get("size", {"shortest_edge": 224})
    whole = not isinstance(size, Mapping) or "shortest_edge" in size  # the shorter side is resized, and the centre is cut out
    return {**found, "resize": "crop" if whole and document.get("do_center_crop", True) else "squash"}


def _of_open_clip(document: Mapping[str, Any]) -> dict[str, Any]:
    mode = document.get("resize_mode") or "shortest"
    if mode not in _OPEN_CLIP_RESIZE:
        raise ValueError(f"open_clip_config.json: preprocess_cfg.resize_mode is {mode!r}, but must be one of {sorted(_OPEN_CLIP_RESIZE)}")
    if document.get("interpolation", "bicubic") not in ("bicubic", "random"):
        raise ValueError(
            f"open_clip_config.json: preprocess_cfg.interpolation is {document['interpolation']!r}, but images are resized bicubically here"
        )
    return {
        "mean": _colours(document.get("mean", _CLIP_MEAN), "open_clip_config.json: preprocess_cfg.mean"),
        "std": _colours(document.get("std", _CLIP_STD), "open_clip_config.json: preprocess_cfg.std"),
        "resize": _OPEN_CLIP_RESIZE[mode],
    }


def _colours(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
        raise ValueError(f"{where} is {value!r}, but must be three numbers")
    return tuple(float(x) for x in value)


def _require(document: Mapping[str, Any], file: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        if document.get(name, value) != value:
            raise ValueError(f"{file} has {name} {document[name]!r}, but training has {value!r}")
