"""Frames that the relay reads itself are read as websockets reads them, whatever comes, wherever reads cut it.

So many thousand streams as `TESTS_EXAMPLES` says; ``make fuzz`` feeds a million.
"""

import os

import pytest
import uvicorn

from tests.support.frame_streams import difference, protocol_config

STREAMS = 1000 * int(os.environ.get("TESTS_EXAMPLES", "25"))
PARTS = 10


@pytest.fixture(scope="module")
def config() -> uvicorn.Config:
    return protocol_config()


@pytest.mark.parametrize("part", range(PARTS))
def test_simple_frames_are_read_as_websockets_reads_them(config: uvicorn.Config, part: int) -> None:
    """The same messages, the same answers, byte for byte, and the same end."""
    for seed in range(part * STREAMS // PARTS, (part + 1) * STREAMS // PARTS):
        assert difference(config, seed) == ""
