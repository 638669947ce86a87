"""The console that all output of the verbs goes through: what is printed is text, never markup or escape sequences."""

import io
import sys
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

from secvec_jax.printable import printable


class Console(rich.console.Console):
    """rich's console without markup in texts, and with the control characters in them shown as visible escapes.

    Styles are given as arguments (`print(text, style="dim")`).
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Return rich's segments; those of text are printable, and those that move the cursor are rich's own."""
        for text, style, control in super().render(*arguments, **options):
            yield Segment(text if control else printable(text, keep="\n"), style, control)


def print_any_character() -> None:
    """Let the standard output take characters that its encoding lacks, escaped, in place of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
