"""Sequences of rows that know where each row is stored, for the errors that name it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, SupportsIndex, TypeVar, overload

T = TypeVar("T")


class Rows(Sequence[T], Generic[T]):
    """Rows on disk, read one by one whenever they are asked for: there may be more than memory holds.

    where: an index -> the words that say where the row is stored.
    """

    def __init__(self, read: Callable[[int], T], count: int, where: Callable[[int], str]):
        self._read, self._count, self.where = read, count, where

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(self._count)[index]
        return self._read(places) if isinstance(places, int) else [self._read(place) for place in places]


class Listed(list[T]):
    """Rows in memory that were read from `name`, where each has a number: that of its `unit`, a line or a row."""

    def __init__(self, rows: Iterable[T], name: str, unit: str, numbers: Sequence[int]):
        super().__init__(rows)
        self.name, self.unit, self.numbers = name, unit, numbers

    def where(self, index: int) -> str:
        """The words that say where a row is stored; a list that has grown or shrunk since is numbered anew."""
        if len(self.numbers) != len(self):
            return place(self.name, index + 1)
        return place(self.name, self.numbers[index], self.unit)

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Listed[T]": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "T | Listed[T]":
        if not isinstance(index, slice):
            return super().__getitem__(index)
        numbers = self.numbers if len(self.numbers) == len(self) else range(1, len(self) + 1)
        return Listed(super().__getitem__(index), self.name, self.unit, numbers[index])


def place(name: str, number: int, unit: str = "row") -> str:
    """The words that say where a row is stored."""
    return f"{name}, {unit} {number}"


def place_of(rows: Any, index: int, name: str) -> str:
    """The words that say where one of some rows is stored; `name` is what rows are called that do not know it."""
    return rows.where(index) if isinstance(rows, Rows | Listed) else place(name, index + 1)
