"""Figures of a parity report, as SVG that can stand inside an HTML page.

Each function takes plain arrays and returns one `<svg>` element: no script, no font, no link, no date, so that the same
numbers give the same bytes. Lines and letters have the page's own colour (`currentColor`). Points are a picture inside the
SVG, so that size does not grow with the number of texts. Nothing that a text or a label says is drawn: names of labels are
the page's to print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.errors import MissingDependencyError

FloatArray = npt.NDArray[np.float64]

# Okabe and Ito's colours, which stay apart for colour-blind readers; the blue lighter, to be seen on a dark page too.
COLOURS = ("#1b80bd", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
VARIANT, LIMIT, QUIET = COLOURS[0], COLOURS[5], "#8c8c8c"
# Stands for the page's own colour until the SVG is written.
_INK = "#010203"
# Smaller differences are drawn here: float64 softmax of float32 logits says nothing below.
FLOOR = 1e-9
CURVE_POINTS = 400
# More points make a picture large, and no eye tells them apart.
SHARP_POINTS = 2000
# Fewer texts than this have no median worth a line.
BAND_TEXTS = 5
WIDE, NARROW = (7.6, 3.1), (4.6, 3.3)
_STYLE = {
    "svg.hashsalt": "samescore",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": QUIET,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def histogram(slug: str, dp: FloatArray, limits: Mapping[str, float]) -> str:
    """How many of the differences dp [texts] lie where (log axis), with their quantiles and the tolerance's `limits`."""
    with _figure(slug, WIDE) as (figure, page):
        axes = figure.subplots()
        values = np.maximum(dp, FLOOR)
        axes.hist(values, bins=_bins([dp], limits), color=VARIANT, alpha=0.75)
        # Each name on a height of its own: quantiles of a sharp distribution lie close together.
        for height, (name, q) in enumerate((("max", 1.0), ("p99.9", 0.999), ("p99", 0.99), ("median", 0.5))):
            at = float(np.quantile(values, q))
            axes.axvline(at, color=_INK, linewidth=0.9, linestyle=(0, (1, 1.5)))
            place = (at, 1.02 + 0.075 * (height % 3))
            axes.annotate(name, place, xycoords=("data", "axes fraction"), ha="center", fontsize=8)
        for name, limit in limits.items():
            style = "--" if name.startswith("p99") else "-"
            axes.axvline(limit, color=LIMIT, linewidth=1.4, linestyle=style, label=f"{name}: {limit:g}")
        axes.legend(loc="upper left")
        _log(axes.xaxis)
        axes.set_xlim(*_span([dp], limits))
        axes.set_xlabel("|Δp| of a text")
        axes.set_ylabel("texts")
    return page[0]


def exceedance(
    slug: str, curves: Mapping[str, FloatArray], limits: Mapping[float, float], size: tuple[float, float] = NARROW
) -> str:
    """The quantile curves: |Δp| that a share of the texts exceeds. limits: tolerance by share (0.01 for p99)."""
    with _figure(slug, size) as (figure, page):
        axes = figure.subplots()
        for place, (name, dp) in enumerate(curves.items()):
            ordered = np.maximum(np.sort(dp)[::-1], FLOOR)
            # Of many texts, as many points as a line this long can show.
            shown = np.unique(np.geomspace(1, len(ordered), CURVE_POINTS).astype(int))
            style = (
                {"color": QUIET, "linestyle": "--"} if name == "bfloat16" else {"color": COLOURS[place % len(COLOURS)]}
            )
            axes.plot(shown / len(ordered), ordered[shown - 1], linewidth=1.6, label=_ascii(name), **style)
        for share_allowed, limit in limits.items():
            axes.plot(share_allowed, limit, marker="v", color=LIMIT, markersize=7, linestyle="none")
        if limits:
            axes.plot([], [], marker="v", color=LIMIT, linestyle="none", label="tolerance")
        _log(axes.xaxis, share=True)
        _log(axes.yaxis)
        axes.invert_xaxis()
        axes.set_xlabel("share of texts that differ more")
        axes.set_ylabel("|Δp|")
        axes.legend(loc="best")
    return page[0]


def probabilities(slug: str, p: FloatArray, q: FloatArray, near_tie: float, *, band: bool) -> str:
    """Reference probabilities p against the variant's q [texts, labels], a colour per label, and their differences.

    near_tie: texts whose two best reference labels are at most this far apart are drawn with a ring. band: shade where
    that is around 1/2, for two labels whose probabilities add up to 1.
    """
    with _figure(slug, WIDE, points=p.size) as (figure, page):
        left, right = figure.subplots(1, 2)
        ranked = np.sort(p, axis=1)
        near = ranked[:, -1] - ranked[:, -2] <= near_tie if p.shape[1] > 1 else np.zeros(len(p), bool)
        left.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8)
        right.axhline(0, color=QUIET, linewidth=0.8)
        for axes in (left, right):
            if band:
                axes.axvspan(0.5 - near_tie / 2, 0.5 + near_tie / 2, color=QUIET, alpha=0.25, linewidth=0)
            axes.set_xlim(-0.03, 1.03)
            axes.set_xlabel("reference probability")
        for label in range(p.shape[1]):
            colour = COLOURS[label % len(COLOURS)]
            for axes, y in ((left, q[:, label]), (right, q[:, label] - p[:, label])):
                axes.scatter(p[:, label], y, s=9, color=colour, alpha=0.6, linewidths=0, rasterized=True)
                axes.scatter(p[near, label], y[near], s=36, facecolors="none", edgecolors=colour, rasterized=True)
        left.set_ylim(-0.03, 1.03)
        left.set_ylabel("variant's probability")
        right.set_ylabel("variant − reference")
    return page[0]


