"""Decoding: Pillow and DALI agree, and a damaged image affects no other image."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.decode import DaliDecoder, ImageDecoder, _reason, has_dali, is_plain, make_decoder
from megatron_mm.platform.device import pinned, send

FILL = (122, 116, 104)
needs_dali = pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
BACKENDS = ["pillow", pytest.param("dali", marks=needs_dali)]


def decoder(backend: str, size: int = 24, **options: object) -> ImageDecoder:
    transform = ImageTransform(size, FILL, **options)  # type: ignore[arg-type]
    return make_decoder(backend, transform, threads=2, device=torch.device("cpu"))  # type: ignore[arg-type]


def picture(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (90, 60), **options: object) -> bytes:
    """Return a smooth picture: red increases to the right, green downwards."""
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


def noise(form: str, size: tuple[int, int], **options: object) -> bytes:
    """Return blocks of random colours, 4 pixels wide: the hardest case for chroma stored at half resolution."""
    width, height = size
    blocks = np.random.default_rng(width).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]).save(buffer, form, **options)
    return buffer.getvalue()


@needs_dali
@pytest.mark.parametrize("size", [(90, 60), (24, 24), (10, 13), (301, 203)])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True}),
        *[("JPEG", {"quality": 75, "subsampling": s, "progressive": p}) for s in (0, 1, 2) for p in (False, True)],
    ],
)
def test_dali_and_pillow_agree(form: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    """The results measured are bit-identical, as both decode with libjpeg-turbo, libpng and libwebp and resize with Pillow. A difference of
    one level of 255 is allowed for builds of these libraries that round differently."""
    with_dali = decoder("dali")
    blob = noise(form, size, **options)
    assert with_dali._with_dali([blob]) is not None, "DALI itself decodes it"  # type: ignore[attr-defined]
    dali, pillow = with_dali.decode([blob]).pixels.int(), decoder("pillow").decode([blob]).pixels.int()
    assert (dali - pillow).abs().max() <= 1


@needs_dali
@pytest.mark.parametrize(("form", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})])
def test_what_pillow_accepts_dali_accepts(form: str, options: dict[str, Any]) -> None:
    """Therefore no image that `prepare index` accepts (with Pillow) is bad in a run with DALI. Both refuse truncated images; DALI accepts
    some images with changed bytes that Pillow refuses, for example with a marker that no JPEG has."""
    whole = noise(form, (200, 150), **options)
    truncated = [whole[: len(whole) - cut] for cut in (1, 2, 20, len(whole) // 50, len(whole) // 2)]
    changed = []
    for place in range(len(whole) // 3, len(whole) - 100, len(whole) // 9):
        changed += [whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :], whole[:place] + bytes(99) + whole[place + 99 :]]
    with_dali, pillow = decoder("dali"), decoder("pillow")
    of_dali = [[bool(with_dali.decode([blob]).ok[0]) for blob in blobs] for blobs in (truncated, changed)]
    of_pillow = [pillow.decode(blobs).ok.tolist() for blobs in (truncated, changed)]
    assert of_dali[0] == of_pillow[0] and not of_dali[0][-1]
    assert all(dali or not ok for dali, ok in zip(of_dali[1], of_pillow[1], strict=True))


@needs_dali
@pytest.mark.parametrize("resizes", [False, True])
def test_there_is_one_pipeline_for_batches_of_all_sizes_and_it_outlives_a_damaged_image(resizes: bool) -> None:
    transform = ImageTransform(24, FILL, resize="pad")
    with_dali = DaliDecoder(transform, threads=2, device=torch.device("cpu"), resizes=resizes)
    good = [noise("JPEG", (90, 60)), noise("PNG", (50, 80)), picture("WEBP")]
    expected = with_dali.decode(good).pixels
    first = with_dali._pipeline
    assert with_dali.decode([good[0], good[0][:400], good[1]]).ok.tolist() == [True, False, True]
    for _ in range(2):
        assert torch.equal(with_dali.decode(good).pixels, expected) and torch.equal(with_dali.decode(good[:1]).pixels, expected[:1])
    assert with_dali._pipeline is first
    with_dali.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_image_costs_itself_alone(backend: str) -> None:
    good = picture()
    blobs = [good, good[: len(good) // 2], picture("PNG"), b"", b"no image", good]
    decoded = decoder(backend).decode(blobs)
    assert decoded.ok.tolist() == [True, False, True, False, False, True]
    alone = decoder(backend).decode([good, good])
    assert (decoded.pixels[[0, 5]].int() - alone.pixels.int()).abs().max() <= 1  # a damaged batch goes to Pillow
    assert (decoded.pixels[[1, 3, 4]] == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_images_are_the_same_on_every_backend(backend: str) -> None:
    blobs = [picture("JPEG", "CMYK"), picture("PNG", "RGBA"), picture("PNG", "P"), picture("PNG", "I;16"), picture("GIF", "P")]
    decoded = decoder(backend).decode(blobs)
    assert decoded.ok.all()
    assert not any(is_plain(blob) for blob in blobs)
    assert torch.equal(decoded.pixels, decoder("pillow").decode(blobs).pixels)


@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF"])
def test_of_an_animation_the_first_picture_counts(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(buffer, form, save_all=True, append_images=[Image.new("RGB", (30, 30), "blue")])
    assert not is_plain(buffer.getvalue())
    for backend in ("pillow", "dali") if has_dali() else ("pillow",):
        red, _, blue = decoder(backend).decode([buffer.getvalue()]).pixels[0].float().mean(dim=(1, 2)).tolist()
        assert red > 200 and blue < 50


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
    monkeypatch.setattr("megatron_mm.data.load.decode.has_dali", lambda: False)
    with pytest.raises(ValueError, match=r"use --data.decoder pillow"):
        decoder("dali")
    assert type(decoder("auto")).__name__ == "PillowDecoder"


# -------------------------------------------------------------------------------------------------------------------- transforms

SIZES = [(90, 60), (60, 91), (24, 24), (10, 13), (301, 203), (1000, 20), (7, 400)]


def cut_from_the_middle(image: Image.Image, size: int) -> Image.Image:
    """Resize and crop like torchvision's Resize and CenterCrop on a Pillow image, as open_clip's and InfiMM's processors use them."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    image = image.resize((other, size) if width > height else (size, other), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES[:5])
