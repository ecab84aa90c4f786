"""A first plugin to go on from: what ``relay new-plugin`` writes.

Owns the text of that package; must not know how plugins are loaded.
"""

import keyword
from importlib.util import find_spec
from pathlib import Path

from relay.errors import ConfigError

_PLUGIN = '''"""A plugin of the relay: what it does, in one line."""

from fastapi import APIRouter

from relay import Join, Plugin, Push, Refused

plugin = Plugin("{name}")
router = APIRouter(prefix="/{name}", tags=["{name}"])
plugin.include_router(router)


@plugin.on_join("{name}:*")
async def welcome(join: Join) -> dict[str, str]:
    """Allow everybody, and greet them in the join reply."""
    return {{"welcome": join.topic}}


@plugin.on_push("{name}:*", "say")
async def say(push: Push) -> dict[str, int]:
    """Send what one says to everybody on the topic; the returned value is the reply."""
    text = push.payload.get("text") if isinstance(push.payload, dict) else None
    if not text:
        raise Refused("nothing to say")
    await push.broadcast("said", {{"text": text}})
    return {{"length": len(text)}}


@router.get("/")
async def about() -> dict[str, str]:
    """A REST route, at /api/{name}/."""
    return {{"plugin": "{name}"}}
'''

_TEST = '''"""Runs the plugin in a relay of its own: no server and no Redis needed."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from relay import Refused, Relay
from relay.testing import connect

HERE = Path(__file__).parent


def test_what_one_says_reaches_the_topic() -> None:
    relay = Relay(broadcast_url="memory://", plugins={{"paths": [HERE.parent]}})
    with TestClient(relay) as client, connect(client) as one, connect(client) as other:
        channel = one.join("{name}:1")
        assert channel.response == {{"welcome": "{name}:1"}}
        listener = other.join("{name}:1")

        assert channel.push("say", {{"text": "hi"}}) == {{"length": 2}}
        listener.expect("said", text="hi")

        with pytest.raises(Refused, match="nothing to say"):
            channel.push("say", {{}})
        listener.expect_nothing()
        assert client.get("/api/{name}/").json() == {{"plugin": "{name}"}}
'''


def _is_module(name: str) -> bool:
    """Whether an import of this name finds another module; pytest would find the plugin in its place."""
    found = find_spec(name)
    return found is not None and found.origin is not None


def write_plugin(name: str, directory: Path) -> Path:
    """Write the package ``<directory>/<name>``. Returns its directory; raises ConfigError where it cannot be."""
    if not name.isidentifier() or not name.isascii():
        raise ConfigError(f"NAME: expected letters, digits and _, not beginning with a digit, got {name!r}")
    if keyword.iskeyword(name) or _is_module(name):
        raise ConfigError(f"NAME: {name!r} is a word or a module of Python; expected a name of the plugin's own")
    package = directory / name
    try:
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(_PLUGIN.format(name=name), encoding="utf-8")
        (package / f"test_{name}.py").write_text(_TEST.format(name=name), encoding="utf-8")
    except FileExistsError:
        raise ConfigError(f"NAME: {package} exists already") from None
    except OSError as error:
        raise ConfigError(f"NAME: {package} cannot be written: {error.strerror}") from None
    return package
