"""What the server reads, keeps and waits for at most."""

from __future__ import annotations

import sys

# A request
BODY_BYTES = 8 << 20
JSON_DEPTH = 64
MESSAGES = 10_000
PARTS = 64  # of a message's content
CHOICES = 8  # n
PROMPTS = 64  # of one call to /v1/completions
INPUTS = 2048  # of one call to /v1/embeddings
TOP_LOGPROBS = 20
COMPLETION_LOGPROBS = 5
URL_BYTES = 8 << 10
HEADER_BYTES = 32 << 10
HEADERS = 100

# Connections; seconds
CONNECTIONS = 256  # on which something runs
KEPT_CONNECTIONS = 8  # more, for /health alone, and for who waits
CONNECTIONS_PER_ADDRESS = 32  # but for this machine itself
HEADER_SECONDS = 10.0
BODY_SECONDS = 30.0
BODY_BYTES_PER_SECOND = 1 << 10
IDLE_SECONDS = 15
STALL_SECONDS = 30.0
LINGER_SECONDS = 2.0

# The server; seconds
REQUEST_SECONDS = 600.0
QUEUE = 64
DRAIN_SECONDS = 30.0
PING_SECONDS = 15.0


FILES = 40
"""Descriptors for all else: the model, a worker, what is listened on; and for connections that come or go."""


def connections() -> int:
    """CONNECTIONS, or as many as the process may have descriptors for."""
    if sys.platform == "win32":
        return CONNECTIONS
    import resource

    may_have, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if may_have == resource.RLIM_INFINITY:
        return CONNECTIONS
    return max(1, min(CONNECTIONS, may_have - FILES - KEPT_CONNECTIONS))
