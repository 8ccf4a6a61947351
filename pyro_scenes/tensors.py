"""Files of torch.save from strangers: looked at before torch is given anything of them.

Such a file is a zip archive with a pickle of everything but the tensors' values, and an entry for
each storage of values. Here entries are counted, the pickle is looked at without running it, and
every tensor has to lie within its storage, and every storage within the file; what is left over
goes to torch.load with ``weights_only=True``.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import torch

from pyro_scenes import limits, pickles
from pyro_scenes.files import open_zip, read_entry

REBUILD = ("torch._utils", "_rebuild_tensor_v2")
# Bytes of an element in each kind of storage.
STORAGES = {
    ("torch", f"{kind}Storage"): size
    for kind, size in {
        "Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Byte": 1, "Bool": 1
    }.items()
}
NAMES = {REBUILD, ("collections", "OrderedDict"), *STORAGES}
OPCODES = pickles.OPCODES | set("BINFLOAT BINPERSID EMPTY_DICT LONG1 SETITEM SETITEMS".split())
# Entries that torch reads beside the storages.
HEAD = ("data.pkl", "version", "byteorder")


def read(path: Path) -> Any:
    """The content of a file that torch.save wrote.

    :raises UserError: if it claims more memory than a file may take.
    :raises Exception: of any kind, if it is damaged or holds anything but tensors, numbers,
        strings and containers of them.
    """
    with open_zip(path) as archive:
        clean = _checked(path, archive)
    return torch.load(clean, map_location="cpu", weights_only=True)


def _checked(path: Path, archive: zipfile.ZipFile) -> io.BytesIO:
    """A copy of the archive with what was checked and nothing else: no two readers of zip archives
    agree on all that a hostile one could be."""
    folder = archive.namelist()[0].partition("/")[0]
    entries = {entry.filename.removeprefix(f"{folder}/"): entry for entry in archive.infolist()}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("it is compressed")
    limits.check(path, sum(entry.file_size for entry in entries.values())
                 + limits.OBJECTS * entries["data.pkl"].file_size)
    pickled = bytes(read_entry(archive, entries["data.pkl"]))
    used = _storages(pickled, {name: entry.file_size for name, entry in entries.items()})
    clean = io.BytesIO()
    with zipfile.ZipFile(clean, "w") as copy:
        for name in (*HEAD, *sorted(used)):
            if name in entries:
                copy.writestr(f"archive/{name}", read_entry(archive, entries[name]))
    clean.seek(0)
    return clean


def _storages(pickled: bytes, sizes: dict[str, int]) -> set[str]:
    """The entries that a pickle refers to. :raises ValueError: if a tensor or a storage lies."""
    used = set()

    def storage(pid: Any) -> int:
        """Elements that a storage has."""
        _, kind, key, _, count = pid
        name = f"data/{key}"
        if not _whole(count) or count * STORAGES[kind.name] != sizes[name]:
            raise ValueError("a storage is of another size")
        used.add(name)
        return count

    _, calls = pickles.look(pickled, NAMES, OPCODES, storage)
    for call in calls:
        if call.name == REBUILD:
            elements, offset, shape, strides, *_ = call.arguments
            if not _whole(elements, offset, *shape, *strides):
                raise ValueError("a tensor has no sizes")
            reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            size = math.prod(shape)
            # As many elements as are stored at most: steps of 0 would make any number of one.
            if size > elements or (size and offset + reach >= elements):
                raise ValueError("a tensor is larger than what is stored")
        elif call.name in STORAGES:
            raise ValueError("a storage is called")
    return used


def _whole(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
