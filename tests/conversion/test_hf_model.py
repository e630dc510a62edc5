"""The exported model in plain transformers: the same logits as in training, and all typical uses."""

import ast
import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.converted import exported_logits, to_pillow
from support.trained import Trained, make_batch, make_images, scramble, training_logits
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

import megatron_mm
from megatron_mm.config import ConnectorConfig, Experiment, ParallelConfig
from megatron_mm.conversion.to_hf import Export
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.decode import PillowDecoder
from megatron_mm.families.mm1.files import hf_config
from megatron_mm.families.mm1.model import MM1Model
from megatron_mm.families.mm1.names import mm1_table
from megatron_mm.hf.mapping import to_hf
from megatron_mm.parallel import topology
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_chunks


@pytest.fixture(scope="module")
def model(exported: Export) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(exported.path, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def one_process(trained: Trained) -> Iterator[Topology]:
    yield topology.initialize(ParallelConfig(), seed=1)
    topology.shutdown()


@pytest.fixture(scope="module")
def processor(exported: Export) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(exported.path, trust_remote_code=True)


def test_logits_are_the_training_models(trained: Trained, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """From text and pictures through tokenizer, processor, tower, connector and decoder; fp32 rounding on logits of about 10."""
    for ours, theirs in zip(trained.logits, exported_logits(model, processor, trained.batch), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
        assert ours.std() > 0.1


VARIANTS = {
    "untied": {"decoder": {"tied_embeddings": False}},
    "other base, epsilon, head width": {"decoder": {"rotary_base": 500.0, "norm_epsilon": 1e-3, "head_dim": 16, "num_query_groups": 1}},
    "average": {"connector": ConnectorConfig(kind="average", num_tokens=16)},
    "attention": {"connector": ConnectorConfig(kind="attention", num_tokens=16, hidden_size=32, num_attention_heads=4)},
    "depth 2, gelu, left-over pixels": {
        "connector": ConnectorConfig(kind="c_abstractor", num_tokens=16, hidden_size=48, depth=2),
        "vision": {"activation": "gelu", "image_size": 34, "norm_epsilon": 1e-4},
    },
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_have_the_training_models_logits(
    variant: dict[str, Any],
    trained: Trained,
    model: PreTrainedModel,
    one_process: Topology,
    processor: ProcessorMixin,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors are converted in memory and loaded into the Hugging Face class."""
    config = trained.config
    config = replace(
        config,
        decoder=replace(config.decoder, **variant.get("decoder", {})),
        vision=replace(config.vision, **variant.get("vision", {})),
        connector=variant.get("connector", config.connector),
    )
    ours = build(replace(trained.experiment, model=config), one_process)
    values = hf_config(config, dtype="float32", ids=trained.tokenizer, sequence_length=256)
    hf = type(model)(type(model.config).from_dict(values)).eval()
    state = to_hf(mm1_table(config), dict(ours.named_parameters()))
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if config.decoder.tied_embeddings else [])
    hf.tie_weights()
    monkeypatch.setattr(processor.image_processor, "size", dict.fromkeys(("height", "width"), config.vision.image_size))
    batch = make_batch(config, trained.tokenizer)
    for expected, found in zip(training_logits(ours, batch), exported_logits(hf, processor, batch), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def build(experiment: Experiment, process: Topology) -> MM1Model:
    chunks = build_chunks(experiment, process)
    initialize_weights(chunks, seed=5)
    scramble(chunks[0])
    assert isinstance(chunks[0], MM1Model)
    return chunks[0]


def test_nothing_is_missing_or_unexpected(exported: Export) -> None:
    _, info = AutoModelForImageTextToText.from_pretrained(exported.path, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info


def test_generation_with_and_without_cache(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    images = [to_pillow(x) for x in make_images(num_images=3, size=40)]
    inputs = processor(images=[images[:1], images[1:]], text=["<image>a red", "<image>a<image>the blue star left"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 2, 3, 32, 32)
    assert inputs["attention_mask"][0].tolist()[:3] == [0, 0, 0], "padded on the left"
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    alone = processor(images=images[:1], text="<image>a red", return_tensors="pt")
    assert torch.equal(model.generate(**alone, **options)[0, -6:], cached[0, -6:]), "padding changes nothing"
    assert model.generate(**inputs, **options, num_beams=2).shape == cached.shape


def test_predictions_depend_on_the_image(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    spreads = set()
    for pixels in make_images(num_images=4, size=32):
        inputs = processor(images=to_pillow(pixels), text="<image>", return_tensors="pt")
        with torch.no_grad():
            spreads.add(round(float(model(**inputs).logits[0, -1].std()), 6))
    assert len(spreads) == 4


def test_unusable_tokens_are_never_generated(trained: Trained, model: PreTrainedModel) -> None:
    never = set(model.generation_config.suppress_tokens)
    assert {trained.tokenizer.image_id, trained.tokenizer.pad_id} <= never
    assert set(range(trained.tokenizer.vocab_size, trained.config.decoder.vocab_size)) <= never
    assert trained.tokenizer.eos_id not in never


def test_loss_is_the_shifted_cross_entropy(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    inputs = processor(text="a red circle", return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, labels=inputs["input_ids"])
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], inputs["input_ids"][0, 1:])
    torch.testing.assert_close(out.loss, expected)


def test_image_counts_must_agree(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    image = to_pillow(make_images(num_images=1, size=20)[0])
    with pytest.raises(ValueError, match="contain <image> 2 times, but 1 images"):
        processor(images=image, text="<image><image>")
    inputs = processor(images=image, text="<image>a", return_tensors="pt")
    with pytest.raises(ValueError, match="contain 15 image tokens, but 1 images of 16"):
        model(input_ids=inputs["input_ids"][:, 2:], pixel_values=inputs["pixel_values"][0])


def test_images_of_all_kinds(processor: ProcessorMixin) -> None:
    rgb = to_pillow(make_images(num_images=1, size=24)[0])
    array, grey = np.asarray(rgb), np.asarray(rgb.convert("L"))
    kinds = [rgb, rgb.convert("RGBA"), array, array.transpose(2, 0, 1), torch.tensor(array) / 255, np.asarray(rgb.convert("RGBA"))]
    kinds += [rgb.convert("L"), grey, grey[None], grey[..., None], rgb.convert("CMYK"), rgb.convert("P"), array[:1, :1], array[:1]]
    pixels = processor(images=kinds, text="<image>" * len(kinds), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (len(kinds), 3, 32, 32) and pixels.isfinite().all()
    assert all(torch.equal(pixels[0], same) for same in pixels[1:6]), "the same picture, given otherwise"
    assert all(torch.equal(pixels[6], same) for same in pixels[7:10]), "the same grey picture"
    assert np.array_equal(processor(images=np.stack([array, array]))["pixel_values"][1, 0], pixels[0]), "a batch in one array"
    assert torch.equal(pixels[12, :, 0, 0], pixels[12, :, -1, -1]) and not torch.equal(pixels[13, :, 0, 0], pixels[13, :, 0, -1])


def test_what_is_no_image_is_an_error(processor: ProcessorMixin) -> None:
    with pytest.raises(ValueError, match=r"an image is a str, but must be a Pillow image or an array: open files with PIL\.Image\.open"):
        processor(images="cat.png", text="<image>")
    with pytest.raises(ValueError, match=r"an image has shape \(0, 0, 3\)"):
        processor(images=np.zeros((0, 0, 3), dtype=np.uint8), text="<image>")
    with pytest.raises(ValueError, match="no prompt and no image given"):
        processor()


def test_pixels_are_the_training_decoders(processor: ProcessorMixin) -> None:
    """Formats that need a convention (transparency, 16 bits, CMYK, palette) are converted as in training, bit by bit."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8))
    gray16 = Image.fromarray(rng.integers(0, 1 << 16, (20, 30), dtype=np.uint16))
    converted = [rgba.convert(mode) for mode in ("CMYK", "P", "LA")]
    saved = []
    for image, kind in zip([rgba, gray16, *converted], ["PNG", "PNG", "JPEG", "GIF", "PNG"], strict=True):
        image.save(file := io.BytesIO(), kind)
        saved.append(file.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6  # rotation by 90 degrees
    Image.fromarray(rng.integers(0, 256, (40, 200, 3), dtype=np.uint8)).save(file := io.BytesIO(), "JPEG", exif=exif)
    saved.append(file.getvalue())
    images = [Image.open(io.BytesIO(data)) for data in saved]
    own = processor.image_processor
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (own.image_mean, own.image_std))
    fill = tuple(round(255 * channel) for channel in own.image_mean)
    for resize, to_rgb in itertools.product(("squash", "crop", "pad"), ("white", "pillow")):
        decoder = PillowDecoder(ImageTransform(32, fill=fill, resize=resize, to_rgb=to_rgb), threads=1)  # type: ignore[arg-type]
        expected = decoder.decode(saved)
        decoder.close()
        assert expected.ok.all()
        again = type(own)(size=own.size, resize=resize, to_rgb=to_rgb)
        pixels = again.preprocess(images, return_tensors="pt")["pixel_values"]
        assert torch.equal((pixels * std + mean).mul(255).round().to(torch.uint8), expected.pixels), (resize, to_rgb)
    assert (own.resize, own.to_rgb) == ("squash", "white"), "what this model was trained with"


def test_save_and_load_again(model: PreTrainedModel, processor: ProcessorMixin, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = loaded(text="a red circle", return_tensors="pt")
    assert loaded.tokens_per_image == processor.tokens_per_image
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_exported_code_stands_alone() -> None:
    """Code that is exported with a checkpoint imports only the standard library, NumPy, Pillow, torch and transformers."""
    files = list((Path(megatron_mm.__path__[0]) / "families").glob("*/hf_code/*_*.py"))
    files += (Path(megatron_mm.__path__[0]) / "hf" / "code").glob("*_*.py")
    assert len(files) == 16
    for path in files:
        imports = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level == 0}
        imports |= {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names}
        allowed = {"__future__", "collections", "math", "numpy", "PIL", "torch", "transformers", "typing"}
        assert {str(name).split(".")[0] for name in imports} <= allowed, path
