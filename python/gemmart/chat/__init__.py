"""The chat in the terminal: a line is a turn, on a base model a text to complete; one that begins with / a command."""

from gemmart.chat.loop import Chat

__all__ = ["Chat"]
