"""Two result files side by side: ``benchmarks/compare OLD.json NEW.json``.

Needs the standard library alone. Exit code 1 where something of the relay's costs a tenth more than before, so that it
is seen in review; machines differ and so do their hours, so compare runs of one machine, made one after the other.
"""

import json
import sys
from pathlib import Path
from typing import Any

_FIGURES = (("cpu_us", "CPU µs"), ("p99_ms", "p99 ms"), ("memory_kb", "kB/socket"))
_WORSE = 1.10


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines of a table, and whether the CPU or memory of a relay's row has grown by a tenth."""
    before = {(row["scenario"], row["server"]): row for row in old["rows"]}
    after = {(row["scenario"], row["server"]): row for row in new["rows"]}
    lines = [f"old: {old['made']}, {old['command']}, {old['machine']['processor']}"]
    lines += [f"new: {new['made']}, {new['command']}, {new['machine']['processor']}", ""]
    lines.append(f"{'':64} {'':9} {'old':>10} {'new':>10} {'new/old':>8}")
    worse = False
    for key in dict.fromkeys([*before, *after]):
        name = " | ".join(filter(None, key))
        if key not in before or key not in after:
            lines.append(f"{name:64} only in the {'new' if key in after else 'old'} file")
            continue
        for field, title in _FIGURES:
            was, now = before[key].get(field), after[key].get(field)
            if was is None and now is None:
                continue
            if not was or now is None:
                lines.append(f"{name:64} {title:9} {_text(was):>10} {_text(now):>10}")
                continue
            grown = now / was
            bad = grown > _WORSE and field != "p99_ms" and key[1].startswith("relay")
            worse = worse or bad
            lines.append(f"{name:64} {title:9} {was:10.2f} {now:10.2f} {grown:7.2f}x{'  <-- more' if bad else ''}")
    lines.append("")
    verdicts = {(point["number"], point["what"], point["target"]): point["verdict"] for point in old["points"]}
    for point in new["points"]:
        was = verdicts.get((point["number"], point["what"], point["target"]))
        if was is not None and was != point["verdict"]:
            lines.append(f"point {point['number']}, {point['what']}, {point['target']}: {was} -> {point['verdict']}")
    return lines, worse


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main(arguments: list[str]) -> int:
    """Print the comparison; returns the exit code."""
    if len(arguments) != 2:
        sys.stderr.write("usage: benchmarks/compare OLD.json NEW.json\n")
        return 2
    old, new = (json.loads(Path(path).read_text()) for path in arguments)
    lines, worse = compare(old, new)
    sys.stdout.write("\n".join(lines) + "\n")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
