"""What the document at /openapi.json says, tried out by schemathesis: requests that it allows and requests that it does
not. GEMMART_EXAMPLES: how many random ones for each endpoint; then each field has its own, too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

import gemmart
from conftest import Tiny
from openapi_document import DOCUMENT, refused_beyond
from serving import MINUTE

N_EXAMPLES = int(os.environ.get("GEMMART_EXAMPLES", "0"))
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.phases.coverage.enabled = N_EXAMPLES > 0  # test_server_fields.py does much the same in less time


@pytest.fixture(scope="module")
def url(tiny: Tiny) -> Iterator[str]:
    path = tiny("gemma2", "Q8_0")
    with gemmart.load(path, ctx=64, parallel=4, threads=1) as model, model.serve() as running:
        yield running.url


@schema.parametrize()
@settings(max_examples=N_EXAMPLES or 20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_endpoint(case: schemathesis.Case, url: str) -> None:
    response = case.call_and_validate(base_url=url, excluded_checks=[positive_data_acceptance], timeout=MINUTE)
    if case.meta.generation.mode.is_positive and response.status_code == 400:
        assert refused_beyond(response), response.text
