"""The lines of docs/publishing.md in other languages, as they stand there: their events reach a relay's subscribers."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from relay import Relay
from tests.integration.test_docs import REPOSITORY, blocks_of
from tests.support.node import need_node
from tests.support.process import Valkey

PACKAGES = REPOSITORY / "examples" / "node-plugin" / "node_modules"
PAGE = REPOSITORY / "docs" / "publishing.md"
PROGRAMS = {"js": ("node", "program.mjs"), "php": ("php", "program.php"), "ruby": ("ruby", "program.rb")}


def need(language: str) -> None:
    program, _ = PROGRAMS[language]
    if language == "js":
        need_node()
        if not (PACKAGES / "redis").is_dir():
            pytest.skip("the packages of the example are not installed: npm ci --prefix examples/node-plugin")
    elif shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize("language", PROGRAMS)
async def test_lines_of_another_language_publish_live_and_with_history(language: str, tmp_path: Path) -> None:
    need(language)
    program, name = PROGRAMS[language]
    (block,) = [block for block in blocks_of(PAGE) if block.language == language]
    with Valkey() as server:
        text = block.text.replace("localhost:6379", f"127.0.0.1:{server.port}")
        (tmp_path / name).write_text(text.replace("'localhost', 6379", f"'127.0.0.1', {server.port}"))
        if language == "js":
            (tmp_path / "node_modules").symlink_to(PACKAGES)
        topics = [{"match": "shop:*", "history": {"size": 100, "ttl_s": 3600}}]
        relay = Relay(redis_url=server.url, system_topic=False, topics=topics)
        async with relay.lifespan(), relay.subscribe("room:1") as room, relay.subscribe("shop:orders") as orders:
            await relay.publish("shop:orders", "first", {})  # by then the function has been loaded
            ended = await asyncio.to_thread(
                subprocess.run,
                [program, name],
                cwd=tmp_path,
                env=os.environ,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
            async with asyncio.timeout(30):
                live = await anext(room)
                _, kept = await anext(orders), await anext(orders)
        assert (live.event, live.payload, live.position) == ("new_msg", {"text": "hi"}, None)
        assert (kept.event, kept.payload) == ("new_order", {"name": "tea"})
        assert kept.position is not None


def test_every_language_of_the_page_is_run_or_says_by_hand() -> None:
    assert {block.language for block in blocks_of(PAGE)} == {"text", "python", "console", *PROGRAMS, "go", "rust"}
