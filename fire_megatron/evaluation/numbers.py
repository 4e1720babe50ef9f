"""Numbers as they are written, exactly: decimals, powers of ten, fractions, mixed numbers, percentages, bases."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

ROUNDING = Fraction(1, 2_000_000)
"""Half of the sixth decimal place."""
_SMALL = Fraction(1, 1000)
_LARGEST_EXPONENT = 400
"""Powers of ten beyond this are no number that is worth writing out."""
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_POWER_OF_TEN = r"10\s*\^\s*\{{?\s*(?P<{}>[-+]?\d{{1,4}})\s*\}}?"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:"
    r"(?:(?P<whole>\d{1,30})\s*(?=\\frac)|(?P<spaced>\d{1,30})\s+(?=\d+\s*/))?"
    r"(?:\\frac\s*\{\s*(?P<minus>-?)\s*(?P<top>\d{1,30})\s*\}\s*\{\s*(?P<below>\d{1,30})\s*\}"
    r"|(?P<over>\d{1,30})\s*/\s*(?P<under>\d{1,30}))"
    r"|(?P<digits>\d[\d,]*\.?\d*|\.\d+)"
    rf"(?:\s*(?:\\times|\\cdot|\*)\s*{_POWER_OF_TEN.format('exponent')})?|{_POWER_OF_TEN.format('power')})"
    r"\s*(?P<percent>\\?%)?(?:_\s*\{?\s*(?P<base>\d+)\s*\}?)?",
    re.ASCII,
)


@dataclass(frozen=True)
class WrittenNumber:
    """What a number says."""

    value: Fraction
    rounded: bool
    """Whether it is written with a point or a power of ten."""
    percent: bool
    base: int | None

    def equals(self, other: WrittenNumber) -> bool:
        """A base has to agree with the right answer's, which may be all that is known of it: ``52`` is right for
        ``52_8``. A percentage is its number, or a hundredth of it.

        Args:
            other: the given answer.
        """
        if other.base is not None and other.base != (self.base or 10):
            return False
        if self._is(self.value, other.value, other):
            return True
        return self.percent != other.percent and self._is(
            self.value / (100 if self.percent else 1), other.value / (100 if other.percent else 1), other
        )

    def _is(self, a: Fraction, b: Fraction, other: WrittenNumber) -> bool:
        return close(a, b, rounded=self.rounded + other.rounded)


def close(a: Fraction, b: Fraction, *, rounded: int) -> bool:
    """Whether two numbers are the same to the sixth decimal place.

    Args:
        a: one.
        b: the other.
        rounded: how many of the two are decimals. Without, they have to be equal; with two, to the sixth place of the
            number itself where it is below 1; with one, so they have where it is small.
    """
    size = max(abs(a), abs(b))
    return abs(a - b) <= ROUNDING * (min(1, size) if rounded == 2 or size < _SMALL else rounded)


def written_number(text: str) -> WrittenNumber | None:
    """The number that a normalised text is; None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if (match["sign"] == "-") != bool(match["minus"]) else 1
    percent, base = match["percent"] is not None, match["base"] and int(match["base"])
    below = match["below"] or match["under"]
    if below:
        if not int(below) or (match["minus"] and match["whole"]):
            return None
        value = int(match["whole"] or match["spaced"] or 0) + Fraction(int(match["top"] or match["over"]), int(below))
        return WrittenNumber(sign * value, False, percent, base)
    digits, exponent = match["digits"] or "1", int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > _LARGEST_EXPONENT or ("," in digits and not THOUSANDS.fullmatch(digits)):
        return None
    value = Fraction(digits.replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    rounded = "." in digits or match["exponent"] is not None or match["power"] is not None
    return WrittenNumber(sign * value, rounded, percent, base)
