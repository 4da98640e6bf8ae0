"""Documents of a web crawl, read by datatrove from folders and files, here or on the hub.

Decisions: files are read in the order of their names, one after the other, so that a place in them is a file's name and a
number of documents; what the library would log and skip is refused, and its errors name the file. Needs datatrove
(`pip install 'smdm[eval]'`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_gpt.cli import Interrupted

_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")


class _Refused(ValueError):
    """A document that cannot be used, found inside of the reading library."""


def load_datatrove() -> Any:
    """The reading library's readers; its log becomes silent, and a line that it would skip ends the work."""
    try:
        from datatrove.pipeline import readers
        from loguru import logger
    except ImportError as error:
        raise ValueError(f"datatrove cannot be imported ({error}): pip install 'smdm[eval]'") from error

    def refuse(message: Any) -> None:
        if message.record["function"] == "read_file":
            raise _Refused(f"{message.record['message']}; copy the file again")

    logger.remove()
    logger.add(refuse, level="WARNING", catch=False)
    return readers


@contextmanager
def _readable(where: str, remedy: str) -> Iterator[None]:
    """Name the file or folder in what the reading libraries raise."""
    try:
        yield
    except (_Refused, Interrupted):
        raise
    # Every remote file system, compression and format has errors of its own kind.
    except Exception as error:
        raise ValueError(f"{where}: cannot be read ({type(error).__name__}: {error}); {remedy}") from error


class CrawlFiles:
    """The text files of a crawl: of a folder, or a single one; OSError or ValueError if there is no such thing."""

    def __init__(self, given: str) -> None:
        from datatrove.io import DataFolder

        self.given, self.is_local = given, "://" not in given
        path = Path(given).expanduser().absolute()
        if self.is_local and not path.exists():
            raise FileNotFoundError(f"--source {given}: no such file or folder: looked for {path}")
        is_file = path.is_file() if self.is_local else given.endswith(_SUFFIXES)
        parent, _, name = (str(path) if self.is_local else given.rstrip("/")).rpartition("/")
        if is_file and not name.endswith(_SUFFIXES):
            raise ValueError(f"--source {given}: expected one of {', '.join(_SUFFIXES)}")
        self._only = name if is_file else ""
        with _readable(f"--source {given}", "check the address"):
            self._folder = DataFolder(parent if is_file else f"{parent}/{name}")

    def names(self) -> list[str]:
        """The files, in the order in which they are read; ValueError if there is none, or the hub does not answer."""
        if self._only:
            return [self._only]
        with _readable(f"--source {self.given}", "check the name and the network, or give a local folder"):
            found = self._folder.list_files()
        names = [name for name in found if name.endswith(_SUFFIXES) and not re.search(r"(^|/)\.", name)]
        if not names:
            raise ValueError(f"--source {self.given}: no {', '.join(_SUFFIXES)} file in it")
        return names

    def identity(self) -> dict[str, str]:
        """What tells this text from another: the address, or names and sizes of local files (they may be moved)."""
        if not self.is_local:
            return {"source": self.given}
        listing = "\n".join(f"{name}:{self._folder.size(name)}" for name in self.names())
        return {"source": Path(self.given).name, "source_files": hashlib.sha256(listing.encode()).hexdigest()[:16]}

    def texts(self, name: str, text_field: str) -> Iterator[str]:
        """The documents of a file that have text, in order; ValueError if it cannot be read or has no such field."""
        readers = load_datatrove()
        where = str(self._folder.resolve_paths(name))

        def adapt(_: Any, record: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
            if text_field not in record:
                fields = ", ".join(self._fields(name) or record)
                raise _Refused(f"{where}: has no field {text_field!r}, only {fields}; give --text_field")
            text = record[text_field]
            if text is not None and not isinstance(text, str):
                raise _Refused(f"{where}: {text_field!r} holds a {type(text).__name__}, expected text")
            return {"text": text, "id": str(number)}

        if name.endswith(".parquet"):
            # Of the other columns nothing is fetched.
            reader = readers.ParquetReader(self._folder, text_key=text_field, adapter=adapt, read_metadata=False)
        else:
            reader = readers.JsonlReader(self._folder, text_key=text_field, adapter=adapt)
        with _readable(where, "copy it again" if self.is_local else "the same command goes on from what is finished"):
            for document in reader.read_file(name):
                yield document.text

    def _fields(self, name: str) -> list[str]:
        """All columns of a parquet file, of which the reader gives only those that were asked for."""
        import pyarrow.parquet

        if not name.endswith(".parquet"):
            return []
        with self._folder.open(name) as file:
            return pyarrow.parquet.read_schema(file).names
