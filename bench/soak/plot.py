"""How is a soak drawn? One strip for each measure over the time, as an SVG that any browser shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["drawn"]

_WIDTH, _STRIP, _LEFT, _TOP = 900, 90, 210, 30
_COLOURS = ("#1f6f8b", "#b5532a", "#5b7f3a")


def drawn(title: str, seconds: Sequence[float], series: Mapping[str, Sequence[float]], marks: Sequence[float]) -> str:
    """Draw.

    Args:
        title: above it.
        seconds: when each sample was taken.
        series: name to values, in the order of ``seconds``.
        marks: seconds at which the broker was restarted.

    Returns:
        The SVG.
    """
    height = _TOP + _STRIP * len(series) + 30
    span = max(seconds[-1] - seconds[0], 1.0)

    def across(when: float) -> float:
        return _LEFT + (when - seconds[0]) / span * (_WIDTH - _LEFT - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, values) in enumerate(series.items()):
        top, highest = _TOP + number * _STRIP, max(*values, 1e-9)
        points = " ".join(
            f"{across(when):.1f},{top + _STRIP - 10 - value / highest * (_STRIP - 20):.1f}"
            for when, value in zip(seconds, values, strict=True)
        )
        middle = top + _STRIP / 2
        parts += [
            f'<text x="10" y="{middle:.0f}" font-size="12">{escape(name)}</text>',
            f'<text x="10" y="{middle + 16:.0f}" font-size="11" fill="#666">{span_of(values)}</text>',
            f'<line x1="{_LEFT}" y1="{top + _STRIP - 10}" x2="{_WIDTH - 20}" y2="{top + _STRIP - 10}" stroke="#ccc"/>',
            f'<polyline points="{points}" fill="none" stroke="{_COLOURS[number % len(_COLOURS)]}" stroke-width="1.5"/>',
        ]
    bottom = _TOP + _STRIP * len(series)
    below = f"{span:.0f} seconds; dashed: the broker was killed and started"
    for when in marks:
        x = across(when)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#d33" stroke-dasharray="2 3"/>'
        )
    parts += [
        f'<text x="{_LEFT}" y="{bottom + 18}" font-size="11" fill="#666">{below}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def span_of(values: Sequence[float]) -> str:
    """First, highest and last value, as text."""
    return f"{values[0]:.0f} … {max(values):.0f} … {values[-1]:.0f}"
