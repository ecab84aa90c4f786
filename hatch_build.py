"""Put the browser client, which has its own folder and tests, into the wheel that serves it."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BrowserClient(BuildHookInterface):
    """Add its modules, but not to an editable install, where a second ``relay/`` would hide the real one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before each build; ``version`` is ``standard`` or ``editable``."""
        if version == "standard":
            for name in ("relay.js", "presence.js"):
                build_data["force_include"][f"clients/browser/{name}"] = f"relay/web/static/{name}"
