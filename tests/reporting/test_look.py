"""`prepare view` shows a run's training data, `prepare report` the contents of an index; a browser shows the page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_files import ALONE

from megatron_mm.cli.main import main
from megatron_mm.data.prepare.report import check_picture, draw_report, report
from megatron_mm.data.sources.index import open_split
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.data import TrainingData, image_input, open_tokenizer
from megatron_mm.run.view import check_split, with_sources_of, write_view


@pytest.mark.parametrize(
    "recipe",
    ["debug_mm1", pytest.param("debug_infimm", marks=pytest.mark.slow), pytest.param("debug_mono_internvl", marks=pytest.mark.slow)],
)
def test_the_page_has_every_token_and_picture_of_the_batches(demo_data: Path, tmp_path: Path, recipe: str) -> None:
    experiment = with_sources_of(get_recipe(recipe), demo_data, split="train")
    write_view(experiment, tmp_path / "view.html", recipe=recipe, split="train", micro_batches=2)
    page = (tmp_path / "view.html").read_text()
    data = TrainingData(experiment, ALONE, tokenizer := open_tokenizer(experiment))
    batches = []
    while len(batches) < 2:
        batches += next(data).micro_batches
    data.close()
    assert page.count("<img ") == sum(batch.num_images for batch in batches[:2])
    assert page.count('class="document') == sum(len(batch.cu_seqlens) - 1 for batch in batches[:2])
    assert page.count('class="token learned') - 1 == sum(int((batch.loss_mask > 0).sum()) for batch in batches[:2])  # one is the legend
    shown = [html.unescape(text) for text in re.findall(r'<span class="token[^"]*" title="\d+">([^<]*)</span>', page)]
    batch = batches[0]
    is_image = {start + n for start in batch.image_starts.tolist() for n in range(image_input(experiment).tokens)}
    written = [t for place, t in enumerate(batch.token_ids.tolist()) if place not in is_image and bool(batch.is_token[place])]
    assert shown[: len(written)] == [tokenizer.piece(token)[0] for token in written]


def test_the_page_refers_to_nothing_outside(demo_data: Path, tmp_path: Path) -> None:
    experiment = with_sources_of(get_recipe("debug_mm1"), demo_data, split="heldout")
    write_view(experiment, tmp_path / "view.html", recipe="debug_mm1", split="heldout", micro_batches=1)
    page = (tmp_path / "view.html").read_text()
    assert not re.search(r"<script|<link|<iframe|url\(|@import|https?://", page)
    assert set(re.findall(r'src="([a-z]+:)', page)) == {"data:"}


def test_data_of_other_names_is_shown_in_equal_shares(demo_data: Path) -> None:
    recipe = get_recipe("debug_mm1")
    other = replace(recipe, data=replace(recipe.data, mixture={"elsewhere": 1.0}))
    assert with_sources_of(other, demo_data, split="train").data.mixture == dict.fromkeys(
        ["conversations", "interleaved", "pairs", "tasks", "text"], 0.2
    )
    with pytest.raises(ValueError, match=r"has no indexed source: run `megatron-mm prepare index"):
        with_sources_of(recipe, demo_data.parent, split="train")


def test_a_mixture_that_is_given_is_shown(demo_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "view.html"
    main(["prepare", "view", str(demo_data), "--out", str(out), "--micro-batches", "1", "--data.mixture", "text=1"])
    assert "<img " not in out.read_text(), "texts alone"


def test_a_split_that_does_not_exist_is_named_before_the_index(demo_data: Path) -> None:
    check_split(demo_data, "heldout")
    with pytest.raises(ValueError, match=r"--split is 'vaild', but .* has no folder of that name: choose train or heldout"):
        check_split(demo_data, "vaild")


def test_a_tokenizer_that_training_refuses_is_named(demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = get_recipe("debug_mm1")
    small = replace(recipe, model=replace(recipe.model, decoder=replace(recipe.model.decoder, vocab_size=64)))
    experiment = with_sources_of(small, demo_data, split="train")
    write_view(experiment, tmp_path / "view.html", recipe="debug_mm1", split="train", micro_batches=1)
    tokens = open_tokenizer(experiment).vocab_size
    assert f"debug_mm1 has rows for 64, so training on this data needs --model.decoder.vocab-size {tokens} or more" in caplog.text


def test_the_reports_picture_is_checked_first(tmp_path: Path) -> None:
    check_picture(tmp_path / "a.SVG")
    with pytest.raises(ValueError, match=r"--picture .*a\.foo ends in \.foo: use \.png, \.pdf or \.svg"):
        check_picture(tmp_path / "a.foo")
    with pytest.raises(ValueError, match=r"is a folder: name a file in it, such as .*report\.png"):
        check_picture(tmp_path)


def test_the_report_counts_what_the_index_holds(demo_data: Path, tmp_path: Path) -> None:
    found = report(demo_data)
    for index in open_split(demo_data, "train", sources=["pairs", "interleaved", "text"]):
        source, sizes = found.sources[f"train/{index.name}"], index.sizes(slice(0, len(index)))
        assert (source.samples, source.images, source.text_tokens) == (len(index), sizes.num_images.sum(), sizes.text_tokens.sum())
        assert sum(source.images_of_a_sample.values()) == sum(source.token_histogram) == len(index)
        middle = source.text_tokens_of_a_sample["50%"]
        assert np.median(sizes.text_tokens) / 1.13 <= middle <= np.median(sizes.text_tokens) * 1.13 + 1
        if source.images:
            assert source.image_width["100%"] == index.image_sizes(slice(0, len(index))).widths.max()
    assert "train/pairs" in str(found) and json.loads(found.to_json())["sources"]["train/text"]["kind"] == "text"
    draw_report(found, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_page(demo_data: Path, tmp_path: Path) -> None:
    """Pictures are shown, and supervised tokens are green."""
    experiment = with_sources_of(get_recipe("debug_mm1"), demo_data, split="train")
    page = tmp_path / "view.html"
    write_view(experiment, page, recipe="debug_mm1", split="train", micro_batches=1)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = [*browser, "--window-size=1200,1400", f"--screenshot={tmp_path / 'view.png'}", page.as_uri()]
    subprocess.run(shot, check=True, capture_output=True, timeout=240)
    with Image.open(tmp_path / "view.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    green = np.abs(pixels - (0xC9, 0xEF, 0xCF)).max(1) < 3
    strong = (pixels.max(1) - pixels.min(1)) > 150  # the demo's pictures have strong colours
    assert green.mean() > 0.005 and strong.mean() > 0.001 and (pixels == 255).all(1).mean() > 0.3
