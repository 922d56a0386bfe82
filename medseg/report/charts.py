"""Charts as SVG: training curves, ROC, distributions. The same figures always give the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from medseg.exams import DAYS_PER_YEAR
from medseg.report.page import Picture, data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a85",
    "axes.labelcolor": "#3a3a37",
    "axes.grid": True,
    "grid.color": "#e6e5e0",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#5a5a55",
    "ytick.color": "#5a5a55",
    "legend.frameon": False,
    "svg.hashsalt": "medseg",
}
_PANEL_IN = (3.55, 2.55)
_PX_PER_IN = 96

Draw = Callable[["Axes"], None]


def training_curves(history: Sequence[Mapping[str, float]]) -> Picture:
    """Losses, validation scores and learning rate over epochs; rows lack what was not measured in their epoch."""
    scores = [
        name
        for name in dict.fromkeys(key for row in history for key in row)
        if name.startswith("val_") and name not in ("val_loss", "val_score")
    ]
    if not scores and any("val_score" in row for row in history):
        scores = ["val_score"]
    panels: list[Draw] = [lambda axes: _lines(axes, history, ("train_loss", "val_loss"), "Loss")]
    if scores:
        panels.append(lambda axes: _lines(axes, history, scores, "Score on the validation split", highest=1.0))
    panels.append(lambda axes: _lines(axes, history, ("learning_rate",), "Learning rate"))
    last = history[-1]
    alt = f"Training curves over {len(history)} epochs; the last training loss is {last.get('train_loss', 0):.3g}."
    return _chart(panels, alt)


def roc_chart(fpr: Sequence[float], tpr: Sequence[float], auc: float | None) -> Picture:
    """The ROC curve. `fpr`, `tpr`: shares from 0 to 1."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color="#b9b8b2", linewidth=1, linestyle=(0, (3, 3)))
        axes.plot(fpr, tpr, color=SERIES[0], linewidth=1.8, drawstyle="steps-post")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="1 − specificity", ylabel="Sensitivity", aspect="equal")

    told = f" with area {auc:.3f}" if auc is not None else ""
    return _chart([draw], f"ROC curve{told}.", (3.3, 3.2))


def histograms(columns: Mapping[str, Mapping[str, Sequence[float]]], alt: str) -> Picture:
    """One panel per entry of `columns` (named with its unit), one outline per series in it."""
    return _chart([_histogram(title, series) for title, series in columns.items()], alt)


def intensity_chart(curves: Mapping[str, Sequence[float]], percents: Sequence[float]) -> Picture:
    """Sorted intensities of each sampled case: one line per case, grey value over percentile."""

    def draw(axes: "Axes") -> None:
        for values in curves.values():
            axes.plot(percents, values, color=SERIES[0], linewidth=0.9, alpha=0.45)
        axes.set(xlabel="Percentile of the image's values", ylabel="Value", xlim=(0, 100))

    return _chart([draw], f"Intensity percentiles of {len(curves)} images.", (4.6, 2.7))


