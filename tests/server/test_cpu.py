"""What a server on a CPU takes of a machine that it shares."""

from pathlib import Path

import pytest

from steersman.server.cpu import BINDING, CACHE, choose_cpu_settings

GIB = 2**30


@pytest.mark.parametrize(("free", "cache"), [(GIB // 2, "1"), (7 * GIB, "1"), (12 * GIB, "3"), (900 * GIB, "4")])
def test_the_cache_follows_the_memory_that_is_free_and_the_line_names_both_variables(free: int, cache: str) -> None:
    environment: dict[str, str] = {}
    line = choose_cpu_settings(environment, free)
    assert environment == {BINDING: "nobind", CACHE: cache}
    assert line is not None
    assert f"{BINDING}=nobind" in line
    assert f"{CACHE}={cache}" in line


def test_what_the_user_has_set_stays() -> None:
    environment = {BINDING: "0-3", CACHE: "40"}
    assert choose_cpu_settings(environment, GIB) is None
    assert environment == {BINDING: "0-3", CACHE: "40"}


def test_a_flag_for_the_cache_is_not_overruled_by_a_variable() -> None:
    environment: dict[str, str] = {}
    choose_cpu_settings(environment, 16 * GIB, cache_given=True)
    assert environment == {BINDING: "nobind"}


def test_an_engine_that_fails_to_start_ends_in_a_line_with_the_way_out(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steersman.server import serve

    async def fail(*_: object) -> None:
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")

    monkeypatch.setattr(serve, "serve", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (CACHE, BINDING):
        monkeypatch.setenv(name, "")
    assert serve.main([str(models / "base")]) == 1
    chosen, failed = [line for line in "".join(capsys.readouterr()).splitlines() if CACHE in line]
    assert "on this CPU" in chosen
    assert failed.startswith("steersman: the server stopped: Engine core init")
    assert BINDING in failed
