"""Files: written whole or not at all, and read with no trust in what they claim."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pyro_scenes import limits
from pyro_scenes.errors import UserError, reason

# Bytes of an archive that are read at a time, and the most that its directory may have.
CHUNK = 4 * 2**20


def _unfinished(path: Path, process: str) -> Path:
    """Where a process writes what will be at `path`."""
    return path.with_name(f".{path.name}.{process}.tmp")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an exception.

    It is written beside `path`, in the same folder, which is made if need be, and removed when the
    block fails. An OSError, of a full disk say, names `path`.
    """
    temporary = _unfinished(path, str(os.getpid()))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a machine that stops may keep the name and no content
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is at `path` when the block ends without an exception, or nowhere.

    An OSError, of a full disk say, names `path`.

    :raises UserError: if there is anything already.
    """
    check_absent(path)
    temporary = _unfinished(path, str(os.getpid()))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_absent(folder: Path) -> None:
    """:raises UserError: if there is anything where a new folder is to be."""
    if folder.exists():
        raise UserError(f"{folder} exists: give the folder another name")


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it."""
    for temporary in path.parent.glob(_unfinished(path, "*").name):
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder, which exists.

    The lock is on the folder itself and dies with the process, so that nothing is left behind.

    :raises UserError: if another process is in it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError:
        raise UserError(f"{folder} is not a folder: give another name") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another training: wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # A file system that has no locks, as some of networks, is used without.
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write JSON with one entry of the outermost dictionary or list a line."""
    if isinstance(content, dict):
        ends, lines = "{}", [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items()]
    else:
        ends, lines = "[]", [json.dumps(entry) for entry in content]
    text = f"{ends[0]}\n  " + ",\n  ".join(lines) + f"\n{ends[1]}\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: Path, names: Iterable[str] = (), kind: type = dict) -> Any:
    """The dictionary, or what else of a kind, in a JSON file.

    :param names: what it has to have. :raises UserError: if it has not, or is damaged or missing.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            limits.check(path, os.fstat(file.fileno()).st_size * limits.OBJECTS)
            content = parse_json(file.read(), kind)
        missing = [name for name in names if name not in content]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not what it should be ({reason(error)}): mend or remove it, or"
                        " get it again") from None
    return content


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """The dictionary, or what else of a kind, in some JSON. :raises ValueError: if there is none.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, kind):
        raise ValueError(f"it is not a {'dictionary' if kind is dict else kind.__name__}")
    return content


class _Wary(io.FileIO):
    """A file of which little is read at a time: how long its directory is, an archive may claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > CHUNK:
            raise zipfile.BadZipFile("its directory is too long")
        return super().read(-1 if size is None else size)


def check_regular(path: Path) -> None:
    """:raises ValueError: if there is a device or a pipe, which may have no end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("it is no regular file")


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive of which nothing is taken that was not checked.

    :raises BadZipFile: and what else zipfile raises, also for methods of compression whose pieces
        have no largest size.
    """
    check_regular(path)
    with _Wary(path) as file, zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile("it is compressed by a method that is not read")
        yield archive


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """All bytes of an entry, as many as it claims. :raises BadZipFile: if it has fewer."""
    content = bytearray()
    with archive.open(entry) as file:
        while piece := file.read(CHUNK):
            content += piece
    if len(content) != entry.file_size:
        raise zipfile.BadZipFile(f"{entry.filename} is cut short")
    return content
