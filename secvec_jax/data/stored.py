"""Rows that record where each of them is stored, so that errors can name it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Rows(Sequence[T], Generic[T]):
    """Normalized rows, in memory or on disk. They never change, so they are passed on without copies.

    read: index -> row; for rows on disk, of which there may be more than memory holds, called at each access. where:
    index -> where the row is stored, in words. answered: whether all rows were checked to have an answer.
    """

    def __init__(
        self, read: Callable[[int], T], count: int, where: Callable[[int], str], answered: bool = False
    ) -> None:
        self._read, self._count, self.where, self.answered = read, count, where, answered

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows[T]": ...
    def __getitem__(self, index: int | slice) -> "T | Rows[T]":
        chosen = range(self._count)[index]
        return self._read(chosen) if isinstance(chosen, int) else self.select(chosen)

    def select(self, indices: Sequence[int]) -> "Rows[T]":
        """The rows with these indices, with the record of where they are stored."""
        return Rows(
            lambda index: self._read(indices[index]),
            len(indices),
            lambda index: self.where(indices[index]),
            self.answered,
        )

    def __eq__(self, other: object) -> bool:
        """Whether a sequence has the same rows in the same order."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other))

    def __add__(self, other: Iterable[T]) -> list[T]:
        return [*self, *other]

    def __radd__(self, other: Iterable[T]) -> list[T]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"Rows({self._count})"


def location(name: str, number: int, unit: str = "row") -> str:
    """Where a row is stored, in words: "rows.jsonl, line 14"."""
    return f"{name}, {unit} {number}"


def location_of(rows: Any, index: int, name: str) -> str:
    """Where a row is stored, in words; `name` is used for rows that do not record it."""
    return rows.where(index) if isinstance(rows, Rows) else location(name, index + 1)
