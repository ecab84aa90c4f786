"""`relay.publisher`: what is refused before anything is sent."""

import pytest

from relay import AsyncPublisher, Config, ConfigError, Publisher


@pytest.mark.parametrize("kind", [Publisher, AsyncPublisher])
def test_wrong_settings_are_refused_at_once(kind: type[Publisher] | type[AsyncPublisher]) -> None:
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}: redis_url: expected a URL that starts with redis://"):
        kind("localhost:6379")
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}: topic: no such setting"):
        kind("redis://localhost", topic=[])
    with pytest.raises(TypeError, match="expected an address with settings, or a Config without"):
        kind(Config(redis_url="redis://localhost"), topics=[])
    with pytest.raises(ConfigError, match="publishing from outside needs Redis"):
        kind(Config(broadcast_url="kafka://localhost"))


def test_environment_names_the_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_REDIS_URL", "redis://one:1")
    publisher = Publisher.from_env()
    assert publisher._target.address == "one:1"
    monkeypatch.delenv("RELAY_REDIS_URL")
    monkeypatch.setattr("relay.runtime_dir.newest", lambda: None)
    with pytest.raises(ConfigError, match="no Redis is configured and no relay with an embedded one runs here"):
        Publisher.from_env()


@pytest.mark.parametrize(
    ("topic", "event", "payload", "kind", "text"),
    [
        ("", "e", {}, ValueError, "expected a topic"),
        ("room:1", "a:b", {}, ValueError, "an event without colon"),
        ("room:1", "phx_join", {}, ValueError, "an event without colon"),
        ("room:1", "e", {"at": object()}, TypeError, "expected a payload that is JSON-serializable"),
        ("room:1", "e", float("nan"), TypeError, "NaN"),
    ],
)
async def test_event_that_cannot_be_sent_is_refused_before_anything_is_sent(
    topic: str, event: str, payload: object, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        Publisher("redis://localhost:1").publish_many([("room:1", "e", 1), (topic, event, payload)])
    with pytest.raises(kind, match=text):
        await AsyncPublisher("redis://localhost:1").publish_many([("room:1", "e", 1), (topic, event, payload)])


async def test_no_events_need_no_connection() -> None:
    assert Publisher("redis://localhost:1").publish_many([]) == []
    assert await AsyncPublisher("redis://localhost:1").publish_many([]) == []
