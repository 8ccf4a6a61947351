"""Writing files whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an exception.

    It is written beside `path`, in the same folder, and removed when the block fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write JSON with one entry of the outermost dictionary or list a line."""
    if isinstance(content, dict):
        ends, lines = "{}", [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items()]
    else:
        ends, lines = "[]", [json.dumps(entry) for entry in content]
    text = f"{ends[0]}\n  " + ",\n  ".join(lines) + f"\n{ends[1]}\n"
    with atomic_write(path) as file:
        file.write(text.encode())
