"""The viewer: one HTML page, of a running server or with all data in it."""

import json
from pathlib import Path
from typing import Any

VIEW = Path(__file__).parent / "view.html"
PLACE = "null/*data*/"


def page(data: Any = None) -> str:
    """The page.

    Args:
        data: JSON values that it shows; None for a page that asks the server which gave it.
    """
    text = VIEW.read_text(encoding="utf-8")
    # Nothing in it may end the script.
    return text.replace(PLACE, json.dumps(data).replace("<", "\\u003c"))
