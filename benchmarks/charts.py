"""Pictures of the results, as SVG, drawn here: a plotting library would be the benchmark's largest dependency.

Owns shapes and colours; must not know what is measured.
"""

import math
from collections.abc import Sequence
from html import escape

_COLOURS = ("#2563eb", "#9ca3af", "#d97706", "#059669")
_WIDTH = 720
_FONT = "font-family='system-ui, sans-serif' font-size='13'"


def bars(title: str, values: Sequence[tuple[str, float]], unit: str, highlight: str = "relay") -> str:
    """Horizontal bars, the shortest on top."""
    left, right, step = 250, 90, 30
    most = max((value for _, value in values), default=1.0)
    parts: list[str] = []
    for place, (name, value) in enumerate(sorted(values, key=lambda pair: pair[1])):
        y = 52 + place * step
        width = (_WIDTH - left - right) * value / most
        colour = _COLOURS[0] if name.startswith(highlight) else _COLOURS[1]
        parts.append(f"<text x='{left - 10}' y='{y + 15}' text-anchor='end'>{escape(name)}</text>")
        parts.append(f"<rect x='{left}' y='{y}' width='{width:.1f}' height='20' rx='2' fill='{colour}'/>")
        parts.append(f"<text x='{left + width + 8:.1f}' y='{y + 15}'>{value:.1f} {escape(unit)}</text>")
    return _svg(title, 62 + len(values) * step, parts)


def lines(title: str, curves: Sequence[tuple[str, Sequence[tuple[int, float]]]], x_name: str, y_name: str) -> str:
    """Curves over a logarithmic axis."""
    left, right, top, bottom, height = 60, 30, 60, 60, 360
    points = [point for _, curve in curves for point in curve]
    if not points:
        return _svg(title, height, ["<text x='60' y='80'>not measured</text>"])
    low, high = (math.log10(edge(x for x, _ in points)) for edge in (min, max))
    most = _round_up(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(x) - low) / ((high - low) or 1)
        return left + share * (_WIDTH - left - right), height - bottom - y / most * (height - top - bottom)

    parts: list[str] = []
    for tick in range(5):
        value = most * tick / 4
        _, y = place(10**low, value)
        parts.append(f"<line x1='{left}' y1='{y:.1f}' x2='{_WIDTH - right}' y2='{y:.1f}' stroke='#e5e7eb'/>")
        parts.append(f"<text x='{left - 8}' y='{y + 4:.1f}' text-anchor='end'>{value:g}</text>")
    for size in sorted({x for x, _ in points}):
        x, _ = place(size, 0)
        parts.append(f"<text x='{x:.1f}' y='{height - bottom + 20}' text-anchor='middle'>{size}</text>")
    parts.append(f"<text x='{_WIDTH / 2}' y='{height - 15}' text-anchor='middle'>{escape(x_name)}</text>")
    parts.append(f"<text x='{left}' y='{top - 10}' fill='#6b7280'>{escape(y_name)}</text>")
    for number, (name, curve) in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        placed = [place(x, y) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2.5'/>")
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'/>" for x, y in placed]
        parts.append(f"<rect x='{_WIDTH - 250}' y='{top - 24 + number * 20}' width='12' height='12' fill='{colour}'/>")
        parts.append(f"<text x='{_WIDTH - 232}' y='{top - 13 + number * 20}'>{escape(name)}</text>")
    return _svg(title, height, parts)


def _round_up(value: float) -> float:
    step = 10.0 ** math.floor(math.log10(value)) / 2
    return float(math.ceil(value * 1.05 / step) * step)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' {_FONT} fill='#111827' role='img'>"
    paper = f"<title>{escape(title)}</title><rect width='{_WIDTH}' height='{height}' fill='#ffffff'/>"
    heading = f"<text x='20' y='30' font-size='16' font-weight='600'>{escape(title)}</text>"
    return "\n".join([head, paper, heading, *parts, "</svg>"]) + "\n"
