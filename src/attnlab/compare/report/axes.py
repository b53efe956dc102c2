"""What all pictures share: size, fonts, axes, and the sizes in pixels that labels are placed by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

HEIGHT = 300
MARGIN = {"l": 52, "r": 12, "t": 10, "b": 42}
PLOT_WIDTH, PLOT_HEIGHT = 256.0, float(HEIGHT - MARGIN["t"] - MARGIN["b"])
"""The narrowest that a panel's plotting area gets, and its height."""
GREY = "#80868f"  # readable on light and dark; the style sheet replaces it


def figure(*, height: int = HEIGHT, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None, **layout: Any) -> go.Figure:
    """An empty figure on nothing, so that the page's own background shows."""
    axis = {
        "gridcolor": "rgba(128,134,143,0.22)",
        "zeroline": False,
        "ticks": "",
        "fixedrange": True,
        "title": {"font": {"size": 12}, "standoff": 8},
        "automargin": False,
    }
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 11, "color": GREY}
    found = go.Figure()
    found.update_layout(
        {
            "template": "none",
            "height": height,
            "margin": MARGIN,
            "font": font,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "showlegend": False,
            "dragmode": False,
            "hoverlabel": {"bgcolor": "#22262c", "bordercolor": "#22262c", "font": {"color": "#ffffff", "size": 12}},
            "hovermode": "closest",
            "xaxis": axis,
            "yaxis": axis,
            **layout,
        }
    )
    found.update_xaxes(x or {})
    found.update_yaxes(y or {})
    return found


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of some values with room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - room, high + room
