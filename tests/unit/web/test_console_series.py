"""`relay.web.console_series`: what is kept of the last minutes, and how much."""

import asyncio
import json
from typing import Any

import pytest

from relay.web.console_series import INTERVAL_S, TOTALS, ConsoleSeries

METRICS: dict[str, dict[str, Any]] = {
    "relay_workers": {"": 2},
    "relay_dropped": {"too large": 1, "slow reader": 2},
    "relay_fan_out_seconds": {"": [3, 1, 0, 0.25]},
}


async def test_sums_are_kept_with_their_time() -> None:
    async def read() -> dict[str, dict[str, Any]]:
        return METRICS

    series = ConsoleSeries(read, clock=lambda: 1.5)
    await series.take()
    told: Any = series.as_json()
    (row,) = told["rows"]
    sample = dict(zip(told["names"], row, strict=True))
    assert (sample["at_ms"], sample["relay_workers"], sample["relay_dropped"]) == (1500, 2, 3)
    assert (sample["relay_fan_out_seconds_count"], sample["relay_fan_out_seconds_sum"]) == (4, 0.25)
    assert sample["relay_gaps"] == 0, "a metric that is not there"
    json.dumps(told)


async def test_fifteen_minutes_are_kept_and_no_more() -> None:
    now = 0.0

    async def read() -> dict[str, dict[str, Any]]:
        return METRICS

    series = ConsoleSeries(read, clock=lambda: now)
    for _ in range(500):
        await series.take()
        now += INTERVAL_S
    rows: Any = series.as_json()["rows"]
    assert (rows[-1][0] - rows[0][0]) / 1000 == 900
    assert len(json.dumps(series.as_json())) < 40_000
    assert all(len(row) == len(TOTALS) + 3 for row in rows)


async def test_a_sample_that_fails_is_logged_and_the_next_is_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.web.console_series.INTERVAL_S", 0.0)
    calls = 0

    async def read() -> dict[str, dict[str, Any]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("broken")
        return METRICS

    series = ConsoleSeries(read)
    series.start()
    async with asyncio.timeout(10):
        while not series.as_json()["rows"]:  # noqa: ASYNC110 - what is waited for is a list
            await asyncio.sleep(0)
    await series.stop()
    await series.stop()
    assert [record.getMessage() for record in caplog.records] == ["sample of the metrics failed"]
