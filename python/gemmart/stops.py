"""Stop strings, found in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from gemmart.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_BYTES = 256


class StopStrings:
    """Passes text on until one of `stops` is complete; the stop itself and what follows is never passed on.

    The outcome is that of text arriving character by character: the stop that is complete first wins, of two that are
    complete together the longer one. Raises InvalidRequest for an empty stop, more than 16, or one above 256 bytes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if len(stops) > MAX_STOPS:
            raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", "stop")
        for index, stop in enumerate(stops):
            if not isinstance(stop, str) or not 0 < len(stop.encode("utf-8", "surrogatepass")) <= MAX_STOP_BYTES:
                raise InvalidRequest(
                    f"stop[{index}] is {stop!r}, expected a string of 1 to {MAX_STOP_BYTES} bytes", f"stop[{index}]"
                )
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None
        """The stop that is complete."""

    def push(self, text: str) -> tuple[str, bool]:
        """Take `text`; return what can be passed on, and whether a stop is complete. Nothing may be pushed after
        that."""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            _, at, self.found = min(found)
            return text[:at], True
        n = self._undecided(text)
        self._held = text[len(text) - n :]
        return text[: len(text) - n], False

    def finish(self) -> str:
        """The text has ended: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop begins."""
        longest = len(self._stops[0]) - 1 if self._stops else 0
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - n :]) for stop in self._stops):
                return n
        return 0
