"""UTF-8 text files, read whole or by lines; an error names the line."""

import io
import os
from pathlib import Path


def read_text(path: str | os.PathLike[str], newline: str | None = None) -> str:
    r"""Return the text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        newline: as in `open`: `None` turns every line ending into `\n`, `""` leaves them as they are.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"{Path(path).name}:{line}: found {found}; expected UTF-8: save the file as UTF-8") from None
    return text if newline == "" else io.StringIO(text, newline=newline).read()


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a UTF-8 file that are not empty, without whitespace around them; errors as `read_text`."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]
