"""Columns of numbers become short printable text, and numbers again.

Gzip packs text by repeats and by the frequency of single characters. Decimal digits with commas waste both: a number is several characters, and its
characters mean different things. Here a whole number is 1, 2, 3, 4 or 8 characters of 91, small numbers the shortest, and the first character
tells how many, so that no commas are needed and a JSON string holds a column. frontend/src/lib/digits.ts reads and writes the same.

    first character, as a digit of 91    numbers
    0 to 47                              0 to 47
    48 to 83, then 1 digit               48 to 3,323
    84 to 88, then 2                     3,324 to 44,728
    89, then 3                           44,729 to 798,299
    90, then 7                           798,300 and more, to 5 * 10^13
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ALPHABET: Final = "".join(chr(code) for code in range(0x23, 0x7F) if code != 0x5C)
"""Printable ASCII without space, quote, exclamation mark and backslash: JSON needs no escapes."""
PEAK_DIGITS: Final = 4
"""Significant digits of the numbers that people sort by and compare."""
DIGITS: Final = 3
"""Significant digits of the activations beside a peak: at most 0.5% off."""
_BASE: Final = len(ALPHABET)
_FORMS: Final = ((48, 0), (36, 1), (5, 2), (1, 3), (1, 7))
"""The table above: so many first characters are followed by so many digits."""
_N_MORE: Final = [n_more for n_leads, n_more in _FORMS for _ in range(n_leads)]
"""How many digits follow each first character."""
_STARTS: Final = list(accumulate((_BASE**n_more for n_more in _N_MORE[:-1]), initial=0))
"""The first of the numbers that begin with it."""
_NO_DIGIT: Final = 127


def round_significant(values: NDArray[Any]) -> NDArray[np.float64]:
    """Round to `PEAK_DIGITS` significant digits, so that JSON shows no more."""
    exact = np.asarray(values, np.float64)
    with np.errstate(divide="ignore"):
        exponent = np.where(exact == 0, 0, np.floor(np.log10(np.abs(exact)))) - (PEAK_DIGITS - 1)
    down, up = 10.0 ** np.maximum(exponent, 0), 10.0 ** np.maximum(-exponent, 0)
    return np.round(exact * up / down) / up * down


def encode_number(number: int) -> str:
    """Write a whole number from 0 to 91^7 + 798,299 in 1, 2, 3, 4 or 8 characters; the first one tells how many."""
    lead = bisect_right(_STARTS, number) - 1
    rest, text = number - _STARTS[lead], ""
    for _ in range(_N_MORE[lead]):
        rest, digit = divmod(rest, _BASE)
        text = ALPHABET[digit] + text
    assert rest == 0, f"{number} is no number that a column holds"
    return ALPHABET[lead] + text


def encode_numbers(numbers: Iterable[int]) -> str:
    """Write whole numbers one after the other."""
    return "".join(map(_encode_kept, numbers))


def decode_numbers(text: str) -> list[int]:
    """Read what `encode_numbers` wrote. Raises `ValueError` for a character outside the alphabet and for a number that is cut off."""
    if not text.isascii() or (values := text.translate(_DIGIT_OF).encode()).find(_NO_DIGIT) >= 0:
        raise ValueError(f"{text[:20]!r} is no column of numbers")
    digits = iter(values)
    return [_STARTS[lead] + _read(digits, n_more) if (n_more := _N_MORE[lead]) else lead for lead in digits]


def encode_decimals(values: Sequence[float], exponent: int, digits: int) -> str:
    """Write positive numbers below 10^(exponent + 1), rounded to some significant digits: the larger, the smaller its code."""
    steps = 9 * 10 ** (digits - 1)
    codes = []
    for value in values:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        codes.append(steps * (exponent - int(power)) + 10**digits - 1 - int(mantissa.replace(".", "")))
    return encode_numbers(codes)


def decode_decimals(text: str, exponent: int, digits: int) -> list[float]:
    """Read what `encode_decimals` wrote."""
    steps, largest = 9 * 10 ** (digits - 1), 10**digits - 1
    return [float(f"{largest - code % steps}e{exponent - code // steps - digits + 1}") for code in decode_numbers(text)]


_DIGIT_OF: Final = {ord(char): i for i, char in enumerate(ALPHABET)} | {code: _NO_DIGIT for code in range(128) if chr(code) not in ALPHABET}
_encode_kept = lru_cache(1 << 16)(encode_number)


def _read(digits: Iterator[int], n: int) -> int:
    number = 0
    for _ in range(n):
        digit = next(digits, None)
        if digit is None:
            raise ValueError("a column of numbers is cut off")
        number = number * _BASE + digit
    return number
