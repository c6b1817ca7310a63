"""What is wrong with a safetensors file, told from its header: nothing of its tensors is read."""

import json
import struct
from pathlib import Path
from typing import Any

_LENGTH = 8
"""Bytes in front of the header that hold its length."""
_LONGEST_HEADER = 100_000_000
"""Bytes, as the format limits it."""
_POINTER = b"version https://git-lfs"


def find_damage(path: Path) -> str | None:
    """What is wrong with the file, as the end of a sentence that begins with its name; None where nothing is."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
            if not start:
                return "is empty"
            if start == _POINTER:
                return "is a Git LFS pointer, not the weights: fetch them with git lfs pull"
            length = struct.unpack("<Q", start[:_LENGTH])[0] if len(start) >= _LENGTH else size
            if length > min(size - _LENGTH, _LONGEST_HEADER):
                return f"is cut off or no safetensors file: its header does not fit into its {size} bytes"
            file.seek(_LENGTH)
            needed = _LENGTH + length + _end_of_tensors(json.loads(file.read(length)))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "is no safetensors file: its header is not what the format asks for"
    if size < needed:
        return f"is cut off: {size} of {needed} bytes are there"
    return None if size == needed else f"is damaged: it has {size} bytes, its header tells of {needed}"


def _end_of_tensors(header: dict[str, Any]) -> int:
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return max(ends, default=0)
