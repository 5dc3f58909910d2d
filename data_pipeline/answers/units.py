"""Units behind a number: which are the same, and how many of one another is."""

import re
from fractions import Fraction

# Dimension: {how many of the first: its names}. Names of several words are written as one.
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "1": "m meter meters metre metres", "1/100": "cm centimeter centimeters centimetre centimetres",
        "1/1000": "mm millimeter millimeters millimetre millimetres",
        "1000": "km kilometer kilometers kilometre kilometres", "0.0254": "in inch inches", "0.3048": "ft foot feet",
        "0.9144": "yd yds yard yards", "1609.344": "mi mile miles",
    },
    "time": {
        "1": "s sec secs second seconds", "60": "min mins minute minutes", "3600": "h hr hrs hour hours",
        "86400": "day days", "604800": "week weeks",
    },
    "months": {"1": "month months", "12": "yr yrs year years"},
    "money": {"1": "dollar dollars usd", "1/100": "cent cents"},
    "mass": {
        "1": "g gm gms gram grams", "1000": "kg kgs kilogram kilograms", "1/1000": "mg milligram milligrams",
        "453.59237": "lb lbs pound pounds", "28.349523125": "oz ounce ounces",
    },
    "volume": {
        "1": "l liter liters litre litres", "1/1000": "ml milliliter milliliters", "3.785411784": "gallon gallons",
    },
    "speed": {
        "1": "mph mi/h mi/hr milesperhour mileperhour miles/hour",
        "0.621371192237334": "kph km/h kmperhour kilometersperhour",
        "2.2369362920544": "m/s meterspersecond meterpersecond",
    },
    "angle": {"1": "degree degrees deg °"},
    "radians": {"1": "rad radian radians"},
    "units": {"1": "unit units"},
    "before noon": {"1": "am"},
    "after noon": {"1": "pm"},
}  # fmt: skip
_UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, sizes in _TABLE.items()
    for factor, names in sizes.items()
    for name in names.split()
}
Unit = tuple[str, int, Fraction]  # dimension, its power, and how many of the dimension's first unit it is

_POWER = r"\s*(?:\^\s*\{?\s*(?P<power>\d{1,3})\s*\}?)?\s*\.?\s*"
_IN_TEXT = re.compile(rf"(?P<number>.*?\S)\s*\\text\s*\{{(?P<unit>[^{{}}]*)\}}{_POWER}", re.DOTALL)
_BARE = re.compile(rf"(?P<number>.*(?:[\d}})°!%]|\\pi))(?P<unit>\s*[A-Za-z][A-Za-z ./]*?){_POWER}", re.DOTALL)
# Words that are no unit: behind them stands another number than the one in front.
_ALTERING = frozenset(
    """
    squared cubed half halves third thirds quarter quarters fourth fourths or more less than fewer greater plus minus
    times over under above below mod modulo choose factorial divided multiplied by to the power root not no non isn
    aren never neither nor and but except without wrong incorrect if unless is are was were before after past until
    almost about nearly approximately zero negative positive infinity
    """.split()
)
_NAMES = frozenset(
    """
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi
    alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi psi omega
    """.split()
)
_ORDINAL = re.compile(r"(?:fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths?")
_MAX_UNIT_WORDS = 4
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def without_unit(text: str) -> tuple[str, Unit | None]:
    r"""The number of "5 cm", "5\text{ cm}^2", "90°" or "12 apples", and its unit: None of apples, or without one."""
    if text.endswith("°"):
        return text[:-1], ("angle", 1, Fraction(1))
    match = _IN_TEXT.fullmatch(text)
    if match is None:
        match = _BARE.fullmatch(text)
        if match is None or not _is_a_word(match["unit"]):
            return text, None
    unit = match["unit"]
    named = re.sub(r"\s+(?:squared|cubed)$", "", unit) if _unit(unit, 1) is not None else unit
    if alters(named) or _is_no_unit(named):
        return text, None
    number = match["number"].rstrip()
    return number, _unit(match["unit"], int(match["power"] or 1))


def alters(text: str) -> bool:
    """Whether words behind a number make another one of it, or deny it: "5 squared", "8 or more", "5 is wrong"."""
    said = re.findall(r"[a-z]+", re.sub(r"\\[A-Za-z]+", " ", text.casefold()))
    return not _ALTERING.isdisjoint(said) or any(map(_ORDINAL.fullmatch, said))


def _is_no_unit(text: str) -> bool:
    """Whether it is too long for a unit, or holds a number or the name of an unknown."""
    said = text.casefold().split()
    return (
        len(said) > _MAX_UNIT_WORDS
        or not _NAMES.isdisjoint(said)
        or any(re.search(r"\d", word) or (len(word) == 1 and word not in _UNITS and word not in "a./") for word in said)
    )


def _is_a_word(unit: str) -> bool:
    """Whether letters behind a number are a unit and no product: a known one, or words of three letters and more."""
    if not unit[0].isspace() and len(unit) == 1:
        return False
    first = unit.split()[0].strip(".")
    return _unit(unit, 1) is not None or (unit[0].isspace() and len(first) >= 3)


def _unit(text: str, power: int) -> Unit | None:
    names = text.casefold().replace(".", "").split()
    while names and names[0] in _POWERS:
        power = _POWERS[names.pop(0)]
    if len(names) == 2 and names[1] in ("squared", "cubed"):
        power = 2 if names.pop() == "squared" else 3
    found = _UNITS.get("".join(names)) or (_UNITS.get(names[0]) if len(names) > 1 else None)
    return None if found is None else (found[0], power, found[1] ** power)
