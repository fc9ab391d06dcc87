"""Charts as inline SVG: no script, no font, no request. Colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer_attrib.report.blocks import Bar, Bars, Curve
from trainer_attrib.report.escape import escaped

_LABELS, _WIDTH, _ROW, _GAP = 190, 520, 15, 14  # pixels


def shown(value: object) -> str:
    """A number in four significant digits, anything else as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if math.isnan(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def bars_svg(chart: Bars) -> str:
    """Grouped horizontal bars with whiskers; bars that are not certain are hatched lighter."""
    groups = list(dict.fromkeys(bar.group for bar in chart.bars))
    series = list(dict.fromkeys(bar.series for bar in chart.bars))
    low, high = _extent(chart.bars)
    rows, y = [], 4.0
    for group in groups:
        members = [bar for bar in chart.bars if bar.group == group]
        middle = y + len(members) * _ROW / 2 + 4
        rows.append(f'<text class="label" x="{_LABELS - 10}" y="{middle:.0f}">{escaped(group)}</text>')
        for bar in members:
            rows.append(_bar(bar, series.index(bar.series), y, low, high))
            y += _ROW
        y += _GAP
    zero = _x(0.0, low, high)
    axis = f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{y - _GAP + 4:.0f}"/>'
    legend = "".join(
        f'<span class="key"><i class="s{i % 6}"></i>{escaped(name)}</span>' for i, name in enumerate(series)
    )
    size = f'viewBox="0 0 {_LABELS + _WIDTH + 70} {y:.0f}" width="{_LABELS + _WIDTH + 70}"'
    label = escaped(f"{chart.title}; the same numbers are in the table below")
    return f'<div class="legend">{legend}</div><svg role="img" aria-label="{label}" {size}>{axis}{"".join(rows)}</svg>'


def curve_svg(curve: Curve, width: int = 260, height: int = 90) -> str:
    """One curve in a frame with its first and last value."""
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    if len(points) < 2:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = points[0], points[-1]
    span_x, span_y = (last[0] - first[0]) or 1.0, (high - low) or 1.0
    path = " ".join(
        f"{4 + (x - first[0]) / span_x * (width - 8):.1f},{height - 4 - (y - low) / span_y * (height - 8):.1f}"
        for x, y in _thinned(points)
    )
    name = escaped(curve.name)
    return (
        f'<figure><figcaption>{name}: {shown(first[1])} → {shown(last[1])}</figcaption><svg role="img" '
        f'aria-label="{name}" viewBox="0 0 {width} {height}" width="{width}"><rect class="frame" width="{width}" '
        f'height="{height}"/><polyline class="line" points="{path}"/></svg></figure>'
    )


def _bar(bar: Bar, series: int, y: float, low: float, high: float) -> str:
    zero, end = _x(0.0, low, high), _x(bar.value, low, high)
    left, length = min(zero, end), max(abs(end - zero), 0.5)
    middle = y + _ROW / 2 - 1
    parts = [
        f'<rect class="s{series % 6}{"" if bar.certain else " unsure"}" x="{left:.1f}" y="{y:.1f}" '
        f'width="{length:.1f}" height="{_ROW - 3}"><title>{escaped(bar.series)}: {shown(bar.value)} ± '
        f"{shown(bar.error)}</title></rect>"
    ]
    reach = end
    if bar.error > 0:
        a, b = _x(bar.value - bar.error, low, high), _x(bar.value + bar.error, low, high)
        reach = max(reach, b)
        parts.append(f'<path class="whisker" d="M{a:.1f} {middle:.1f}H{b:.1f}M{a:.1f} {middle - 3:.1f}v6M{b:.1f} '
                     f'{middle - 3:.1f}v6"/>')  # fmt: skip
    at = max(zero, reach) + 6
    parts.append(f'<text class="value" x="{at:.1f}" y="{middle + 4:.1f}">{shown(bar.value)}</text>')
    return "".join(parts)


def _extent(bars: Sequence[Bar]) -> tuple[float, float]:
    low = min([0.0, *(bar.value - bar.error for bar in bars)])
    high = max([0.0, *(bar.value + bar.error for bar in bars)])
    return (low, high) if high > low else (0.0, 1.0)


def _x(value: float, low: float, high: float) -> float:
    return _LABELS + (value - low) / (high - low) * _WIDTH


def _thinned(points: list[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    return points[:: max(1, len(points) // most)]
