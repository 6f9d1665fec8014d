"""The records of a JSON array or of JSON Lines, one at a time, as the bytes that they are in the file.

A file of several gigabytes is read through a small window, and no record is parsed here: the worker that receives the
bytes parses them. So a record that is not valid JSON does not spoil the file.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from laver_megatron.data.index.members import MAX_RECORD_BYTES

_CHUNK_BYTES = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
# A whole string, or one character that gives the array its shape. Possessive: no backtracking, whatever the input.
# A quotation mark on its own is a string whose end has not been read yet.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)


def read_records(path: Path) -> Iterator[bytes]:
    """The records of a file that is a JSON array or JSON Lines. Its first character says which; where that is `[`, two
    lines that are whole lists say that it is JSON Lines of bare lists.

    A line above MAX_RECORD_BYTES comes cut off there, which no JSON parser will take for valid.

    Raises:
        ValueError: the file is neither, an array does not end, or one of its records is above MAX_RECORD_BYTES.
    """
    with open(path, "rb") as file:
        if file.read(len(_UTF8_MARK)) != _UTF8_MARK:
            file.seek(0)
        start = file.tell()
        first = _first_character(file)
        file.seek(start)
        if first == b"[" and not _has_lists_as_lines(file):
            yield from _array(file, path)
        elif first in (b"{", b"["):
            yield from _lines(file)
        elif first:
            raise ValueError(f"{path} is neither a JSON array nor JSON Lines in UTF-8: it begins with {first!r}")


def _has_lists_as_lines(file: BinaryIO) -> bool:
    """Whether a line that ends a list is followed by one that begins another: there is no comma between the elements of
    an array then. Leaves the file where it was."""
    start = file.tell()
    last = b""  # character of the first line that has any
    while part := file.readline(_CHUNK_BYTES):
        last = part.rstrip(_SPACE)[-1:] or last
        if last and part.endswith(b"\n"):
            break
    found = last == b"]" and _first_character(file) == b"["
    file.seek(start)
    return found


def _first_character(file: BinaryIO) -> bytes:
    while chunk := file.read(_CHUNK_BYTES):
        if text := chunk.lstrip(_SPACE):
            return text[:1]
    return b""


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(MAX_RECORD_BYTES):
        rest = line
        while rest and not rest.endswith(b"\n"):  # only the first part of an endless line is kept
            rest = file.readline(_CHUNK_BYTES)
        if text := line.strip(_SPACE):
            yield text


def _array(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The elements of an array: all between its brackets, cut at the commas that lie in no string or bracket."""
    window, offset = b"", 0  # what has been read and not handed out, and where in the file it begins
    start = place = depth = 0  # of the current element in the window; how far it has been looked at; brackets open
    while True:
        match = _TOKEN.search(window, place)
        if match is None or match[0] == b'"':
            place = len(window) if match is None else match.start()
            # At least doubled, so that a long string is not looked at again and again.
            chunk = file.read(max(_CHUNK_BYTES, len(window) - start))
            if not chunk:
                raise ValueError(f"{path} is cut off: the JSON array does not end, after byte {offset + start}")
            if len(window) - start > MAX_RECORD_BYTES:
                raise ValueError(f"{path}: the record at byte {offset + start} is above {MAX_RECORD_BYTES:,} bytes")
            window, offset = window[start:] + chunk, offset + start
            start, place = 0, place - start
            continue
        token, place = match[0], match.end()
        if token in (b"[", b"{"):
            depth += 1
            start = place if depth == 1 else start
        elif token in (b"]", b"}"):
            depth -= 1
        if depth == 0 or (depth == 1 and token == b","):
            if text := window[start : match.start()].strip(_SPACE):
                yield text
            start = place
        if depth == 0:
            break
    if _first_character(file) or window[place:].strip(_SPACE):
        raise ValueError(f"{path} goes on after the end of its JSON array, at byte {offset + place}")