def test_cropping_is_that_of_the_released_processors(backend: str, size: tuple[int, int]) -> None:
    blob = noise("PNG", size)
    found = decoder(backend, resize="crop").decode([blob]).pixels[0].permute(1, 2, 0).numpy()
    assert (found == np.asarray(cut_from_the_middle(Image.open(io.BytesIO(blob)), 24))).all()


def test_a_very_long_picture_is_not_resized_whole() -> None:
    place = ImageTransform(336, FILL, resize="crop").place(30_000, 3)
    assert place.width <= 17 * 336 and place.height == 336
    (left, _, width, _) = place.canvas
    assert left == 30_000 - left - width, "its middle is"
    image = Image.open(io.BytesIO(noise("PNG", (1000, 50))))
    exact = np.asarray(cut_from_the_middle(image, 24)).astype(int)
    assert abs(np.asarray(ImageTransform(24, FILL, resize="crop").square(image)).astype(int) - exact).max() <= 1


def test_padding_keeps_the_whole_picture() -> None:
    wide = Image.new("RGB", (90, 30), "red")
    pixels = np.asarray(ImageTransform(30, FILL, resize="pad").square(wide))
    assert (pixels[:8] == FILL).all() and (pixels[22:] == FILL).all() and (pixels[12:18] == (255, 0, 0)).all()


@needs_dali
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_what_dali_resizes_on_a_gpu_is_placed_alike(resize: str, size: tuple[int, int]) -> None:
    """DALI's own operators, here on a CPU. Its bicubic filter rounds differently from Pillow's: the differences measured are 2 levels
    of 255 within a smooth picture and 3 at the edge of a padded one."""
    transform = ImageTransform(24, FILL, resize=resize)  # type: ignore[arg-type]
    blob = picture("PNG", size=size)
    dali = DaliDecoder(transform, threads=1, device=torch.device("cpu"), resizes=True)
    found = dali._with_dali([blob, blob])
    assert found is not None
    expected = decoder("pillow", resize=resize).decode([blob]).pixels
    assert found.shape == (2, 3, 24, 24) and (found[:1].int() - expected.int()).abs().max() <= 4


