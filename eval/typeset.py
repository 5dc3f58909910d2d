"""Text with LaTeX in it as HTML with MathML: made when a page is written, so that the page needs no script for it.

Everything that comes out is either escaped text or an element of a short list, without attributes but harmless ones:
what a model wrote can be ugly, and nothing else.
"""

import functools
import html
import re
from xml.etree.ElementTree import Element

from markupsafe import Markup, escape

MAX_FORMULA = 600  # characters; a longer one stays text
_FENCED = re.compile(
    r"\$\$(?P<display>[^$]+?)\$\$|(?<![\\$])\$(?P<inline>(?!\d)(?:[^$\\]|\\.)+?|\d(?:(?:[^$\\]|\\.)*?(?<!\s))?)\$(?!\d)|\\\[(?P<brackets>.+?)\\\]|\\\((?P<parens>.+?)\\\)"
    r"|(?P<environment>\\begin\{(?P<name>(?:align|eqnarray|gather|equation)\*?)\}.+?\\end\{(?P=name)\})",
    re.DOTALL,
)
_MACROS = re.compile(
    r"\\(?:re)?newcommand|\\def(?![a-z])|\\let(?![a-z])|\\DeclareMathOperator|\\href|\\html|\\style|\\class"
)
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
# Words beside each other are prose between two amounts: "It costs $5 and then $7."
_PROSE = re.compile(r"(?<![\\A-Za-z])[a-z]{2,}\s+[a-z]{2,}")
_TAGS = set(
    """
    math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd mstyle
    mpadded mphantom menclose merror mmultiscripts mprescripts none
""".split()
)
_ATTRIBUTES = set(
    """
    display stretchy fence form accent accentunder linethickness width height depth lspace rspace minsize maxsize
    columnalign rowspacing columnspacing displaystyle scriptlevel mathvariant movablelimits notation symmetric
""".split()
)

_LENGTHS = set("linethickness width height depth lspace rspace minsize maxsize rowspacing columnspacing".split())
_LENGTH = re.compile(r"-?\d{0,2}(?:\.\d{1,6})?\s?(?:em|ex|px|pt|mu|cm|mm|in|%)?|thin|medium|thick")


def typeset(text: str, marked: str | None = None) -> Markup:
    """The text with its formulas as MathML; the last place where `marked` stands is in a <mark>."""
    text = _DRAWING.sub("[drawing]", text)
    start, end = _place_of(marked, text)
    parts, position, search_from = [], 0, 0
    while (match := _FENCED.search(text, search_from)) is not None:
        search_from = match.start() + 1  # what is no formula may end where one begins
        latex = next(match[name] for name in ("display", "inline", "brackets", "parens", "environment") if match[name])
        rendered = None
        if match["inline"] is None or not _PROSE.search(re.sub(r"\\[a-z]+\s*\{[^{}]*\}", "", latex)):
            rendered = formula(latex, display=match["inline"] is None and match["parens"] is None)
        if rendered is None:
            continue
        parts.append(_words(text, position, match.start(), start, end))
        touched = start < match.end() and end > match.start() and start >= 0
        parts.append(Markup("<mark>%s</mark>") % rendered if touched else rendered)
        position = search_from = match.end()
    parts.append(_words(text, position, len(text), start, end))
    return Markup("").join(parts)


def _place_of(marked: str | None, text: str) -> tuple[int, int]:
    """Where an answer stands last, as a whole: 5 does not stand in 15, nor x in max."""
    if not marked:
        return -1, -1
    found = re.compile(rf"(?<![A-Za-z0-9.]){re.escape(marked)}(?![A-Za-z0-9]|\.\d)")
    return max((match.span() for match in found.finditer(text)), default=(-1, -1))


def answer(text: str, kind: str) -> Markup:
    """An extracted or gold answer: of mathematics as a formula, where it can be set."""
    bare = text.strip().strip("$")
    if kind == "latex" and re.search(r"[\\^_{]", bare):
        return formula(bare) or escape(text)
    return escape(text)


@functools.lru_cache(maxsize=4096)
def formula(latex: str, display: bool = False) -> Markup | None:
    """A formula as MathML; None where it is too long, defines macros, or cannot be read."""
    from latex2mathml.converter import Converter

    latex = latex.strip()
    if not latex or len(latex) > MAX_FORMULA or _MACROS.search(latex):
        return None
    latex = re.sub(r"\\(?:boxed|fbox)(?![a-z])", "", latex)
    try:
        root = Converter(display="block" if display else "inline").convert_to_element(latex)
        return Markup(_serialised(root))
    except Exception:  # whatever a malformed formula makes of a parser that expects well-formed ones
        return None


def _words(text: str, begin: int, stop: int, start: int, end: int) -> Markup:
    """text[begin:stop] escaped, with what of it lies in start:end marked."""
    start, end = max(begin, min(start, stop)), max(begin, min(end, stop))
    if start >= end:
        return escape(text[begin:stop])
    return escape(text[begin:start]) + Markup("<mark>%s</mark>") % text[start:end] + escape(text[end:stop])


def _serialised(element: Element) -> str:
    """The library's own writer takes escapes back at the end; here text stays text."""
    content = "".join([_text(element.text), *(_serialised(child) + _text(child.tail) for child in element)])
    if element.tag not in _TAGS:
        return content
    attributes = "".join(
        f' {name}="{html.escape(str(value), quote=True)}"'
        for name, value in element.attrib.items()
        if name in _ATTRIBUTES and (name not in _LENGTHS or _LENGTH.fullmatch(str(value)))
    )
    return f"<{element.tag}{attributes}>{content}</{element.tag}>"


def _text(text: str | None) -> str:
    return html.escape(html.unescape(text or ""), quote=True)
