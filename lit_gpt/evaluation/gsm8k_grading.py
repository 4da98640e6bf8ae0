"""When an answer to a GSM8K question is right: two rules, `default` and `published`.

Decisions: an answer is what stands behind `#### ` to the end of its line, the last one of the text. The default rule calls
two answers equal if their normalised texts are, or if both are arithmetic and come to the same number (math-verify;
decimals to six places). Only arithmetic of a limited size is worked out: a model may write 9^9^9^9, which no computer
finishes, and a time limit would let the machine's speed decide what is right. Whatever else stands there is compared as
text. The published rule compares normalised texts and nothing else: its environment lists no parser of expressions.

Source of the published normalisation and of both rules' unit words: Lewkowycz et al. 2022, "Solving quantitative
reasoning problems with language models", appendix D.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

# Numbers, + - * / ^ ( ), and the LaTeX that stands for them.
_ARITHMETIC = re.compile(r"(?:[0-9.+\-*/^(){} ]|\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div)+")
_TWO_NUMBERS = re.compile(r"[0-9.] [0-9.]")
# One power of at most two digits, or one root: what is left is worked out in milliseconds.
_POWER = re.compile(r"\^|\\sqrt")
_SMALL_POWER = re.compile(r"\^ ?(?:-?[0-9]{1,2}(?![0-9.])|\{ ?-?[0-9]{1,2} ?\})|\\sqrt")
_LONGEST = 60
_DEEPEST = 4
# No answer that is right is as long; some expressions below take quadratic time.
_LONGEST_TEXT = 2000

_UNIT_WORDS = (
    *(
        "square",
        "ways",
        "integers",
        "dollars",
        "mph",
        "inches",
        "ft",
        "hours",
        "km",
        "units",
        r"\ldots",
        "sue",
        "points",
    ),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples"),
)
# Tried from the left at a number's end: longer words first, so that none hides another.
_UNITS = re.compile(
    r"(?<=[0-9)}])(?:\s*(?:\^\s*(?:\\circ|\{\\circ\})|(?:"
    + "|".join(sorted((re.escape(word) for word in _UNIT_WORDS), key=len, reverse=True))
    + r")(?![A-Za-z])(?:\^(?:[23]|\{[23]\}))?))+$"
)
_FRAME = re.compile(r"\\(?:text|textbf|mbox|mathrm|overline)\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\boxed\s*\{(.*)\}")


def extract_answer(text: str) -> str | None:
    """The last match of `#### (.*)$`, or None where there is none.

    `$` is the end of any line: an answer after which the model went on writing counts, too. Where the answer ends the
    text, this is what a search without MULTILINE finds.
    """
    found = re.findall(r"#### (.*)$", text, re.MULTILINE)
    return found[-1] if found else None


# --- the default rule -------------------------------------------------------------------------------------------------


def same_answer(answer: str, target: str) -> bool:
    """Whether two answers are the same text once normalised, or the same number."""
    left, right = normalised(answer), normalised(target)
    if left == right:
        return True
    if not (is_small_arithmetic(left) and is_small_arithmetic(right)):
        return False
    from math_verify import verify

    given, wanted = _parsed(left), _parsed(right)
    return bool(given and wanted and verify(wanted, given, timeout_seconds=None))


def normalised(answer: str) -> str:
    r"""An answer without what does not change its value.

    That is: all but the last side of an equation, `\boxed{}`, `\text{}` and their like, quotes, `$`, commas in 1,000,
    unit words behind a number, a period at the end, white space. `%` stays: 5% is not 5.
    """
    if len(answer) > _LONGEST_TEXT:
        return answer
    text = _FRAME.sub(r"\1", _BOX.sub(r"\1", answer.replace("**", "^").replace('"', "")))
    text = re.sub(r"\s*\\?%", "%", re.sub(r"\\?\$", "", text.split("=")[-1]))
    text = text.replace("{,}", ",").replace(r",\!", ",").replace(r"\;", " ").replace("\\ ", " ")
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = " ".join(text.split()).removesuffix(".").rstrip()
    return _UNITS.sub("", text)


def is_small_arithmetic(text: str) -> bool:
    """Whether a normalised answer looks like arithmetic that is worked out at once, whatever it is."""
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({") - (sign in ")}")
        deepest = max(deepest, depth)
    return (
        len(text) <= _LONGEST
        and deepest <= _DEEPEST
        and _ARITHMETIC.fullmatch(text) is not None
        and _TWO_NUMBERS.search(text) is None
        and len(_POWER.findall(text)) == len(_SMALL_POWER.findall(text)) <= 1
    )


def _parsed(text: str) -> list[Any]:
    """The expression that a whole text is, in a list; empty if it is none."""
    # It warns that nothing limits its time: `is_small_arithmetic` does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import LatexExtractionConfig, parse

    # Between dollars all of it is read; without them the last number of any text would do.
    return list(parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None))


# --- the published rule -----------------------------------------------------------------------------------------------

# In this order: each is looked for in what those before it left.
_PUBLISHED_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}")),
)
_PUBLISHED_REMOVED = (
    *_UNIT_WORDS,
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}", r"\mathrm{th}"),
    *(r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)


def same_published_text(answer: str, target: str) -> bool:
    """Whether two answers are the same text once normalised by the published rule."""
    return published_form(answer) == published_form(target)


def published_form(answer: str) -> str:
    """An answer as the published rule normalises it (source: the module's)."""
    if len(answer) > _LONGEST_TEXT:
        return answer
    text = answer.split("=")[-1]
    for found, replacement in (*_PUBLISHED_REPLACED, *((word, "") for word in _PUBLISHED_REMOVED)):
        text = text.replace(found, replacement)
    if text.count("$") > 1:
        text = f"${text.split('$')[1]}$"
    for frame in ("text", "textbf", "overline"):
        text = re.sub(rf"\\{frame}{{(.*?)}}", r"\1", text)
    text = re.sub(r"\\boxed{(.*)}", r"\1", text)
    # \frac12 means \frac{1}{2}, \sqrt2 means \sqrt{2}.
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text)
    text = text.replace("$", "")
    without_commas = text.replace(",", "")
    return without_commas if without_commas.isdigit() else text


GRADERS: Mapping[str, Callable[[str, str], bool]] = {"default": same_answer, "published": same_published_text}
"""Rules by name: (answer, target) to whether it is right."""
