"""tangram's `channel` service: ``python tangram_server.py PORT REDIS_URL``."""

import asyncio
import sys

from tangram_core import _core  # installed where this runs, not where it is checked

SECRET = "benchmark"


async def main(port: int, redis_url: str) -> None:
    """Serve until the process is ended, with the log level that `tangram serve` has by default."""
    _core.init_tracing_stderr("INFO")
    config = _core.ChannelConfig(
        host="127.0.0.1", port=port, redis_url=redis_url, jwt_secret=SECRET, jwt_expiration_secs=86400, id_length=8
    )
    await _core.run(config)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
