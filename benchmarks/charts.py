"""Bar charts as SVG text: legible in a light and in a dark page, no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_ROW, _LABEL, _BARS, _VALUE = 24, 330, 420, 90  # pixels
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.bar{fill:#3b6ea5}.title{font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.bar{fill:#7fb2e5}}"
)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], unit: str) -> str:
    """Return an SVG of horizontal bars, one a (label, value), in their order."""
    longest = max((value for _, value in bars), default=1.0) or 1.0
    width, height = _LABEL + _BARS + _VALUE, _ROW * (len(bars) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="8" y="17">{escape(title)}</text>',
    ]
    for number, (label, value) in enumerate(bars, start=1):
        top, length = number * _ROW + 8, _BARS * value / longest
        parts.append(f'<text x="{_LABEL - 8}" y="{top + 13}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="bar" x="{_LABEL}" y="{top}" width="{length:.1f}" height="{_ROW - 7}" rx="2"/>')
        parts.append(f'<text x="{_LABEL + length + 6:.1f}" y="{top + 13}">{value:.3g} {escape(unit)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
