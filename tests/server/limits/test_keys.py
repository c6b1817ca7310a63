"""Without a key there is nothing but /health; user keys stay out of the admin paths, the admin key stays in them."""

import httpx
import pytest

from tests.server.limits.conftest import ADMIN_KEY, KEY, SECOND_KEY
from tests.support.server import Server

WRONG = {
    "none": {},
    "empty": {"Authorization": ""},
    "unknown": {"Authorization": "Bearer nobody's"},
    "the start of one": {"Authorization": f"Bearer {KEY[:-1]}"},
    "another scheme": {"Authorization": f"Basic {KEY}"},
    "the admin's": {"Authorization": f"Bearer {ADMIN_KEY}"},
    "in a header of its own": {"X-Api-Key": KEY},
    "not ASCII": {"Authorization": "Bearer schlüssel".encode()},
}
ADMIN_PATHS = ("/v1/admin", "/v1/admin/", "/v1/admin/reward_models")
OTHERS = ("/", "/metrics", "/docs", "/redoc", "/ping", "/version", "/nothing", "/health/", "/health/x", "//health")


@pytest.mark.parametrize("headers", WRONG.values(), ids=list(WRONG))
def test_a_wrong_key_is_401_everywhere_but_on_health(limited: Server, headers: dict[str, str | bytes]) -> None:
    known = httpx.get(f"{limited.url}/openapi.json", headers=limited.headers, timeout=60).json()["paths"]
    closed = [path for path in known if path != "/health" and not path.startswith("/v1/admin/")]
    operations = [(method, path) for path in closed for method in known[path]]
    with httpx.Client(base_url=limited.url, headers=headers, timeout=60) as client:
        for method, path in [*operations, *(("get", path) for path in OTHERS), ("options", "/v1/models")]:
            response = client.request(method.upper(), path)
            assert response.status_code == 401, (method, path)
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == 401
            assert "Bearer" in response.json()["error"]["message"]
        assert client.get("/health").status_code == 200


def test_every_users_key_opens_what_is_not_the_administrators(limited: Server) -> None:
    for key in (KEY, SECOND_KEY):
        with httpx.Client(base_url=limited.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
            assert client.get("/v1/models").status_code == 200
            assert client.get("/metrics").status_code == 200
            assert client.get("/nothing").json()["error"]["code"] == 404
            for path in ADMIN_PATHS:
                assert client.get(path).status_code == client.post(path, json={}).status_code == 403


def test_admin_paths_need_the_admin_key(limited: Server) -> None:
    with httpx.Client(base_url=limited.url, timeout=60) as client:
        for path in ADMIN_PATHS:
            assert client.get(path).status_code == 401
            # Past the keys; whether there is such a route is the routes' affair.
            assert client.get(path, headers={"Authorization": f"Bearer {ADMIN_KEY}"}).status_code not in (401, 403)


def test_other_origins_are_not_let_in(limited: Server) -> None:
    asks = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{limited.url}/v1/completions", headers=asks, timeout=60)
    assert preflight.status_code == 400
    answer = httpx.get(f"{limited.url}/v1/models", headers={**limited.headers, **asks}, timeout=60)
    for response in (preflight, answer):
        assert "access-control-allow-origin" not in response.headers
