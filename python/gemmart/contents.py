"""The contents of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemmart.errors import InvalidRequest


def text_of(content: Any, where: str) -> str:
    """The text of a content, which is a string or a list of text parts. Raises InvalidRequest with the place of what is
    neither; `where`: the content's own."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        for at, part in enumerate(content):
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise InvalidRequest(f"{where}[{at}] is no text part; this model reads text only", f"{where}[{at}]")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InvalidRequest(f"{where} is {type(content).__name__}, expected a string", where)
    return content