def kinds() -> dict[str, Image.Image]:
    """Return a picture of every mode that is not 8-bit RGB."""
    rgb = Image.open(io.BytesIO(picture("PNG")))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (60, 1))))
    sixteen = Image.fromarray(np.linspace(0, 65535, 90 * 60).astype(np.uint16).reshape(60, 90))
    return {"RGBA": alpha, "P": rgb.quantize(8), "I;16": sixteen, "L": rgb.convert("L"), "1": rgb.convert("1"), "CMYK": rgb.convert("CMYK")}


@pytest.mark.parametrize("kind", ["RGBA", "P", "I;16", "L", "1", "CMYK"])
def test_released_processors_are_followed_in_every_mode(kind: str) -> None:
    """Mono-InternVL's processor converts, then resizes; InfiMM's and open_clip's resize, crop, then convert."""
    image = kinds()[kind]
    mono = ImageTransform(24, FILL, to_rgb="pillow").square(image)
    assert np.array_equal(mono, image.convert("RGB").resize((24, 24), Image.Resampling.BICUBIC))
    infimm = ImageTransform(24, FILL, resize="crop", to_rgb="pillow", resize_first=True).square(image)
    assert np.array_equal(infimm, cut_from_the_middle(image, 24).convert("RGB"))


def test_16_bits_keep_their_picture_unless_pillow_is_to_be_followed() -> None:
    image = kinds()["I;16"]
    white, pillow = (np.asarray(ImageTransform(24, FILL, to_rgb=to_rgb).square(image)) for to_rgb in ("white", "pillow"))
    assert white.std() > 50 and white.max() <= 255
    assert (pillow[2:] == 255).all(), "what is over 255 of 65535 is white"


@pytest.mark.parametrize("backend", BACKENDS)
def test_exif_orientation_is_not_applied(backend: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned, plain = picture("JPEG", exif=exif), picture("JPEG")
    decoded = decoder(backend).decode([turned, plain]).pixels
    assert torch.equal(decoded[0], decoded[1])


@pytest.mark.parametrize(
    ("between", "plain"),
    [(b"", True), (b"\xff\xff", True), (b"\0\0", False), (b"\xff\xd5", False), (b"\xff\xfe\0\1", False), (b"?>", False)],
)
def test_a_jpeg_with_other_bytes_between_its_segments_goes_to_pillow(caplog: pytest.LogCaptureFixture, between: bytes, plain: bool) -> None:
    """0xFF may be repeated before a segment. Cameras exist that write a segment's length too small, so its last bytes lie between."""
    usual = picture()
    place = 4 + int.from_bytes(usual[4:6], "big")  # after the first segment
    odd = usual[:place] + between + usual[place:]
    assert is_plain(usual) and is_plain(odd) == plain
    for backend in ("pillow", "dali") if has_dali() else ("pillow",):
        decoded = decoder(backend).decode([usual, odd])
        assert decoded.ok.all() and torch.equal(decoded.pixels[0], decoded.pixels[1])
    assert not caplog.records, "DALI decodes the others"


def test_the_log_says_what_dali_met() -> None:
    text = (
        "Critical error in pipeline:\nError in CPU operator `x`,\n\n  File ...\n\nencountered:\n\nFailed to decode sample #0 : \nThe end."
    )
    assert _reason(RuntimeError(text)) == "Failed to decode sample #0 :" and _reason(RuntimeError("out of memory")) == "out of memory"


def test_a_jpeg_without_its_end_goes_to_pillow() -> None:
    """The GPU's decoder would accept it as complete."""
    whole = picture("JPEG")
    assert is_plain(whole) and is_plain(whole + bytes(8))
    assert not any(is_plain(whole[:-cut]) for cut in (1, 2, 20, len(whole) // 2))


def test_pixels_of_dali_and_of_pillow_meet_on_a_device() -> None:
    """Tensors that are already on a device are not copied; only CPU tensors are pinned."""
    there = torch.empty(2, dtype=torch.uint8, device="meta")
    assert pinned(there) is there and send(there, torch.device("meta")) is there


def test_blank_images_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one pixel, expanded. torch copies a tensor to pinned memory with its strides, which fails if elements share memory."""

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    blank = torch.tensor([1, 2, 3], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 4, 4)
    assert torch.equal(pinned(blank), blank)
