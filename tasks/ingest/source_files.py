"""A file of a source: its bytes, unpacked from gzip or zstd while they are read, and the encoding of its text."""

import hashlib
import io
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from urllib.parse import urlsplit

from tasks.common import identity

Rows = Iterator[tuple[str, Any]]  # a position, such as "line 3", and a mapping or an undecoded line of JSON
BUFFER_BYTES = 2**16
HEAD_BYTES = 2**16  # read to detect format and encoding
SAMPLE_BYTES = 2**23
PRELOADED_BYTES = 2**20  # a smaller file is opened once and kept while it is read
PACKED_SIGNATURES = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
PACKED_SUFFIXES = (".gz", ".zst", ".zstd")
READ_ERRORS = (OSError, EOFError, zlib.error)  # of a disk, or of a packed file that is damaged or truncated
WESTERN = "windows-1252"
HIGH_RUN = re.compile(rb"[\x80-\xff]+")
LONG_RUN_BYTES = 3
UTF8_CHARACTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
UNDEFINED_IN_WESTERN = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
MAX_ATYPICAL_SHARE = 0.3  # of the bytes beyond ASCII of a text in Windows-1252


class UnreadableFile(Exception):
    """A file that cannot be read; the message says what was found, where, and what to do."""


@dataclass
class SourceFile:
    """A file of a source. `label` is what messages call it: its path under data/sources/, or its address."""

    path: Path
    label: str
    encoding: str | None = None  # of its text; None: detected
    notes: list[str] = field(default_factory=list)  # what a user should know about how it was read
    is_sampled: bool = False  # only its beginning is read, so only that decides the encoding
    content: bytes | None = field(default=None, repr=False)  # of a small file
    _raw: BinaryIO | None = field(default=None, repr=False)

    def preload(self) -> None:
        """Keep the bytes of a small file, so that it is opened once."""
        try:
            if self.path.stat().st_size <= PRELOADED_BYTES:
                self.content = self.path.read_bytes()
        except OSError as error:
            raise UnreadableFile(f"{self.label} could not be opened ({error.strerror}); check it") from error

    def sha256(self) -> str:
        """Return the hash of the file's bytes, packed as they are."""
        return identity.file_hash(self.path) if self.content is None else hashlib.sha256(self.content).hexdigest()

    def open(self) -> BinaryIO:
        """Open the file's bytes, unpacked."""
        raw: BinaryIO = (
            self.path.open("rb", buffering=BUFFER_BYTES) if self.content is None else io.BytesIO(self.content)
        )
        self._raw = raw
        signature = raw.read(4)
        raw.seek(0)
        packing = next((name for start, name in PACKED_SIGNATURES.items() if signature.startswith(start)), None)
        if packing == "gzip":
            import gzip

            unpacked = gzip.GzipFile(fileobj=raw, mode="rb")
            # Closed with it; `gzip` does so only with a file that it opened itself.
            unpacked.myfileobj = raw  # type: ignore[assignment]
            return cast(BinaryIO, io.BufferedReader(unpacked, BUFFER_BYTES))
        if packing == "zstd":
            import pyarrow as pa

            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
            return cast(BinaryIO, io.BufferedReader(stream, BUFFER_BYTES))
        return raw

    @property
    def bytes_read(self) -> int:
        """How many bytes of the file have been read, packed as they are, while it is open."""
        return 0 if self._raw is None or self._raw.closed else self._raw.tell()

    @property
    def suffix(self) -> str:
        """The suffix of the name in lower case, without that of gzip or zstd."""
        address = self.label.lower()
        name = Path(urlsplit(address).path if "://" in address else address)
        return (name.with_suffix("") if name.suffix in PACKED_SUFFIXES else name).suffix

    def head(self) -> bytes:
        """Return the first bytes, unpacked."""
        try:
            with self.open() as opened:
                return opened.read(HEAD_BYTES)
        except READ_ERRORS as error:
            raise UnreadableFile(f"{self.label} could not be read at its beginning: {error}") from error

    def open_text(self, newline: str | None = None) -> IO[str]:
        """Open the file's text in the encoding that it has, without a byte-order mark."""
        encoding = self.text_encoding()
        return io.TextIOWrapper(self.open(), encoding=encoding, newline=newline)

    def text(self) -> str:
        """Return the whole text of a file, with `\\n` as line end."""
        with self.open() as opened:
            content = opened.read()
        text = content.decode(self.text_encoding(lambda: [content]))
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text

    def find_encoding(self, chunks: Callable[[], Iterable[bytes]] | None = None) -> str | None:
        """Return the encoding of the text: that of the settings, or the one found in its bytes; None if unknown."""
        return self.encoding or find_encoding(chunks or self._chunks)

    def text_encoding(self, chunks: Callable[[], Iterable[bytes]] | None = None) -> str:
        """Return the encoding of the text; raise UnreadableFile with the line if it is unknown."""
        found = self.find_encoding(chunks)
        if found is None:
            raise UnreadableFile(self._describe_encoding_error())
        if found == WESTERN and self.encoding is None:
            self.notes.append(f"not UTF-8, read as {WESTERN}; set `encoding` if that is wrong")
        return found

    def _chunks(self) -> Iterator[bytes]:
        with self.open() as opened:
            if self.is_sampled:
                head = opened.read(SAMPLE_BYTES)
                yield head[: head.rfind(b"\n") + 1] if len(head) == SAMPLE_BYTES else head
                return
            while chunk := opened.read(BUFFER_BYTES):
                yield chunk

    def _describe_encoding_error(self) -> str:
        """Return the place of the first byte that is not UTF-8."""
        with self.open() as opened:
            for number, line in enumerate(opened, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    found = f"the byte 0x{error.object[error.start]:02x} in line {number}"
                    return f"expected UTF-8 text in {self.label}, found {found}; save it as UTF-8, or set `encoding`"
        return f"expected UTF-8 text in {self.label}, found an incomplete character at its end"


def find_encoding(chunks: Callable[[], Iterable[bytes]]) -> str | None:
    """Return utf-8-sig, utf-16 (by its byte-order mark) or windows-1252; None if the text is in none of them.

    `chunks` starts the iteration over the bytes.
    """
    decoder = getincrementaldecoder("utf-8")()
    try:
        for number, chunk in enumerate(chunks()):
            if not number and chunk.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                return "utf-16"
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        western = _WesternCounts()
        for chunk in chunks():
            western.add(chunk)
        return WESTERN if western.are_plausible else None
    return "utf-8-sig"


@dataclass
class _WesternCounts:
    """Counts of bytes beyond ASCII that tell Windows-1252 from damaged UTF-8 and from other encodings."""

    undefined: int = 0
    high: int = 0
    in_runs: int = 0  # in runs of LONG_RUN_BYTES or more
    in_utf8: int = 0  # in what is a character of UTF-8

    def add(self, chunk: bytes) -> None:
        """Count the bytes of a piece of the text."""
        runs = [len(run) for run in HIGH_RUN.findall(chunk)]
        self.high += sum(runs)
        self.in_runs += sum(length for length in runs if length >= LONG_RUN_BYTES)
        self.undefined += len(UNDEFINED_IN_WESTERN.findall(chunk))
        self.in_utf8 += sum(map(len, UTF8_CHARACTER.findall(chunk)))

    @property
    def are_plausible(self) -> bool:
        """Whether the text is Windows-1252: most of the bytes are isolated, as accented letters are between others."""
        return not self.undefined and max(self.in_runs, self.in_utf8) <= MAX_ATYPICAL_SHARE * self.high
