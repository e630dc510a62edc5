"""Files are written whole or not at all, and their errors name the file or the full disk."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mm.platform.files import file_error, write_whole


def test_a_text_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    for text in ("first", "second"):
        write_whole(page, text)
        assert page.read_text() == text
    (tmp_path / "link.html").symlink_to(page)
    write_whole(tmp_path / "link.html", "third")
    assert (tmp_path / "link.html").is_symlink() and page.read_text() == "third"

    write = Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        write(path, text[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*page.html'"):
        write_whole(page, "fourth")
    assert page.read_text() == "third" and len(list(tmp_path.iterdir())) == 2


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_whole(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_whole(Path("/dev/full"), "nothing")


def test_an_error_without_a_name_tells_which_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = OSError(errno.ENOSPC, "No space left on device")
    assert file_error(nameless, places=[tmp_path]) == "No space left on device"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000 if path == tmp_path else 10**12))
    said = file_error(nameless, places=[Path("/"), tmp_path / "new" / "run"])
    assert said == f"No space left on device (the disk of {tmp_path / 'new' / 'run'} is full: 2.0 MB are free)"
    assert file_error(OSError(errno.EROFS, "Read-only file system", "x"), places=[tmp_path]) == "x: Read-only file system"
