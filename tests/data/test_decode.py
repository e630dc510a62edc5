"""Decoding: Pillow and DALI agree, and a damaged image costs itself alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mm.data.decode import ImageDecoder, has_dali, is_plain, make_decoder

FILL = (122, 116, 104)
BACKENDS = ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="DALI is not installed"))]


def decoder(backend: str, size: int = 24) -> ImageDecoder:
    return make_decoder(backend, image_size=size, threads=2, fill=FILL, device=torch.device("cpu"))  # type: ignore[arg-type]


def picture(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (90, 60), **options: object) -> bytes:
    """A smooth picture: red grows to the right, green downwards."""
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = 60
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_become_squares_of_their_colours(backend: str) -> None:
    decoded = decoder(backend).decode([picture("JPEG"), picture("PNG"), picture("WEBP"), picture("JPEG", "L")])
    assert decoded.pixels.shape == (4, 3, 24, 24) and decoded.pixels.dtype == torch.uint8
    assert decoded.ok.tolist() == [True] * 4
    red = decoded.pixels[:3, 0].float().mean(dim=1)
    assert (red.diff(dim=1) > 0).all(), "red grows to the right"
    assert torch.equal(decoded.pixels[3, 0], decoded.pixels[3, 1]), "grey has three equal channels"


@pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
@pytest.mark.parametrize(("form", "tolerance"), [("PNG", 2), ("WEBP", 2), ("JPEG", 6)])
@pytest.mark.parametrize("size", [(90, 60), (24, 24), (10, 13)])
def test_dali_and_pillow_agree(form: str, tolerance: int, size: tuple[int, int]) -> None:
    """Levels of 255; JPEG decoders differ in their inverse transform and chroma upsampling, the rest by rounding."""
    blobs = [picture(form, size=size)]
    dali, pillow = decoder("dali").decode(blobs).pixels.int(), decoder("pillow").decode(blobs).pixels.int()
    assert (dali - pillow).abs().max() <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_image_costs_itself_alone(backend: str) -> None:
    good = picture()
    blobs = [good, good[: len(good) // 2], picture("PNG"), b"", b"no image", good]
    decoded = decoder(backend).decode(blobs)
    assert decoded.ok.tolist() == [True, False, True, False, False, True]
    alone = decoder(backend).decode([good, good])
    assert (decoded.pixels[[0, 5]].int() - alone.pixels.int()).abs().max() <= 6  # a damaged batch goes to Pillow
    assert (decoded.pixels[[1, 3, 4]] == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_images_are_the_same_on_every_backend(backend: str) -> None:
    blobs = [picture("JPEG", "CMYK"), picture("PNG", "RGBA"), picture("PNG", "P"), picture("PNG", "I;16"), picture("GIF", "P")]
    decoded = decoder(backend).decode(blobs)
    assert decoded.ok.all()
    assert not any(is_plain(blob) for blob in blobs)
    assert torch.equal(decoded.pixels, decoder("pillow").decode(blobs).pixels)


def test_what_is_transparent_lies_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (30, 30), (255, 0, 0, 0)).save(buffer, "PNG")
    assert (decoder("pillow").decode([buffer.getvalue()]).pixels == 255).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_and_changing_batch_sizes(backend: str) -> None:
    decode = decoder(backend).decode
    assert decode([]).pixels.shape == (0, 3, 24, 24)
    for count in (1, 5, 2, 5):
        assert decode([picture()] * count).pixels.shape[0] == count


def test_dali_is_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mm.data.decode.has_dali", lambda: False)
    with pytest.raises(ValueError, match=r"use --data.decoder pillow"):
        decoder("dali")
    assert type(decoder("auto")).__name__ == "PillowDecoder"
