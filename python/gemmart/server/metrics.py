"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gemmart.model import Model
from gemmart.results import Completion

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    def __init__(self, model: Callable[[], Model | None]) -> None:
        """`model`: the one that is served, once it is loaded."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("gemmart_requests", "HTTP requests answered.", ["path", "status"], registry=registry)
        self._prompt = Counter("gemmart_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("gemmart_cached_tokens", "Of these, taken from computed prefixes.", registry=registry)
        self._generated = Counter("gemmart_generated_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram(
            "gemmart_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        gauges: dict[str, tuple[str, Callable[[Model], int]]] = {
            "gemmart_running": ("Sequences that are computed now.", lambda model: model.n_requests[0]),
            "gemmart_waiting": ("Sequences that wait to be.", lambda model: model.n_requests[1]),
            "gemmart_kv_pages": ("Pages for keys and values.", lambda model: model.kv_pages.total),
            "gemmart_kv_pages_held": ("Of these, held by sequences.", lambda model: model.kv_pages.held),
            "gemmart_kv_pages_cached": ("Of these, kept as computed prefixes.", lambda model: model.kv_pages.cached),
        }
        for name, (help, value) in gauges.items():
            Gauge(name, help, registry=registry).set_function(partial(_value, model, value))

    def count_request(self, path: str, status: int) -> None:
        """`path`: one of the route table, or "" for any other."""
        self._requests.labels(path, str(status)).inc()

    def count_answers(self, results: Sequence[Completion]) -> None:
        for result in results:
            self._prompt.inc(result.usage.prompt_tokens)
            self._cached.inc(result.usage.cached_tokens)
            self._generated.inc(result.usage.completion_tokens)
            self._first.observe(result.timings.queued_s + result.timings.prompt_s)

    def count_prompt(self, n_tokens: int) -> None:
        """Of what is read without an answer."""
        self._prompt.inc(n_tokens)

    def text(self) -> tuple[bytes, str]:
        """The counters, and their media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


def _value(model: Callable[[], Model | None], of: Callable[[Model], int]) -> int:
    found = model()
    return 0 if found is None else of(found)
