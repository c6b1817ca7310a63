"""A model that is unloaded waits for its users, and has no others afterwards."""

import asyncio

import pytest

from steersman.guidance.request import GuidanceError
from steersman.server.registry import LoadedModel
from steersman.server.users import ModelUsers

FIRST, SECOND = LoadedModel("first", "causal", 512), LoadedModel("second", "policy", 512)


def test_closing_waits_for_the_last_user_and_lets_nobody_in_behind() -> None:
    async def run() -> None:
        users = ModelUsers()
        with users.using([FIRST, SECOND]):
            closing = asyncio.create_task(users.close("first"))
            with users.using([FIRST]):
                await asyncio.sleep(0)
                assert (users.count("first"), users.count("second")) == (2, 1)
            await asyncio.sleep(0)
            assert not closing.done()
        await closing
        assert users.count("first") == 0
        with pytest.raises(GuidanceError, match="'first' has just been unloaded"), users.using([SECOND, FIRST]):
            pass
        assert users.count("second") == 0
        users.open("first")
        with users.using([FIRST]):
            assert users.count("first") == 1

    asyncio.run(run())


def test_a_user_who_fails_is_gone() -> None:
    users = ModelUsers()
    with pytest.raises(RuntimeError), users.using([FIRST]):
        raise RuntimeError
    asyncio.run(asyncio.wait_for(users.close("first"), 5))
