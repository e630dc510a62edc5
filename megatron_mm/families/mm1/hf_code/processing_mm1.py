"""Images and text -> the inputs of MM1. Part of the checkpoint: imports NumPy, Pillow and transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.processing_utils import ProcessorMixin


class MM1ImageProcessor(BaseImageProcessor):
    """Make a square of each image (bicubic), scale to [0, 1], subtract mean, divide by std, as in training. EXIF orientation is ignored.

    Args:
        size: {"height": pixels, "width": pixels}, equal.
        image_mean, image_std: for each of red, green, blue.
        resize: squash loses the aspect ratio, crop cuts out the middle, pad adds a border of the mean colour.
        to_rgb: white lays what is transparent on white and takes the high byte of 16 bits, pillow does as `convert("RGB")`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        resize: str = "squash",
        to_rgb: str = "white",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size or {"height": 378, "width": 378}
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize = resize
        self.to_rgb = to_rgb

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """One image or a list (Pillow, NumPy or torch) -> `pixel_values` [n, 3, H, W] float32."""
        images = images if isinstance(images, list | tuple) else [images]
        shape = (0, 3, self.size["height"], self.size["width"])
        pixels = np.stack([self._pixels(image) for image in images]) if images else np.zeros(shape, dtype=np.float32)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _pixels(self, image: Any) -> np.ndarray:
        if not isinstance(image, Image.Image):
            image = to_pil_image(image)
        rgb = image.convert("RGB") if self.to_rgb == "pillow" else on_white(image)
        fill = tuple(round(255 * channel) for channel in self.image_mean)
        scaled = np.asarray(_RESIZES[self.resize](rgb, self.size["height"], fill), dtype=np.float32) / 255
        normalised = (scaled - np.float32(self.image_mean)) / np.float32(self.image_std)
        return normalised.transpose(2, 0, 1)


def on_white(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB: transparent parts on white, the high byte of 16 bits."""
    if image.mode.startswith("I"):  # Pillow itself would cut values off at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _squash(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    """The shorter side becomes `size`; of a picture more than 16 times as long as wide only the middle is resized."""
    across, down = (max(0, (a - 16 * b) // 2) for a, b in (image.size, image.size[::-1]))
    image = image.crop((across, down, image.width - across, image.height - down))
    width, height = image.size
    scaled = (int(size * width / height), size) if width > height else (size, int(size * height / width))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in scaled)
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return _squash(canvas, size, fill)


_RESIZES = {"squash": _squash, "crop": _crop, "pad": _pad}


class MM1Processor(ProcessorMixin):
    """Prompts with `<image>` in them and their images -> `input_ids`, `attention_mask`, `pixel_values`.

    Each `<image>` becomes as many image tokens as an image takes; `<s>` comes first, as in the training documents. A caption
    prompt is `<image>` alone. Sequences are padded on the left where there are several.

    Args:
        tokens_per_image: image tokens that one image takes.
    """

    if int(transformers.__version__.split(".")[0]) < 5:  # later versions find the parts by the names in __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
        valid_kwargs = ["tokens_per_image"]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, tokens_per_image: int = 144, **kwargs: Any) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Inputs for the model.

        Args:
            images: one image, a list in the order of the `<image>`s of all prompts, or a list of such lists, one a prompt.
            text: a prompt or several; without any, `<image>` for each image.
            kwargs: for the tokenizer (`padding`, `max_length`, ...); `return_tensors` for all outputs.

        Returns:
            `input_ids`, `attention_mask` [b, s]; with images `pixel_values` [b, max images of a prompt, 3, H, W], zeros
            where a prompt has fewer images.

        Raises ValueError where the prompts do not hold as many `<image>` as there are images.
        """
        flat = _flat(images)
        prompts = [text] if isinstance(text, str) else list(text) if text is not None else [self.image_token] * len(flat)
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if sum(counts) != len(flat):
            raise ValueError(f"the prompts hold {sum(counts)} times {self.image_token}, but {len(flat)} images are given: make them equal")
        return_tensors = kwargs.pop("return_tensors", None)
        kwargs.setdefault("padding", len(prompts) > 1)
        expanded = [prompt.replace(self.image_token, self.image_token * self.tokens_per_image) for prompt in prompts]
        inputs = dict(self.tokenizer(expanded, return_token_type_ids=False, **kwargs))
        if flat:
            pixels = self.image_processor(flat, return_tensors="np")["pixel_values"]
            rows = np.zeros((len(prompts), max(counts), *pixels.shape[1:]), dtype=np.float32)
            rows[np.arange(max(counts)) < np.array(counts)[:, None]] = pixels
            inputs["pixel_values"] = rows
        return BatchFeature(inputs, tensor_type=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for item in images for image in _flat(item)]
