"""Reads what Weights & Biases wrote offline: records in LevelDB's log format behind a 7-byte header."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768


def records(path: Path) -> list[Any]:
    """Return the protobuf records of a .wandb file."""
    data, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            break
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """Return everything that was logged, one dictionary per call."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def config(path: Path) -> dict[str, Any]:
    """Return the run's config."""
    found: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            found |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return found


def run_ids(path: Path) -> set[str]:
    return {record.run.run_id for record in records(path) if record.WhichOneof("record_type") == "run"}
