"""Caches grain's shuffles, on import.

Grain finds the place of a row by walking a cipher over 65,536 numbers until it meets one that is a row's: ten
milliseconds a row where there are three, most of the time of a short training. The function is pure, so that the order
is the same.
"""

import functools
from types import SimpleNamespace

from grain._src.python.dataset.transformations import shuffle

shuffle.index_shuffle = SimpleNamespace(index_shuffle=functools.cache(shuffle.index_shuffle.index_shuffle))
