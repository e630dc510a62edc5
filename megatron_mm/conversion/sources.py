"""Opens published weights: detects their format, finds the table of names that reads them, and checks their configuration."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_mm.config import DecoderConfig, ModelConfig
from megatron_mm.conversion.hf_reader import HfReader
from megatron_mm.families.registry import FAMILIES, family_of
from megatron_mm.hf.decoder_variants import DECODER_VARIANTS
from megatron_mm.hf.field_tables import EXPORTED_ALONE
from megatron_mm.hf.formats import FORMATS, AnyFormat, Naming, Part
from megatron_mm.hf.mapping import Entry
from megatron_mm.hf.preprocessing import image_settings, same_colours

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint and the table that reads it."""

    part: Part
    reader: HfReader
    format: str
    entries: list[Entry]
    unused: tuple[str, ...]


def all_formats() -> dict[str, AnyFormat]:
    """Return every format by name: whole models of each family, then the parts that families share."""
    return {name: found for family in FAMILIES.values() for name, found in family.formats().items()} | FORMATS


def open_source(path: Path, part: Part, model: ModelConfig, *, sequence_length: int) -> Source:
    """Open a checkpoint from which a part of the model is read.

    Args:
        sequence_length: tokens per training sequence; a warning is logged if the source's own limit is smaller.

    Raises ValueError if its format is unknown or belongs to another part, or if its settings differ from the recipe's.
    """
    formats = all_formats()
    reader = _unwrapped(HfReader(path), part, formats)
    name, prefix = _detect(reader, part, formats)
    known = formats[name]
    ours = model if part == "whole" else getattr(model, {"language": "decoder", "vision": "vision"}[part], None)
    if ours is None:
        raise ValueError(f"the recipe's family {model.family} has no image tower: leave out --{part}")
    if not isinstance(ours, known.config):
        raise ValueError(
            f"{path} is a checkpoint of format {name}, which {model.family} models do not support as --{part}: choose another recipe"
        )
    document = _checked_document(reader, name, known, part)
    tied = part == "language" and not _has_head(reader, prefix)
    if document is None:
        logger.warning("%s has no %s next to it: only shapes are checked, not heads, norms or activations", path, known.config_file)
    else:
        _warn_of_limits(document, path, sequence_length=sequence_length)
        settings = _settings(document, name, known, where=reader.folder / known.config_file)
        tied = bool(settings.pop("tied_embeddings", tied))
        # An export of a recipe without max_positions has the sequence length in its place.
        if settings.get("max_positions", settings.get("decoder.max_positions")) == sequence_length:
            settings = {field: value for field, value in settings.items() if not field.endswith("max_positions")}
        group = {"language": "decoder.", "vision": "vision."}.get(part, "")
        _check_settings(settings, ours, where=str(reader.folder / known.config_file), group=group)
    if part != "language":
        _check_images(reader, model)
    if isinstance(ours, DecoderConfig) and ours.tied_embeddings and not tied:
        raise ValueError(
            f"{path} has a separate output layer, but the recipe ties it to the embeddings: use --model.decoder.no-tied-embeddings"
        )
    naming = Naming(prefix, tied, family_of(model).language_mlps)
    return Source(part, reader, name, known.table(ours, naming), (*known.prefixes[prefix], *_unused_head(prefix, tied)))


_HEADS = ("lm_head.weight", "output.weight")
_PARTS: dict[Part, tuple[str, ...]] = {
    "language": ("text_config", "llm_config", "language_config"),
    "vision": ("vision_config",),
    "whole": (),
}
"""Keys of a larger model's config.json under which each part is described."""


def _unwrapped(reader: HfReader, part: Part, known: Mapping[str, AnyFormat]) -> HfReader:
    """If the tensors of a known format are below a prefix that no format knows, such as `module.` of a training program or
    `language_model.` of a larger model, return a reader of that prefix and log how many tensors are ignored. Otherwise return the
    reader."""
    names = reader.names()
    signatures = {f"{prefix}{f.signature}": f.part for f in known.values() for prefix in f.prefixes}
    if signatures.keys() & names.keys():
        return reader
    wanted = sorted((signature for signature, of in signatures.items() if of == part), key=len, reverse=True)
    for signature in wanted:
        outer = next((name.removesuffix(signature) for name in names if name.endswith(f".{signature}")), None)
        if outer is None:
            continue
        inside = reader.below(outer)
        heads = () if set(_HEADS) & inside.names().keys() else set(_HEADS) & names.keys()
        others = len(names) - len(inside.names()) - len(heads)
        if others:
            logger.info("%s: reading the tensors under %s and ignoring %d others", reader.path, outer.removesuffix("."), others)
        return reader.below(outer, also=heads)
    return reader


def _detect(reader: HfReader, part: Part, known: Mapping[str, AnyFormat]) -> tuple[str, str]:
    """Return the name and prefix of the format whose signature is among the tensors. Raises ValueError if none is."""
    names = reader.names()
    found = [(name, prefix) for name, f in known.items() for prefix in f.prefixes if f"{prefix}{f.signature}" in names]
    fitting = [(name, prefix) for name, prefix in found if known[name].part == part]
    if fitting:
        return fitting[0]
    called = next(((name, next(iter(f.prefixes))) for name, f in known.items() if f.part == part and _calls_itself(reader, f)), None)
    if called and not found:
        return called  # the signature itself is missing; missing tensors are reported later
    formats = ", ".join(name for name, f in known.items() if f.part == part)
    if found:
        other = known[found[0][0]].part
        raise ValueError(f"{reader.path} is a checkpoint of format {found[0][0]}, which is read with --{other}, not with --{part}")
    some = ", ".join(sorted(names)[:4])
    raise ValueError(f"{reader.path} is not in a format that --{part} reads ({formats}); its first tensors are {some}")


