"""Names escaped for Markdown, so that a page shows them letter by letter."""

from __future__ import annotations

import html
import re


def literal(name: object) -> str:
    """Return a name on one line, escaped so that Markdown and a browser show exactly its letters.

    HTML and the signs that end a cell of a table, make a link or end code are escaped; a name of letters, digits and
    ``_-+.%`` stays as it is.
    """
    # HTML is escaped first, because HTML gives no meaning to the backslashes that are added afterwards. Quotes need no
    # escape, because they have a meaning in HTML only inside of a tag.
    return re.sub(r"([\\`|\[\]])", r"\\\1", html.escape(" ".join(str(name).split()), quote=False))
