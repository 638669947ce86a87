"""A check of a GGUF file's header against the file's size, before the `gguf` library allocates memory by it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from pathlib import Path

from secvec_jax.errors import UserError
from secvec_jax.files import check_regular

_MAX_VALUES = 2**21
"""Metadata values in all. The library takes about 500 bytes for each; a vocabulary of 260,000 tokens has a million."""
_MAX_DIMENSIONS = 4
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type -> bytes."""
_STRING, _ARRAY = 8, 9


def check_gguf(path: Path) -> None:
    """Raise UserError unless `path` is a GGUF file whose metadata and tensors are all inside it."""
    check_regular(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except (_Damaged, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"{path} is not a complete GGUF file ({error}): fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file") from error


class _Damaged(Exception):
    """What is wrong with a header."""


class _Header:
    """A cursor over a file's bytes."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._values, self._order = data, 0, 0, "<"

    def check(self) -> None:
        if self._data[:4] != b"GGUF":
            raise _Damaged("it does not begin with GGUF")
        self._skip(4)
        if struct.unpack_from("<I", self._data, 4)[0] & 0xFFFF == 0:
            self._order = ">"
        self._skip(4)
        tensors, fields = self._number("Q"), self._number("Q")
        self._count(tensors, 24, "tensors")
        self._count(fields, 13, "metadata entries")
        alignment = 32
        for _ in range(fields):
            key = self._text("a key")
            kind = self._number("I")
            start = self._at
            self._skip_values(kind, 1)
            if key == b"general.alignment" and kind == 4:
                alignment = struct.unpack_from(self._order + "I", self._data, start)[0]
        placed = [self._tensor() for _ in range(tensors)]
        if alignment == 0 or alignment & (alignment - 1):
            raise _Damaged(f"its alignment is {alignment}")
        begin = -(-self._at // alignment) * alignment
        end = 0
        for offset, size in sorted(placed):
            if offset < end:
                raise _Damaged("two tensors overlap")
            end = offset + size
        if begin + end > len(self._data):
            raise _Damaged(f"its tensors end at byte {begin + end:,} of {len(self._data):,}")

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise _Damaged("it is cut off")

    def _number(self, kind: str) -> int:
        start = self._at
        self._skip(struct.calcsize(kind))
        return struct.unpack_from(self._order + kind, self._data, start)[0]

    def _count(self, count: int, least: int, what: str) -> None:
        """Raise an error unless `count` items of at least `least` bytes each fit in the rest of the file."""
        self._values += count
        if count * least > len(self._data) - self._at:
            raise _Damaged(f"it says that it has {count:,} {what}, for which it is too small")
        if self._values > _MAX_VALUES:
            raise _Damaged(f"it has more than {_MAX_VALUES:,} metadata entries")

    def _text(self, what: str) -> bytes:
        size = self._number("Q")
        if size > len(self._data) - self._at:
            raise _Damaged(f"{what} has {size:,} bytes, which do not fit")
        start = self._at
        self._skip(size)
        return self._data[start : self._at]

    def _skip_values(self, kind: int, count: int) -> None:
        """Skip `count` values of a type."""
        if kind in _SCALARS:
            self._skip(_SCALARS[kind] * count)
        elif kind == _STRING:
            for _ in range(count):
                self._text("a text")
        elif kind == _ARRAY and count == 1:
            kind, length = self._number("I"), self._number("Q")
            self._count(length, _SCALARS.get(kind, 8), "values in an array")
            if kind == _ARRAY:
                raise _Damaged("it has an array of arrays")
            self._skip_values(kind, length)
        else:
            raise _Damaged(f"it has metadata of the unknown type {kind}")

    def _tensor(self) -> tuple[int, int]:
        """The offset of a tensor's data, from the end of the header, and its size."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text("the name of a tensor").decode(errors="replace")[:80]
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise _Damaged(f"{name} has {dimensions:,} dimensions")
        count = math.prod(self._number("Q") for _ in range(dimensions))
        kind, offset = self._number("I"), self._number("Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError) as error:
            raise _Damaged(f"{name} is of the unknown type {kind}") from error
        return offset, -(-count // block) * size