def _calls_itself(reader: HfReader, known: AnyFormat) -> bool:
    document = reader.config(known.config_file)
    return bool(known.model_types) and document is not None and document.get("model_type") in known.model_types


def _checked_document(reader: HfReader, name: str, known: AnyFormat, part: Part) -> dict[str, Any] | None:
    """Return config.json, or its section about the part that is read; None if there is no file. Raises ValueError if the format does not
    know the model type."""
    document = reader.config(known.config_file)
    if document is not None and known.model_types and document.get("model_type") not in known.model_types:
        inner = next((document[field] for field in _PARTS[part] if isinstance(document.get(field), dict)), None)
        document = inner if inner is not None and inner.get("model_type") in known.model_types else document
    if document is not None and known.model_types and document.get("model_type") not in (*known.model_types, *_own_types(document)):
        raise ValueError(
            f"{reader.path} has tensors named like those of {name}, but its {known.config_file} says model_type "
            f"{document.get('model_type')!r}, which is a different architecture; supported are {list(known.model_types)}"
        )
    return document


def _own_types(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Model types of an exported decoder of a known variant whose class is not Llama's."""
    variant = document.get("decoder_variant")
    known = DECODER_VARIANTS.get(variant) if isinstance(variant, str) else None
    if known is None:
        return ()
    own = (known.settings.get("model_type"), known.modeling.model_type if known.modeling else None)
    return tuple(name for name in own if name)


def _warn_of_limits(document: Mapping[str, Any], path: Path, *, sequence_length: int) -> None:
    """Warn if training sequences are longer than the language model's attention window or number of positions."""
    for name, meaning in (
        ("sliding_window", "its attention window is not applied"),
        ("max_position_embeddings", "the model was not trained for further positions"),
    ):
        limit = document.get(name)
        if isinstance(limit, int) and "vocab_size" in document and sequence_length > limit:
            logger.warning("%s has %s %d, but sequences have %d tokens: %s", path, name, limit, sequence_length, meaning)


def _settings(document: dict[str, Any], name: str, known: AnyFormat, *, where: Path) -> dict[str, Any]:
    """Return the fields that must be equal in the recipe. Raises ValueError if the document is not a configuration of the format."""
    try:
        return known.settings(document)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{where} is not a configuration of format {name} ({type(error).__name__}: {error}): download it again, or correct it"
        ) from None


def _check_settings(theirs: dict[str, Any], ours: Any, *, where: str, group: str) -> None:
    """Raise ValueError if fields differ; only warn of those that do not affect training."""
    differences = []
    for field, value in theirs.items():
        found: Any = ours
        for name in field.split("."):
            found = getattr(found, name, None)
        if found == value:
            continue
        line = f"{field} is {value} there and {found} in the recipe ({_option(f'{group}{field}', value)})"
        if field.rpartition(".")[2] in EXPORTED_ALONE:
            logger.warning("%s: %s: this does not change training; exports will have the recipe's value", where, line)
        else:
            differences.append(line)
    if differences:
        raise ValueError(f"{where} describes a different model: {'; '.join(differences)}")


def _check_images(reader: HfReader, model: ModelConfig) -> None:
    """Raise ValueError if the source's images were normalised differently; warn if they were made square in another way."""
    parts = [part.name for part in fields(model) if hasattr(getattr(model, part.name), "mean")]
    documents = {name: reader.config(name) for name in ("preprocessor_config.json", "processor_config.json", "open_clip_config.json")}
    try:
        settings_of = image_settings(documents.get)
    except ValueError as error:
        raise ValueError(f"{reader.folder}/{error}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{reader.folder}: {', '.join(name for name, found in documents.items() if found)}: {error}: correct it") from None
    for part in parts:
        ours = getattr(model, part)
        for file, found in settings_of.items():
            settings = {name: value for name, value in found.items() if hasattr(ours, name)}
            for name in ("mean", "std"):
                if name in settings and same_colours(settings[name], getattr(ours, name)):
                    del settings[name]
            _check_settings(settings, ours, where=str(reader.folder / file), group=f"{part}.")


def _option(field: str, value: Any) -> str:
    """Return the command-line option that sets a field of the model to a value."""
    *parts, name = field.replace("_", "-").split(".")
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    if isinstance(value, bool):
        return f"--model.{'.'.join([*parts, name if value else f'no-{name}'])}"
    return f"--model.{'.'.join([*parts, name])} {value}"


def _has_head(reader: HfReader, prefix: str) -> bool:
    return any(f"{prefix.removesuffix('model.')}{head}" in reader.names() for head in _HEADS)


def _unused_head(prefix: str, tied: bool) -> tuple[str, ...]:
    """Patterns of names to ignore: a tied model's files may hold the embeddings a second time, as an output layer."""
    return (re.escape(prefix.removesuffix("model.")) + r"(lm_head|output)\.weight",) if tied else ()
