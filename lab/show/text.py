"""Text that others wrote, made safe to show on a terminal and in a page."""

import sys
import unicodedata

LINE_END, TAB, NO_TEXT = "⏎", "⇥", "◦"  # shown for a line break, a tab, a token without text
JOINERS = "\u200c\u200d"  # needed to write Persian and to join emoji, and harmless in HTML
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, keep: str = "") -> str:
    """The text with nothing in it that acts in place of being seen; line breaks stay, marked.

    Characters that control a terminal, have no shape, change the direction of writing or are not
    assigned become their names (‹U+001B›, ‹U+202E›), but for those in keep.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character, keep) for character in text)


def _visible(character: str, keep: str) -> str:
    code = ord(character)
    if character in keep or 0x20 <= code < 0x7F:
        return character
    if character == "\n":
        return LINE_END + "\n"
    if character == "\t":
        return TAB
    return f"‹U+{code:04X}›" if unicodedata.category(character) in _HIDDEN else character


def say(text: str, end: str = "\n") -> None:
    """Print; a character that the output's encoding lacks shows as its number (\\u2192).

    Error messages need it not: Python writes standard error like this itself.
    """
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
