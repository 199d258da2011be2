"""Calls made from the schema that is served: nothing makes the gateway fail."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from gateway_at_work import HELLO, Watched
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from delible.gateway.app import gateway
from delible.gateway.models import ServedModel
from delible.gateway.settings import GatewaySettings

ROUTES = 10


@pytest.fixture
def served_schema(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ADMIN", "secret")
    made = GatewaySettings(admin_key_variable="ADMIN")
    model = ServedModel("m", Watched(HELLO, "tools"), made)
    return schemathesis.openapi.from_asgi("/openapi.json", gateway([model], made))


@pytest.mark.parametrize("place", range(ROUTES))
def test_nothing_makes_it_fail(served_schema: Any, place: int) -> None:
    operations = [one.ok() for one in served_schema.get_all_operations()]
    assert len(operations) == ROUTES

    @settings(
        max_examples=8, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operations[place].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def refused(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    @settings(
        max_examples=8, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operations[place].as_strategy())
    def answered(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    answered()
    if operations[place].body:
        refused()


def test_the_schema_has_every_route_and_body(served_schema: Any) -> None:
    raw = served_schema.raw_schema
    assert {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/check", "/v1/models",
        "/v1/models/{name}", "/health", "/ready", "/metrics", "/admin/targets",
    } == set(raw["paths"])  # fmt: skip
    body = raw["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert "messages" in raw["components"]["schemas"]["ChatRequest"]["properties"]
