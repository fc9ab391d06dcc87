"""Text from elsewhere, made harmless: every string of a page goes through here."""

from __future__ import annotations

import html


def escaped(text: str) -> str:
    """Escaped, with what is hidden made visible."""
    return html.escape(visible(text))


def visible(text: str) -> str:
    """NUL and direction overrides made visible, since training text must not reorder what is around it."""
    return text.translate({0: "␀", **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")})
