"""Unusual images: whatever preparation accepts can be loaded, in bounded memory, and nothing is written to the console about them."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_files import picture

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.image_transform import ImageTransform, can_become_rgb
from megatron_mm.data.load.decode import PillowDecoder, is_plain
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.prepare.samples import check_image
from megatron_mm.data.text.items import BadDocument


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes) -> bytes:
    """Return a TIFF of one strip: tags are (type, count, value), and the strip follows them directly."""
    begin = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = sorted({**tags, 273: (4, 1, begin)}.items())
    directory = b"".join(struct.pack("<HHI", tag, kind, count) + struct.pack("<I", value) for tag, (kind, count, value) in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4) + data


def premultiplied_grey(compression: int = 1, extra: dict[int, tuple[int, int, int]] | None = None) -> bytes:
    """Return a grey TIFF with an alpha channel by which the grey is multiplied: Pillow's mode La."""
    pixels = np.full((8, 8, 2), (64, 128), dtype=np.uint8).tobytes()
    data = zlib.compress(pixels) if compression == 8 else pixels
    size = {256: (3, 1, 8), 257: (3, 1, 8), 278: (3, 1, 8), 279: (4, 1, len(data))}
    kind = {258: (3, 2, 8 | 8 << 16), 259: (3, 1, compression), 262: (3, 1, 1), 277: (3, 1, 2), 338: (3, 1, 1)}
    return tiff({**size, **kind, **(extra or {})}, data)


def test_colours_multiplied_by_opacity_are_converted() -> None:
    blob = premultiplied_grey()
    assert Image.open(io.BytesIO(blob)).mode == "La" and check_image(blob) == (8, 8)
    for to_rgb, grey in (("white", 64 + 127), ("pillow", 128)):  # half of 128 on half of white; 128 without its opacity
        decoded = PillowDecoder(ImageTransform(8, (0, 0, 0), to_rgb=to_rgb, resize_first=True), threads=1).decode([blob])  # type: ignore[arg-type]
        assert decoded.ok.all() and (decoded.pixels.int() - grey).abs().max() <= 1


def test_pixels_that_cannot_become_rgb_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(can_become_rgb, ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16B", "La")))
    assert not can_become_rgb("a mode of a later Pillow") and not can_become_rgb("F")
    monkeypatch.setattr("megatron_mm.data.prepare.samples.can_become_rgb", lambda mode: mode != "CMYK")
    with pytest.raises(BadDocument, match="image with unsupported pixels"):
        check_image(picture("CMYK"), whole=False)


def png(colour: int, pixels: np.ndarray, *, transparent: bytes = b"") -> bytes:
    """Return a 16-bit PNG: colour 0 is grey, 2 is RGB; pixels are [height, width, channels]."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_transparent_value_of_16_bits_lies_on_white() -> None:
    pixels = np.array([[[0x4000], [0x4001]]] * 2)
    decoder = PillowDecoder(ImageTransform(2, (0, 0, 0)), threads=1)
    assert decoder.decode([png(0, pixels, transparent=b"\x40\x00")]).pixels[0, 0].tolist() == [[255, 64]] * 2
    assert decoder.decode([png(0, pixels)]).pixels[0, 0].tolist() == [[64, 64]] * 2


def test_colours_of_16_bits_keep_their_high_byte_on_every_backend() -> None:
    blob = png(2, np.full((2, 2, 3), (0x10FF, 0x80FF, 0xFEFF)))
    assert not is_plain(blob), "DALI would round them"
    assert PillowDecoder(ImageTransform(2, (0, 0, 0)), threads=1).decode([blob]).pixels[0, :, 0, 0].tolist() == [0x10, 0x80, 0xFE]


def test_a_long_picture_is_padded_in_bounded_memory() -> None:
    """Its square alone would have 35,000 x 35,000 pixels, 4.6 GiB. The picture stays in the middle, and as thin as it is."""
    transform = ImageTransform(350, (10, 20, 30), resize="pad")
    image = Image.new("RGB", (35_000, 400), (200, 100, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = np.asarray(transform.square(image))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900 * 1024
    assert (square[:170] == (10, 20, 30)).all() and (square[180:] == (10, 20, 30)).all()
    assert abs(square[..., 0].mean() - (4 * 200 + 346 * 10) / 350) < 0.2, "4 of 350 rows"
    assert transform.reduction(16_000, 4_000) == 2 and transform.reduction(11_000, 5_500) == 1
    assert ImageTransform(350, (0, 0, 0)).reduction(60_000, 10) == 1, "only padding needs a square"


def test_dali_pads_no_picture_that_is_reduced_first() -> None:
    blob = picture(size=(12_000, 8), form="PNG")
    assert is_plain(blob, ImageTransform(8, (0, 0, 0))) and not is_plain(blob, ImageTransform(8, (0, 0, 0), resize="pad"))


def test_artefacts_of_a_picture_that_is_too_long_for_a_jpeg() -> None:
    blob = picture(size=(66_000, 2), form="PNG")
    decoder = TileDecoder(ImageInput(size=16, fill=(0, 0, 0), tokens=1), threads=1)
    decoded = decoder.decode([EncodedTiles(blob, width=66_000, height=2, tiles=range(1), qualities=(75,))])
    assert decoded.ok.all() and decoded.pixels.shape == torch.Size((1, 3, 16, 16))


@pytest.mark.parametrize(
    "content",
    [
        premultiplied_grey(8, {65_000: (7, 200_000, 5)})[:-4],  # a tag of 200,000 bytes that are not there, and less data than needed
        premultiplied_grey(extra={277: (3, 1, 60_000)}),  # 60,000 values in each pixel
    ],
    ids=["warning", "error"],
)
def test_nothing_is_written_to_the_console_about_images(tmp_path: Path, content: bytes) -> None:
    """Neither by libtiff nor by Pillow, which also logs errors; the second process shows what they write about these files."""
    (tmp_path / "a.tif").write_bytes(content)
    read = "image.load()\nexcept Exception: pass"
    ours = f"from megatron_mm.data.image_formats import open_image\ntry: image = open_image(open('a.tif', 'rb').read()); {read}"
    pillows = f"from PIL import Image\ntry: image = Image.open('a.tif'); {read}"
    run = [subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60) for code in (ours, pillows)]
    assert [process.returncode for process in run] == [0, 0] and not run[0].stderr and run[1].stderr
