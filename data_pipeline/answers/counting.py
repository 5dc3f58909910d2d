"""Numbers in words: "twenty-five", "a hundred and five", "two and a half", "three quarters"."""

import re
from fractions import Fraction

_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: number for number, word in enumerate(_ONES)} | {
    word: 20 + 10 * index for index, word in enumerate(_TENS)
}
SCALES = {"hundred": 100, "dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    name: number
    for number, names in {
        2: "half halves", 3: "third thirds", 4: "quarter quarters fourth fourths", 5: "fifth fifths", 6: "sixth sixths",
        7: "seventh sevenths", 8: "eighth eighths", 9: "ninth ninths", 10: "tenth tenths",
        100: "hundredth hundredths", 1000: "thousandth thousandths",
    }.items()
    for name in names.split()
}  # fmt: skip
NUMBER_WORDS = frozenset(_SMALL) | frozenset(SCALES) | frozenset(_PARTS)
_MAX_WORDS = 16


def spelled(text: str) -> Fraction | None:
    """The number that a text is in words, from its first word to its last; None where it is anything else."""
    said = re.findall(r"[a-z]+", text.casefold())
    if said[:1] in (["negative"], ["minus"]):
        value = spelled(text.strip()[len(said[0]) :])
        return None if value is None else -value
    if not 0 < len(said) <= _MAX_WORDS or re.search(r"[^A-Za-z\s,-]", text):
        return None
    if said[-1] in _PARTS:
        return _with_a_part(said)
    return _whole(said)


def _with_a_part(said: list[str]) -> Fraction | None:
    """ "two and a half", "three quarters", "half"."""
    *before, name = said
    whole = Fraction(0)
    if "and" in before:
        split = len(before) - 1 - before[::-1].index("and")
        found = _whole(before[:split])
        if found is None:
            return None
        whole, before = found, before[split + 1 :]
    count = Fraction(1) if before in ([], ["a"], ["an"], ["one"]) else _whole(before)
    return None if count is None else whole + count / _PARTS[name]


def _whole(said: list[str]) -> Fraction | None:
    total, group = 0, None  # what is finished, and what the next scale multiplies
    last = None
    for index, word in enumerate(said):
        if word == "and":
            if last not in SCALES or index + 1 == len(said):
                return None
        elif word in ("a", "an"):
            if index or len(said) == 1 or said[1] not in SCALES:
                return None
            group = 1
        elif word.rstrip("s") in SCALES:
            scale = SCALES[word.rstrip("s")]
            if group is None:
                return None
            if scale == 100:
                group *= scale
            else:
                total, group = total + group * scale, None
            word = word.rstrip("s")
        elif word in _SMALL:
            number = _SMALL[word]
            follows_tens = last in _TENS and 0 < number < 10
            if group is not None and not follows_tens and not (last in ("hundred", "and") and group % 100 == 0):
                return None
            group = (group or 0) + number
        else:
            return None
        last = word
    return Fraction(total + (group or 0)) if said and last != "and" and (group is not None or total) else None
