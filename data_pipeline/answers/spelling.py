"""One spelling for what can be written in many: Unicode, LaTeX's spaces and fonts, brackets, words, units."""

import re
import unicodedata

_GREEK = dict(zip("αβγδεζηθικλμνξρστυφχψωπΔΓΘΛΞΣΦΨΩ", """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega pi
    Delta Gamma Theta Lambda Xi Sigma Phi Psi Omega
""".split(), strict=True))  # fmt: skip
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "⟨": r"\langle ", "⟩": r"\rangle ", "∅": r"\emptyset ",
    "º": "°", "˚": "°", "’": "'", "‘": "'", "“": '"', "”": '"', "⁄": "/", "∕": "/", "$": " ", "€": " ", "£": " ",
    **{letter: rf"\{name} " for letter, name in _GREEK.items()},
})  # fmt: skip
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_TO_PLAIN = str.maketrans(_RAISED + _LOWERED, "0123456789+-n0123456789")
_VULGAR = re.compile(r"(\d?)([¼-¾⅐-⅞])")

_RENAMED = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), r"\le "),
    **dict.fromkeys(("geq", "geqslant", "geqq"), r"\ge "),
    "neq": r"\ne ", "lt": "<", "gt": ">", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lparen": "(",
    "rparen": ")", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "cdotp": r"\cdot ", "degree": "°", "colon": ":",
    "bigcup": r"\cup ",
    "infin": r"\infty ", "infinity": r"\infty ", "varnothing": r"\emptyset ", "simeq": r"\approx ", "sim": r"\approx ",
    "land": r"\text{ and }", "lor": r"\text{ or }", "vee": r"\text{ or }", "times": r"\times ", "cdot": r"\cdot ",
    "div": r"\div ", "ast": r"\cdot ", "le": r"\le ", "ge": r"\ge ", "ne": r"\ne ", "qquad": " ", "quad": " ",
}  # fmt: skip
_DROPPED = set(
    """
    left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle scriptstyle
    limits nolimits mathstrut strut rm bf it mathord mathopen mathclose large Large LARGE huge Huge small tiny
    normalsize
""".split()
)
_TEXT = set("text textbf textit textrm textsf texttt textnormal mbox hbox mathrm operatorname textup emph".split())
_UNWRAPPED = set(
    """
    mathbf mathit mathsf mathtt boldsymbol bm mathbb mathcal mathnormal ensuremath boxed fbox framebox
""".split()
)
_FONT = re.compile(rf"\\(?:{'|'.join(_UNWRAPPED - {'boxed', 'fbox'})}|vec|hat|overrightarrow)\s*\{{([A-Za-z]+)\}}")
_COMMAND = re.compile(r"\\(?:([A-Za-z]+)\*?|(.)|$)", re.DOTALL)
_REPEATING = re.compile(r"(\d{0,12})\.(\d{0,12})\\overline\s*\{(\d{1,12})\}")
_DEGREES = re.compile(r"\^\s*(?:\\circ\b|\{\s*\\circ\s*\}|°)|\\circ\b")


def tidy(text: str) -> str:
    r"""The text with one spelling of each symbol: no spacing or font commands, \text{} for words.

    Dollar signs that fence mathematics are dropped; those of amounts become the unit \text{ dollars}.
    """
    text = re.sub(f"[{_RAISED}]+", lambda match: f"^{{{match[0].translate(_TO_PLAIN)}}}", text)
    text = re.sub(f"[{_LOWERED}]+", lambda match: f"_{{{match[0].translate(_TO_PLAIN)}}}", text)
    text = _VULGAR.sub(lambda match: f"{match[1]} {unicodedata.normalize('NFKC', match[2])}".lstrip(), text)
    dollar = r"\\\$" if text.replace(r"\$", "").count("$") % 2 == 0 else r"\\?\$"
    text = re.sub(rf"{dollar}\s*(\d[\d,.]*\d|\d|\.\d+)", r"\1\\text{ dollars}", re.sub(r",\s*\\!\s*|\{,\}", ",", text))
    text = unicodedata.normalize("NFKC", text.replace(r"\$", "$")).translate(_SYMBOLS)
    text = re.sub(r"\\(?:[hv]space\*?|color|[hv]?phantom)\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"\bpercent\b", "%", text.replace("`", " "))
    text = _FONT.sub(r"\1", text)
    text = re.sub(r"\\mathrm\s*\{\s*([ie])\s*\}", r"\1", text)
    text = _COMMAND.sub(_command, text)
    text = re.sub(r"\\text\s*\{\s*\}", " ", text)
    text = _DEGREES.sub("°", text)
    text = _REPEATING.sub(_repeating, text)
    text = re.sub(r"\\overline\s*\{([A-Z]+)\}", r"\1", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text).replace("**", "^")
    text = re.sub(r"(?<![A-Za-z\\])(?:inf|infinity)(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<=\d):00(?=\s*(?:\\text\s*\{\s*)?[aApP]\.?[mM])", "", text)
    text = unwrap(text)
    text = re.sub(r"\s+", " ", text).strip(" ~")
    text = re.sub(r"(?<![\d.])(\d{1,3}(?: \d{3})+)(?![\d/])", lambda match: match[1].replace(" ", ""), text)
    return _without_end(text)


def _without_end(text: str) -> str:
    """Without the full stop, comma, or lone backslash at the end; a factorial keeps its sign."""
    while text and text[-1] in ".,;:?\\ " and text[-2:] not in ("\\.", "\\,", "\\;", "\\:", "\\\\"):
        text = text[:-1]
    return text[:-1].rstrip() if re.search(r"[A-Za-z]{2}\}?!$", text) else text


_SIGNS = {"\\": "\\\\ ", "{": r"\{", "}": r"\}", "!": "", "%": "%", "|": "|", "&": "&", "#": "#", "_": "_"}


def _command(match: re.Match[str]) -> str:
    name, sign = match[1], match[2]
    if name is None:
        return _SIGNS.get(sign, " ")
    if name in _DROPPED:
        return " "
    if name in _TEXT:
        return r"\text"
    if name in _UNWRAPPED:
        return ""
    return _RENAMED.get(name, f"\\{name} " if name in _SPACED else match[0])


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as the fraction that it is."""
    whole, once, again = match[1] or "0", match[2], match[3]
    below = (10 ** len(again) - 1) * 10 ** len(once)
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{below}}}"


_MAX_WRAPPED = 20
# Relations and constants, behind which a space is certain: what follows is looked for by it.
_SPACED = {"in", "cup", "cap", "pm", "infty", "approx", "pi"}


def unwrap(text: str) -> str:
    r"""Without braces around the whole of it, and without \text around a number."""
    for _ in range(_MAX_WRAPPED):
        text = text.strip()
        inner = text.removeprefix(r"\text").lstrip()
        if not inner.startswith("{") or closing(inner, 0) != len(inner) - 1:
            return text
        if inner != text and re.search(r"[A-Za-z]", inner):
            return text
        text = inner[1:-1]
    return text


def closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed; -1 where it is not."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "{}" and (index == 0 or text[index - 1] != "\\"):
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return -1


def words(text: str) -> str:
    r"""Letters and digits of an answer in words, small: "\text{(A)}" and "a" are alike; "4:30 p.m." keeps its colon."""
    text = re.sub(r"\\text\b|\\[A-Za-z]+", " ", text)
    text = re.sub(r"\b(?:[Tt]he|an?|[Oo]ption|[Cc]hoice|answer)\s+(?=\W*\w)", " ", text).casefold()
    return re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w:+/.-]|_", "", text)
