"""The official `Presence` class of phoenix.js, and that of the browser client, in Node."""

import asyncio

import pytest

from relay import Joined, Push, Relay
from relay.auth.authenticator import UpgradeRequest
from relay.plugins import Plugin
from tests.support.node import need_node, run_checks
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.serving import serve


@pytest.mark.parametrize(
    ("client", "presence"),
    [
        ("phoenix-1.8", "phoenix-1.8"),
        ("phoenix-1.7", "phoenix-1.7"),
        ("phoenix-1.6", "phoenix-1.6"),
        ("relay", "phoenix-1.8"),
        ("phoenix-1.8", "relay"),
        ("relay", "relay"),
    ],
)
async def test_official_presence_class_works(client: str, presence: str, valkey: Valkey) -> None:
    """Lists, callbacks, tabs, updates and rejoins, as ``presence-node.mjs`` lists them."""
    need_node()
    plugin = Plugin("status")
    members: dict[str, Joined] = {}

    @plugin.on_joined("room:*")
    def keep(joined: Joined) -> None:
        members[joined.socket.id] = joined

    @plugin.on_push("room:*", "status")
    def change(push: Push) -> None:
        assert push.user is not None
        members[push.socket.id].track(push.user, push.payload)

    def authenticate(request: UpgradeRequest) -> dict[str, str]:
        return {"sub": request.query_params["user"]}

    relay = Relay(
        topics=[{"match": "room:*", "presence": True}],
        presence={"leave_delay_s": 2 * PATIENCE},
        redis_url=valkey.url,
        extra_plugins=(plugin,),
        auth={"authenticated": [{"match": "room:*", "rights": ["join", "push", "presence"]}]},
        authenticate=authenticate,
        system_topic=False,
    )
    async with serve(relay) as served:
        await asyncio.to_thread(run_checks, "presence-node.mjs", client, presence, served.ws)
