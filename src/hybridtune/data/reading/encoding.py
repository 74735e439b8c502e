"""Finds out in which encoding a text file is, without holding it in memory, and opens it so."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from charset_normalizer import from_bytes

from ...errors import DataError
from .files import File

SAMPLE = 65_536

_CHUNK = 2**20
_GUESSED_FROM = 2**17
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What files are saved in today. Of all that Python knows, old Macintosh code pages would win on short texts.
_COMMON_ENCODINGS = [f"cp125{digit}" for digit in range(9)]
_COMMON_ENCODINGS += ["cp874", "koi8_r", "iso8859_2", "iso8859_15", "gb18030", "big5", "cp932", "euc_jp", "cp949"]
_BROKEN = "\ufffd"
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\x1a\x1b"))


@dataclass(frozen=True)
class Text:
    """A text file whose encoding is known.

    Attributes:
        file: the file.
        encoding: what it is read as.
        guessed: whether other encodings would be possible.
        damage: what to say of bytes that do not belong to the encoding; such bytes come as half surrogates.
    """

    file: File
    encoding: str
    guessed: bool = False
    damage: DataError | None = None

    @contextmanager
    def open(self, newline: str = "") -> Iterator[io.TextIOWrapper]:
        """Opens the file as text; lines end as `newline` says and keep their ends.

        Raises:
            DataError: the file cannot be opened or read.
        """
        encoding = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        errors = "strict" if self.damage is None else "surrogateescape"
        with self.file.open() as stream:
            yield io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline)

    def sample(self) -> str:
        """Returns the start of the text."""
        with self.open() as stream:
            return stream.read(SAMPLE)


def look(file: File) -> Text:
    """Finds the encoding of a text file. It is looked at to its end, so that no byte comes as a surprise later.

    Raises:
        DataError: the file cannot be opened or decoded, or is no text.
    """
    try:
        stat = file.path.stat()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be opened", found=error.strerror) from error
    return _look(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _look(file: File, size: int, changed: int) -> Text:
    """Size and time of change are there so that a file that was written anew is looked at anew."""
    head = file.head(SAMPLE)
    certain = next((name for bom, name in _BOMS if head.startswith(bom)), None) or _wide(head)
    if certain is not None:
        problem = _first_error(file, certain)
        if problem is not None and certain != "utf-8":
            raise DataError(
                f"{file.name}: is not readable as {certain}, which it begins as",
                found=problem[2],
                mend="save the file as UTF-8",
            )
        if problem is None:
            return Text(file, certain)
    if sum(head.count(byte) for byte in _CONTROL) > 4 + len(head) / 20:
        raise DataError(
            f"{file.name}: is not a text file",
            found=f"binary content that begins with {head[:16]!r}",
            mend="save the rows as CSV or JSON Lines (UTF-8)",
        )
    problem = _first_error(file, "utf-8")
    if problem is None:
        return Text(file, "utf-8")
    characters, broken, sample = _survey(file)
    # In another encoding hardly any non-ASCII character is valid UTF-8 by chance, so this file is UTF-8 with damage.
    if characters > broken:
        line, column, byte = problem
        damage = DataError(
            f"{file.name}:{line}:{column}: a byte is not UTF-8, though the rest of the file is",
            found=f"byte {byte}" + (f", and {broken - 1} more such places" if broken > 1 else ""),
            mend="save the file as UTF-8 again, or correct that line",
        )
        return Text(file, "utf-8", damage=damage)
    return Text(file, _guess(file, sample), guessed=True)


def _wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: of the characters of a header and of line ends, every other byte is zero."""
    if b"\0" not in head:
        return None
    head = head[: len(head) // 4 * 4]
    zeros = [head[at::4].count(0) for at in range(4)]
    if sum(zeros) > len(head) * 0.7:
        names = ["utf-32-le" if zeros[0] < zeros[3] else "utf-32-be"]
    else:
        even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
        if max(even, odd) < 9 * min(even, odd) or max(even, odd) < 4:
            return None
        names = ["utf-16-le" if odd > even else "utf-16-be"]
    for name in names:
        text = head.decode(name, "replace")
        if text.count(_BROKEN) <= 1 and "\0" not in text:  # one may be cut off at the end
            return name
    return None


def _first_error(file: File, encoding: str) -> tuple[int, int, str] | None:
    """Line, column (in bytes) and value of the first bytes that do not fit an encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, tail, pending = 1, 0, 0
    with file.open() as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                cut = before.rfind(b"\n")
                column = len(before) - cut if cut >= 0 else tail - pending + len(before) + 1
                return line + before.count(b"\n"), column, f"0x{error.object[error.start]:02x}"
            if not chunk:
                return None
            line += chunk.count(b"\n")
            tail = len(chunk) - chunk.rfind(b"\n") - 1 if b"\n" in chunk else tail + len(chunk)
            state = decoder.getstate()[0]
            pending = len(state) if isinstance(state, bytes) else 0


def _survey(file: File) -> tuple[int, int, bytes]:
    """How many characters beyond ASCII are UTF-8, how many bytes are not, and stretches of lines with such bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    valid = broken = 0
    sample = bytearray()
    with file.open() as stream:
        while True:
            chunk = stream.read(_CHUNK)
            text = decoder.decode(chunk, final=not chunk)
            marks = text.count(_BROKEN)
            broken += marks
            valid += sum(1 for character in text if character > "\x7f") - marks if not text.isascii() else 0
            if not chunk:
                return valid, broken, bytes(sample)
            if not chunk.isascii() and len(sample) < _GUESSED_FROM:
                sample += _stretch(chunk) if len(chunk) == _CHUNK else chunk[:_GUESSED_FROM]


def _stretch(chunk: bytes) -> bytes:
    """Whole lines from the first one on that is not ASCII."""
    first = next(at for at, byte in enumerate(chunk) if byte > 0x7F)
    start = chunk.rfind(b"\n", 0, first) + 1
    end = chunk.rfind(b"\n", start, start + _GUESSED_FROM)
    return chunk[start : end + 1 if end > start else start + _GUESSED_FROM]


def _guess(file: File, sample: bytes) -> str:
    guesses = from_bytes(sample, cp_isolation=_COMMON_ENCODINGS) or from_bytes(sample)
    best = guesses.best()
    if best is not None:
        # Short texts often fit several code pages equally well. Then the most common one is the best guess.
        equal = [other for other in guesses if (other.chaos, other.coherence) == (best.chaos, best.coherence)]
        western = any("cp1252" in other.could_be_from_charset for other in equal)
        names = [*(["cp1252"] if western else []), best.encoding, *(other.encoding for other in guesses)]
        for name in dict.fromkeys(names):
            if _first_error(file, name) is None:
                return name
    raise DataError(f"{file.name}: the encoding cannot be told", expected="UTF-8", mend="save the file as UTF-8")
