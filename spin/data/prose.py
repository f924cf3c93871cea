"""The filter `data.filter=prose`."""

import re

# Blanks are allowed before a list marker, but no line feeds: a text of many empty lines would take minutes.
_MARKUP = re.compile(
    r"[`<>{}\[\]|\\#*=_~^@]|https?:|www\.|\.(?:com|org|net|io)\b|^[^\S\n]*(?:[-•–]|\d+[.)])\s", re.I | re.M
)
_OF_ITSELF = re.compile(
    r"\b(?:as|i'?m|i am|being|just) an? (?:ai|artificial|large language|language model|text-based)\b"
    r"|\blanguage model\b|\bopenai\b|\bchatgpt\b",
    re.I,
)
_SENTENCE_END = re.compile(r"[.!?][\"')]?$")
_ENGLISH = frozenset(
    "the a an of to in is are and or for on with that this it i you he she we they my your be was were do does did "
    "have has can could would should will what how why who when where which not as at by from if about me "
    "than more there some any all so but one please tell give write make need like".split()
)


def is_prose(text: str) -> bool:
    """Return whether `text` is English prose: common English words, nearly all ASCII, no code, markup, list or link."""
    letters = [character for character in text if character.isalpha()]
    if _MARKUP.search(text) or not letters:
        return False
    if sum(letter.isascii() for letter in letters) < 0.95 * len(letters):
        return False
    words = re.findall(r"[a-z']+", text.casefold())
    return sum(word in _ENGLISH for word in words) >= 0.12 * len(words)


def is_prose_answer(text: str) -> bool:
    """Return whether `text` is prose that ends like a sentence and does not mention being a language model."""
    return bool(_SENTENCE_END.search(text)) and not _OF_ITSELF.search(text) and is_prose(text)
