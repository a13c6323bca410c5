"""Text files, read whole or by lines: UTF-8, what Windows programs write instead, and gzip around either."""

import codecs
import gzip
import io
import logging
import os
import re
import zlib
from pathlib import Path

logger = logging.getLogger(__name__)

# a UTF-32 mark begins with that of UTF-16
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# other files that are given by mistake, by their first bytes
OTHER_FILES = {b"PK\x03\x04": "a zip archive or an Excel file", b"\xd0\xcf\x11\xe0": "an old Excel file"}
OTHER_FILES |= {b"PAR1": "a Parquet file", b"\x1f\x8b": "a gzip file", b"%PDF": "a PDF file"}
SAVE_AS_UTF_8 = "expected UTF-8: save the file as UTF-8"
A_CHARACTER_OF_UTF_8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# of all letters: text in a Western European language has far fewer accents
MAX_SHARE_OF_ACCENTS = 0.3
OTHER_SCRIPT = re.compile(r"[^\x00-\x7f]{4}")  # and never four in a row


def read_text(path: str | os.PathLike[str], newline: str | None = None) -> str:
    r"""Return the text of a file, without a byte order mark; a file that ends in `.gz` is unpacked.

    The file is UTF-8, or UTF-16 or UTF-32 with a byte order mark. Text that is not UTF-8 and looks like Windows-1252
    is read as such, with a logged warning.

    Args:
        path: the file.
        newline: as in `open`: `None` turns every line ending into `\n`, `""` leaves them as they are.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it has another encoding, or is no text.
    """
    path = Path(path)
    text = _decode(_content(path), path.name)
    return text if newline == "" else io.StringIO(text, newline=newline).read()


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a text file that are not empty, without whitespace around them; errors as `read_text`."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name}: found a broken gzip file ({error}); expected a whole one") from None


def _decode(data: bytes, name: str) -> str:
    encoding = next((MARKS[mark] for mark in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            return _decode_as_windows_1252(data, error, name)
        line = data.count(b"\n", 0, error.start) + 1
        found = f"found bytes that are not {encoding.upper()}, as its first bytes say ({error.reason})"
        raise ValueError(f"{name}:{line}: {found}; {SAVE_AS_UTF_8}") from None
    kind = next((kind for first, kind in OTHER_FILES.items() if data.startswith(first)), None)
    if kind is not None or "\0" in text[:1000]:
        raise _no_text(kind, name)
    return text


def _decode_as_windows_1252(data: bytes, error: UnicodeDecodeError, name: str) -> str:
    kind = next((kind for first, kind in OTHER_FILES.items() if data.startswith(first)), None)
    if kind is not None or b"\0" in data[:1000]:
        raise _no_text(kind, name)
    line = data.count(b"\n", 0, error.start) + 1
    refusal = ValueError(
        f"{name}:{line}: found byte {data[error.start]:#04x} at offset {error.start}; {SAVE_AS_UTF_8}"
    )
    # a file of two encodings, which one pass would spoil, or a few bytes that Windows-1252 does not have
    if A_CHARACTER_OF_UTF_8.search(data):
        raise refusal from None
    try:
        text = data.decode("windows-1252")
    except UnicodeDecodeError:
        raise refusal from None
    letters = [letter for letter in text if letter.isalpha()]
    # Cyrillic or Japanese, for instance, in a code page of its own
    is_other = sum(letter > "\x7f" for letter in letters) > MAX_SHARE_OF_ACCENTS * len(letters)
    if is_other or OTHER_SCRIPT.search(text):
        raise refusal from None
    first = next(word for word in re.findall(r"\w+|\S", text) if not word.isascii())
    logger.warning("%s is not UTF-8; it was read as Windows-1252. Check a word: %s", name, first)
    return text


def _no_text(kind: str | None, name: str) -> ValueError:
    return ValueError(f"{name}: found {kind or 'bytes that are no text'}; expected text. Is its name right?")
