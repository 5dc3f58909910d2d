"""Numbers as word problems give them: found in a text, read exactly, compared."""

import re
from fractions import Fraction

# A longer digit string is no answer to a word problem, and bounds the work spent on a hostile one.
MAX_NUMBER_LENGTH = 50

# Digits with or without thousands separators: "1234", "1,234.50", ".5".
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# An optional minus that is no subtraction, an optional $, digits, and an optional denominator: "-$1,234.50" or
# "3/4". In "10-5", "10 - 5" and a list item "- 5" the minus belongs to no number.
_FIND_NUMBER = re.compile(rf"((?<![\w.,)])[-−](?!\s))?\$?\s?({_DIGITS})(/\d+)?", re.ASCII)
_NUMBER = re.compile(rf"\$?\s?(-?)\s?\$?\s?({_DIGITS})(?:\s?/\s?(\d+))?\s?%?\.?", re.ASCII)


def parse_number(text: str) -> Fraction | None:
    """The exact value of "72", "-1,234.5", "$18", "3/4", "50%" (as 50) or "7."; None for anything else."""
    text = text.strip().replace("−", "-")
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER_LENGTH else None
    if match is None:
        return None
    sign, digits, denominator = match.groups()
    value = Fraction(sign + digits.replace(",", ""))
    if denominator is None:
        return value
    return value / int(denominator) if int(denominator) else None


def canonical_number(text: str | None) -> str | None:
    """One spelling for equal numbers ("1,200.0" and "1200" both give "1200"): the class used for voting."""
    value = None if text is None else parse_number(text)
    return None if value is None else str(value)


def numbers_equal(answer: str, gold: str) -> bool:
    """Integers must be equal exactly; where the gold answer is no integer, 1e-3 relative is allowed.

    Source: the number comparison of arXiv 2403.04706. Raises ValueError where `gold` is no number.
    """
    gold_value, value = parse_number(gold), parse_number(answer)
    if gold_value is None:
        raise ValueError(f"the gold answer {gold!r} is not a number")
    if value is None:
        return False
    if gold_value.denominator == 1:
        return value == gold_value
    return abs(value - gold_value) <= abs(gold_value) / 1000


def find_numbers(text: str) -> list[str]:
    """The numbers of a text: "-1,234.50", "3/4". In "10-5" and in a list item "- 5" none is negative."""
    found = ("-" * bool(sign) + digits + fraction for sign, digits, fraction in _FIND_NUMBER.findall(text))
    return [number for number in found if parse_number(number) is not None]
