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

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
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
_ONE, _TWO, _THREE, _FOUR = 48, 36, 5, 1
_PAIRS: Final = _TWO * _BASE
_TRIPLES: Final = _THREE * _BASE**2
_QUADS: Final = _BASE**3
_LONG: Final = 7


def round_significant(values: NDArray[Any]) -> NDArray[np.float64]:
    """Round to `PEAK_DIGITS` significant digits, so that JSON shows no more."""
    exact = np.asarray(values, np.float64)
    with np.errstate(divide="ignore"):
        exponent = np.where(exact == 0, 0, np.floor(np.log10(np.abs(exact)))) - (PEAK_DIGITS - 1)
    down, up = 10.0 ** np.maximum(exponent, 0), 10.0 ** np.maximum(-exponent, 0)
    return np.round(exact * up / down) / up * down


def encode_number(number: int) -> str:
    """Write a whole number from 0 to 91^7 - 1 in 1, 2, 3, 4 or 8 characters; the first one tells how many."""
    if number < _ONE:
        return ALPHABET[number]
    number -= _ONE
    if number < _PAIRS:
        return ALPHABET[_ONE + number // _BASE] + ALPHABET[number % _BASE]
    number -= _PAIRS
    if number < _TRIPLES:
        return ALPHABET[_ONE + _TWO + number // _BASE**2] + _digits(number % _BASE**2, 2)
    number -= _TRIPLES
    if number < _QUADS:
        return ALPHABET[_BASE - 2] + _digits(number, 3)
    assert number < _BASE**_LONG
    return ALPHABET[_BASE - 1] + _digits(number - _QUADS, _LONG)


def encode_numbers(numbers: Iterable[int]) -> str:
    """Write whole numbers one after the other."""
    return "".join(map(_encode_kept, numbers))


def decode_numbers(text: str) -> list[int]:
    """Read what `encode_numbers` wrote. Raises `ValueError` for a character outside the alphabet and for a number that is cut off."""
    digits = iter(text.translate(_DIGIT_OF).encode("latin-1") if text.isascii() else _refuse(text))
    numbers = []
    for lead in digits:
        if lead < _ONE:
            numbers.append(lead)
        elif lead < _ONE + _TWO:
            numbers.append(_ONE + (lead - _ONE) * _BASE + _read(digits, 1))
        elif lead < _BASE - 2:
            numbers.append(_ONE + _PAIRS + (lead - _ONE - _TWO) * _BASE**2 + _read(digits, 2))
        elif lead == _BASE - 2:
            numbers.append(_ONE + _PAIRS + _TRIPLES + _read(digits, 3))
        elif lead == _BASE - 1:
            numbers.append(_ONE + _PAIRS + _TRIPLES + _QUADS + _read(digits, _LONG))
        else:
            _refuse(text)
    return numbers


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


_DIGIT_OF: Final = {ord(char): i for i, char in enumerate(ALPHABET)} | {code: 127 for code in range(128) if chr(code) not in ALPHABET}
_encode_kept = lru_cache(1 << 16)(encode_number)


def _digits(number: int, n: int) -> str:
    return "".join(ALPHABET[number // _BASE**place % _BASE] for place in range(n - 1, -1, -1))


def _read(digits: Iterator[int], n: int) -> int:
    number = 0
    for _ in range(n):
        digit = next(digits, None)
        if digit is None or digit >= _BASE:
            message = "a column of numbers is cut off"
            raise ValueError(message)
        number = number * _BASE + digit
    return number


def _refuse(text: str) -> bytes:
    message = f"{text[:20]!r} is no column of numbers"
    raise ValueError(message)
