"""What stands between a prompt and its target: a space, or nothing where the script or the punctuation has none."""

from __future__ import annotations

import unicodedata
from typing import Literal, get_args

import regex

from .scripts import SOUTH, SPACED, SPACELESS, has_letters, is_spaceless

TargetSeparator = Literal["auto", "space", "none"]
SHORT_FORMS = {" ": "space", "": "none"}

# marks of direction are not seen, so they are no neighbours
_DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_INVISIBLE_END = regex.compile(f"[{_DIRECTION}]+\\Z")
_INVISIBLE_BEGIN = regex.compile(f"[{_DIRECTION}]+")
# join or part words by themselves: zero-width space and joiners, tatweel, the word marks of Ethiopic and Tibetan
_JOINING = "\u200b\u200c\u200d\u2060\u0640\u1361\u0f0b"
_ENDINGS = r"(?i:s|m|d|re|ve|ll)(?![\p{L}\p{M}])"  # of English words, behind an apostrophe
_QUOTES = regex.compile(r"(?V1)[\p{Quotation_Mark}--['‘’‚‛＇]]")
_NO_SPACE_BEFORE = regex.compile(
    rf"""(?V1)(?x)[\p{{M}}\p{{Pe}}]
    | [\p{{Terminal_Punctuation}}--[.!?]]
    | [.!?…]+ (?![\p{{L}}\p{{N}}.!?…])       # not the beginning of a name: .NET, .303
    | [%‰٪] (?![\p{{L}}\p{{N}}])
    | ['’] (?:{_ENDINGS} | \Z | \s
        | (?=\p{{Ll}}) (?!.*[\p{{L}}\p{{N}}\p{{P}}]['’](?!\p{{L}})))  # 's dog, but not 'a quotation'
    """
)
_NO_SPACE_AFTER = regex.compile(
    r"""(?V1)(?x)(?: [\p{Ps}¿¡]
    | (?<=[\p{L}\p{M}\p{N}]) [\p{Pd}_]       # "mother-in-", not a dash between spaces
    | (?<=[^\s/\\]) [/\\]+
    | (?<![^\s\p{P}]) [@\#]
    ) \Z"""
)
_AMOUNT = regex.compile(r"\p{Sc}\Z")
_OPENING_APOSTROPHE = regex.compile(r"(?<![^\s\p{Ps}\p{Pi}])['‘](?=\S|\Z)")
# French and Italian: l', dell', qu'; English writes a space after the dogs'
_ELISION = regex.compile(r"(?:(?<![\p{L}\p{M}])\p{L}|[\p{L}--[sS]])['’]\Z", regex.V1)
_SOUTH, _SPACED, _SPACELESS = (regex.compile(f"(?V1){letters}") for letters in (SOUTH, SPACED, SPACELESS))


def target_separator_mode(value: object, where: str = "target_separator") -> TargetSeparator:
    """Return a setting as one of `"auto"`, `"space"`, `"none"`; a space and the empty text are short for the last two.

    Args:
        value: the setting.
        where: its name, for the message.

    Raises:
        ValueError: if it is something else.
    """
    word = SHORT_FORMS.get(value, value) if isinstance(value, str) else value
    for known in get_args(TargetSeparator):
        if word == known:
            return known
    raise ValueError(f"{where}={value!r}: expected one of {', '.join(get_args(TargetSeparator))}.")


def join_prompt(prompt: str, target: str, separator: TargetSeparator = "auto") -> str:
    """Return a prompt and its target as one text; arguments as in [`separator_between`].

    Example:
        >>> join_prompt("The capital of France is", "Lyon"), join_prompt("法国的首都是", "里昂")
        ('The capital of France is Lyon', '法国的首都是里昂')
    """
    return prompt + separator_between(prompt, target, separator) + target


def separator_between(prompt: str, target: str, separator: TargetSeparator = "auto") -> str:
    """Return what stands between a prompt and its target: a space, or the empty text.

    Args:
        prompt: not empty.
        target: not empty.
        separator: `"space"`: always a space, unless either side has whitespace there. `"none"`: never. `"auto"`: as
            the scripts and the punctuation on both sides are written, whatever the language: none in Chinese,
            Japanese, Thai and other scripts without spaces; none before a comma or a closing bracket, or after an
            opening one, a hyphen or a slash; else a space.

    Example:
        >>> [separator_between("The capital of France is", "Lyon"), separator_between("Dave", "'s dog")]
        [' ', '']
    """
    if separator == "none" or prompt[-1].isspace() or target[0].isspace():
        return ""
    if separator == "space":
        return " "
    prompt = _INVISIBLE_END.sub("", prompt) or prompt
    target = _INVISIBLE_BEGIN.sub("", target, count=1) if _INVISIBLE_BEGIN.match(target) else target
    if not target or _touches(prompt, target):
        return ""
    return _between_scripts(prompt, target)


def _touches(prompt: str, target: str) -> bool:
    """Return whether a character at the joint stands without a space on that side, in any script."""
    before, after = prompt[-1], target[0]
    if before.isspace() or after.isspace() or before in _JOINING or after in _JOINING:
        return True
    if _is_full_width(before) or _is_full_width(after):
        return True
    if _NO_SPACE_BEFORE.match(target) or _NO_SPACE_AFTER.search(prompt):
        return True
    if _AMOUNT.search(prompt) and after.isdecimal():
        return True
    is_open = len(_QUOTES.findall(prompt)) % 2 == 1  # a quotation that has begun
    if _QUOTES.match(after) or _QUOTES.match(before):
        return is_open
    if before in "'‘’":
        opened = _OPENING_APOSTROPHE.search(prompt)
        return opened.start() == len(prompt) - 1 if opened else bool(_ELISION.search(prompt))
    return False


def _is_full_width(letter: str) -> bool:
    """Return whether a character is punctuation with a space of its own: that of Chinese and Japanese."""
    width = unicodedata.east_asian_width(letter)
    is_punctuation = unicodedata.category(letter)[0] == "P"
    return (is_punctuation and width in "WFH") or (width == "F" and not letter.isalnum())


def _between_scripts(prompt: str, target: str) -> str:
    if not is_spaceless(prompt if has_letters(prompt) else target):
        return " "
    before, after = prompt[-1], target[0]
    if _SPACED.match(before) and _SPACED.match(after):
        return " "  # two words or numbers of other scripts
    # Thai writes a space beside other scripts and after punctuation, Chinese does not
    last, first = (letter if _SPACELESS.match(letter) else "" for letter in (before, after))
    is_south = any(_SOUTH.match(letter) for letter in (last, first) if letter)
    if not (last or first):
        is_south = bool(_SOUTH.search(prompt))
    return " " if is_south and not (_SOUTH.match(before) and _SOUTH.match(after)) else ""
