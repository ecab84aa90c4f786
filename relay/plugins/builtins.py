"""The plugins that come with the relay, as far as the settings ask for them."""

from relay.config import Config
from relay.plugins import Plugin, system
from relay.telemetry import Telemetry


def builtin_plugins(config: Config, telemetry: Telemetry) -> tuple[tuple[Plugin, ...], tuple[Plugin, ...]]:
    """Those that come before all others, and those that come last. Raises ConfigError."""
    first = (system.plugin,) if config.system_topic else ()
    if not config.webhooks:
        return first, ()
    from relay.plugins import webhooks  # needs the extra `webhooks`

    return first, (webhooks.make_plugin(config.webhooks, telemetry),)