def interval_chart(items: Sequence[Mapping[str, Any]]) -> tuple[Picture, bytes]:
    """Items of an audit, one above the other: figure, interval, limit, and beyond it the side that fails, shaded.

    Args:
        items: each with `title`, `status`, `value`, `ci_low`, `ci_high` (or None), `limit` and `better`.

    Returns:
        The picture, and the SVG itself.
    """
    colours = {"pass": "#2c6b39", "fail": "#a1260d", "not assessable": "#8a5a00"}

    def draw(axes: "Axes") -> None:
        for row, item in enumerate(reversed(items)):
            limit, colour = float(item["limit"]), colours.get(str(item["status"]), SERIES[-1])
            bad = (-0.2, limit) if item["better"] == "above" else (limit, 1.2)
            axes.fill_between(bad, row - 0.36, row + 0.36, color="#f6e3de", linewidth=0)
            axes.plot([limit, limit], [row - 0.36, row + 0.36], color="#b07a6c", linewidth=1.2)
            if item.get("value") is None:
                axes.text(0.012, row, "not assessable", va="center", fontsize=7.5, color=colour, style="italic")
                continue
            value = float(item["value"])
            if item.get("ci_low") is not None and item.get("ci_high") is not None:
                axes.plot([item["ci_low"], item["ci_high"]], [row, row], color=colour, linewidth=2.4, alpha=0.55)
            axes.plot([value], [row], "o", color=colour, markersize=6)
            axes.annotate(f"{value:.2f}", (value, row), (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
        axes.set(
            xlim=(-0.03, 1.03), ylim=(-0.6, len(items) - 0.25), xlabel="Figure with its 95 % interval; shaded: fails"
        )
        axes.set_yticks(range(len(items)), [str(item["title"]) for item in reversed(items)])
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.spines["left"].set_visible(False)

    told = ", ".join(f"{item['title']}: {item['status']}" for item in items)
    return _chart_and_svg([draw], f"The items of the audit: {told}.", (7.4, 0.45 * len(items) + 0.75))


def reliability_chart(bins: Sequence[Mapping[str, float]]) -> Picture:
    """Share of the positive class over mean probability, one point a bin, larger with more cases."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color="#b9b8b2", linewidth=1, linestyle=(0, (3, 3)))
        most = max(found["n"] for found in bins)
        at, share = [found["probability"] for found in bins], [found["share"] for found in bins]
        axes.plot(at, share, color=SERIES[0], linewidth=1.2)
        axes.scatter(at, share, s=[12 + 60 * found["n"] / most for found in bins], color=SERIES[0], zorder=3)
        axes.set(
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
            xlabel="Probability",
            ylabel="Share that is positive",
            aspect="equal",
        )

    return _chart([draw], "Calibrated probability against the share of positive cases.", (3.3, 3.2))


def change_chart(name: str, exams: Sequence[Mapping[str, Any]], structures: Mapping[str, Mapping[str, Any]]) -> Picture:
    """Volumes of one patient over the years, one panel per structure.

    The band round the first volume is what repeated scans of an unchanged patient show; the line is the rate of change.

    Args:
        exams: `day` and `status` of each. structures: label to a change as in `changes.json`.
    """
    years = [(exam["day"] - exams[0]["day"]) / DAYS_PER_YEAR for exam in exams]
    flagged = [exam["status"] == "flagged" for exam in exams]
    told = "; ".join(f"{label}: {change['verdict']}" for label, change in structures.items())
    panels = [_volumes(years, flagged, label, change) for label, change in structures.items()]
    return _chart(panels, f"Volumes of {name} over {years[-1]:.2g} years. {told}.", (2.9, 2.35))


def _volumes(years: Sequence[float], flagged: Sequence[bool], label: str, change: Mapping[str, Any]) -> Draw:
    def draw(axes: "Axes") -> None:
        volumes, band, slope = change["volumes_ml"], change["band_ml"], change["per_year_ml"]
        colour = SERIES[1] if change["verdict"] == "beyond the noise" else SERIES[0]
        room = 0.06 * years[-1]
        if band is not None:
            axes.axhspan(volumes[0] - band, volumes[0] + band, color="#e9e7df", linewidth=0)
        axes.axhline(volumes[0], color="#b9b8b2", linewidth=0.8)
        if slope is not None:
            middle, mean = sum(years) / len(years), sum(volumes) / len(volumes)
            ends = [years[0], years[-1]]
            axes.plot(ends, [mean + slope * (t - middle) for t in ends], color=colour, linewidth=1.6)
        fills = ["white" if hollow else colour for hollow in flagged]
        axes.scatter(years, volumes, s=26, c=fills, edgecolors=colour, linewidths=1.3, zorder=3)
        axes.set(title=f"{label}\n{_rate(change)}", xlabel="Years", ylabel="Volume (ml)")
        axes.set_xlim(-room, years[-1] + room)
        axes.title.set_fontsize(8.5)
        low, high = min(*volumes, volumes[0] - (band or 0)), max(*volumes, volumes[0] + (band or 0))
        margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)

    return draw


def _rate(change: Mapping[str, Any]) -> str:
    rate, band = change["per_year_percent"], change["per_year_band_percent"]
    if rate is None:
        return "no rate"
    noise = f"noise ±{band:.1f}" if band is not None else "noise unknown"
    return f"{rate:+.1f} % per year, {noise}".replace("-", "\N{MINUS SIGN}")


def _lines(
    axes: "Axes", history: Sequence[Mapping[str, float]], names: Sequence[str], title: str, highest: float | None = None
) -> None:
    colours = dict(zip(("train_loss", "val_loss"), SERIES, strict=False))
    for number, name in enumerate(names):
        points = [(row["epoch"], row[name]) for row in history if name in row]
        if not points:
            continue
        label = name.removeprefix("val_dice_").removeprefix("val_") if len(names) > 2 or title != "Loss" else name
        label = {"train_loss": "training", "val_loss": "validation", "auc": "AUC"}.get(label, label)
        axes.plot(
            *zip(*points, strict=True), color=colours.get(name, SERIES[number % len(SERIES)]), linewidth=1.5,
            marker="o" if len(points) < 40 else None, markersize=2.6, label=label,
        )  # fmt: skip
    axes.set(title=title, xlabel="Epoch")
    axes.title.set_fontsize(9)
    if highest is not None:
        axes.set_ylim(top=max(highest, axes.get_ylim()[1]) if axes.get_ylim()[1] > highest else highest)
    if len(axes.lines) > 1:
        axes.legend(fontsize=7.5, loc="best")
    axes.margins(x=0.02)


def _histogram(title: str, series: Mapping[str, Sequence[float]]) -> Draw:
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        values = [value for numbers in series.values() for value in numbers]
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = (high - low) * 0.05 or max(abs(high) * 0.1, 0.5)
        for number, (name, numbers) in enumerate(series.items()):
            colour = SERIES[number % len(SERIES)]
            axes.hist(
                list(numbers), bins=24, range=(low - room, high + room), histtype="stepfilled", linewidth=1.4,
                label=name, facecolor=f"{colour}26", edgecolor=colour,
            )  # fmt: skip
        axes.set(title=title, ylabel="Cases")
        axes.title.set_fontsize(9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend(fontsize=7.5)

    return draw


def _chart(panels: Sequence[Draw], alt: str, panel_in: tuple[float, float] = _PANEL_IN) -> Picture:
    return _chart_and_svg(panels, alt, panel_in)[0]


def _chart_and_svg(
    panels: Sequence[Draw], alt: str, panel_in: tuple[float, float] = _PANEL_IN
) -> tuple[Picture, bytes]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(panel_in[0] * len(panels), panel_in[1]), layout="constrained")
        for number, draw in enumerate(panels):
            draw(figure.add_subplot(1, len(panels), number + 1))
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width_px = round(panel_in[0] * len(panels) * _PX_PER_IN)
    return Picture(data_uri(buffer.getvalue(), "image/svg+xml"), alt, width_px), buffer.getvalue()