def against_length(slug: str, dp: FloatArray, lengths: npt.NDArray[np.int64]) -> str:
    """Differences dp [texts] against the texts' lengths in tokens (both log), with the median of each octave of lengths."""
    with _figure(slug, NARROW) as (figure, page):
        axes = figure.subplots()
        values = np.maximum(dp, FLOOR)
        axes.scatter(lengths, values, s=9, color=VARIANT, alpha=0.5, linewidths=0, rasterized=True)
        octave = np.floor(np.log2(lengths)).astype(int)
        bands = [(place, values[octave == place]) for place in np.unique(octave)]
        medians = [(float(place), float(np.median(inside))) for place, inside in bands if len(inside) >= BAND_TEXTS]
        for number, (place, middle) in enumerate(medians):
            label = None if number else "median of a length band"
            ends = [2.0**place, 2.0 ** (place + 1)]
            axes.plot(ends, [middle, middle], color=_INK, linewidth=2, solid_capstyle="butt", label=label)
        _log(axes.yaxis)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel("length in tokens")
        axes.set_ylabel("|Δp|")
        if medians:
            axes.legend(loc="best")
    return page[0]


def reliability(slug: str, sides: Mapping[str, tuple[FloatArray, npt.NDArray[np.bool_]]], bins: int = 10) -> str:
    """Accuracy against confidence in equal-width bins, and the number of texts in each.

    sides: by name, the top probability [texts] and whether that label is right [texts].
    """
    with _figure(slug, (4.6, 4.0)) as (figure, page):
        curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        edges = np.linspace(0, 1, bins + 1)
        curve.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8)
        width = 0.8 / bins / len(sides)
        for place, (name, (confidence, right)) in enumerate(sides.items()):
            bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
            used = np.unique(bin_of)
            colour = (QUIET, *COLOURS)[place % (len(COLOURS) + 1)]
            x = [float(confidence[bin_of == b].mean()) for b in used]
            y = [float(right[bin_of == b].mean()) for b in used]
            number = np.bincount(bin_of, minlength=bins)
            curve.plot(x, y, color=colour, linewidth=1.0, alpha=0.6)
            # A bin of few texts says little, so its mark is small.
            sizes = 12 + 90 * np.sqrt(number[used] / number.max())
            curve.scatter(x, y, s=sizes, marker="osD^"[place % 4], color=colour, alpha=0.85, linewidths=0, label=name)
            counts.bar((edges[:-1] + 0.1 / bins) + (place + 0.5) * width, number, width=width, color=colour)
        curve.set_ylabel("share that is right")
        curve.set_ylim(-0.03, 1.03)
        for handle in curve.legend(loc="upper left").legend_handles:
            handle.set_sizes([25])
        counts.set_ylabel("texts")
        counts.set_xlabel("confidence: probability of the top label")
        counts.set_xlim(0, 1)
    return page[0]


def noise(slug: str, dp: FloatArray, bfloat16: FloatArray) -> str:
    """The distribution of the variant's differences [texts] over that of the reference's own bfloat16 run."""
    with _figure(slug, NARROW) as (figure, page):
        axes = figure.subplots()
        bins = _bins([dp, bfloat16], {}, count=30)
        axes.hist(np.maximum(bfloat16, FLOOR), bins=bins, color=QUIET, alpha=0.5, label="reference in bfloat16")
        axes.hist(np.maximum(dp, FLOOR), bins=bins, color=VARIANT, histtype="step", linewidth=1.8, label="variant")
        _log(axes.xaxis)
        axes.set_xlim(*_span([dp, bfloat16], {}))
        axes.set_xlabel("|Δp| from the reference in float32")
        axes.set_ylabel("texts")
        axes.legend(loc="best")
    return page[0]


def import_matplotlib() -> Any:
    """matplotlib, or MissingDependencyError naming the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            f"a report needs {error.name}, which is not installed: pip install 'samescore[report]'"
        ) from error
    return matplotlib


@contextmanager
def _figure(slug: str, size: tuple[float, float], *, points: int = 0) -> Iterator[tuple[Any, list[str]]]:
    """A figure to draw on, and a list that holds its SVG afterwards; points: how many its picture shows."""
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    page: list[str] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        yield figure, page
        stream = io.BytesIO()
        silence = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", dpi=150 if points <= SHARP_POINTS else 110, metadata=silence)
    page.append(_inline(stream.getvalue().decode(), slug))


def _inline(svg: str, slug: str) -> str:
    """The `<svg>` element alone: ids that are its own, the page's colour, no namespaces (HTML knows them)."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # the page has it
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=").replace(_INK, "currentColor")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{slug}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{slug}-", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def _span(samples: Sequence[FloatArray], limits: Mapping[str, float]) -> tuple[float, float]:
    """Where a log axis of differences begins and ends."""
    low = min(float(np.maximum(sample, FLOOR).min()) for sample in samples)
    high = max(*(float(np.maximum(sample, FLOOR).max()) for sample in samples), *limits.values(), 10 * FLOOR)
    return low / 1.5, high * 2


def _bins(samples: Sequence[FloatArray], limits: Mapping[str, float], count: int = 48) -> FloatArray:
    low, high = _span(samples, limits)
    return np.geomspace(low, high, count + 1)


def _log(axis: Any, *, share: bool = False) -> None:
    """A log axis with plain-text ticks: 10⁻³, or 0.1 % for shares."""
    from matplotlib.ticker import NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_formatter((lambda x, _: f"{x:.4g}") if share else (lambda x, _: _power(x)))
    axis.set_minor_locator(NullLocator())


def _power(value: float) -> str:
    exponent = round(float(np.log10(value)))
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _ascii(name: str) -> str:
    """Names of variants are ASCII (the manifest's parser sees to it for paths); anything else is not drawn."""
    return name if name.isascii() else "variant"
