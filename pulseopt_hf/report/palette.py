"""Colours, on light and on dark, of pages, pictures and the terminal. Standard library only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any, NamedTuple

from pulseopt_hf.aees.left_out import ArmTotals

# What a page is made of. Its style sheet and its charts read the same values.
LIGHT = {"back": "#f4f5f8", "card": "#ffffff", "ink": "#1f2430", "soft": "#5a6273"}
LIGHT |= {"line": "#e3e6ec", "good": "#15803d", "bad": "#b42318", "wait": "#9a6700"}
DARK = {"back": "#12151b", "card": "#1b2029", "ink": "#e6e9f0", "soft": "#a2abbd"}
DARK |= {"line": "#313846", "good": "#4ade80", "bad": "#fb8a80", "wait": "#facc6b"}
# Curves, in the order in which they are taken, apart for colour-blind eyes too.
CURVES = ["#1f2430", "#b4278c", "#0f766e", "#2f7fd0", "#d9791a", "#8a6fd8", "#a0892a"]
CURVES += ["#c9453d"]
CURVES_ON_DARK = ["#e6e9f0", "#f07fc8", "#2dd4bf", "#6db1f2", "#f0a050", "#ab94f0", "#cdb64f"]
CURVES_ON_DARK += ["#fb8a80"]
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # one after the other when the colours run out
FOUND, PLAIN = "#d8483c", "#82889a"  # marks that are readable on both


class ArmStyle(NamedTuple):
    """What an arm is called, such as `x0.5` or `x2, noise 0.01`, and its colour."""

    label: str
    color: str


def arm_styles(totals: Sequence[ArmTotals]) -> dict[tuple[float, float], ArmStyle]:
    """Return the looks of the arms that were played, by multiplier and noise, lowest first.

    Hues run from blue at the lowest multiplier through violet to orange at the highest.
    """
    arms = sorted((arm.lr_multiplier, arm.noise_std) for arm in totals)
    with_noise = any(noise for _, noise in arms)
    styles = {}
    for index, (lr, noise) in enumerate(arms):
        hue = 0.58 + 0.5 * index / max(1, len(arms) - 1)
        rgb = colorsys.hls_to_rgb(hue % 1.0, 0.58, 0.65)
        color = "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
        label = f"×{lr:g}" + (f", noise {noise:g}" if with_noise else "")  # noqa: RUF001
        styles[lr, noise] = ArmStyle(label, color)
    return styles


def theme(*, dark: bool = False) -> dict[str, Any]:
    """Return the looks of a chart, as a configuration of Vega-Lite."""
    page = DARK if dark else LIGHT
    lines = dict.fromkeys(("gridColor", "domainColor", "tickColor"), page["line"])
    words = dict.fromkeys(("labelColor", "titleColor"), page["soft"])
    return {
        "aria": False,  # what a chart shows stands beside it, in words and as a table
        "background": page["card"],
        "font": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif",
        "view": {"stroke": None},
        "axis": {**lines, **words, "labelFontSize": 12, "titleFontSize": 12}
        | {"titleFontWeight": "normal"},
        "axisX": {"labelOverlap": True, "labelSeparation": 6},
        "axisY": {"minExtent": 48, "maxExtent": 48},  # so that all charts share their left edge
        "legend": {"orient": "top", "title": None, "labelColor": page["ink"], "labelFontSize": 12}
        | {"layout": {"top": {"direction": "vertical", "anchor": "start", "margin": 4}}},
        "title": {"color": page["ink"], "anchor": "start", "fontSize": 14},
        "text": {"color": page["ink"]},
        # Behind a label, so that no line runs through it.
        "style": {"halo": {"stroke": page["card"], "strokeWidth": 5, "strokeJoin": "round"}},
        "rule": {"color": page["soft"]},
        "range": {"category": CURVES_ON_DARK if dark else CURVES},
    }
