"""The HTML report of a load test: one file with its plots inside."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from src.serving.load_users import Answer, Usage

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Load test</title>
<style>body {{ font-family: sans-serif; max-width: 60em; margin: 2em auto }} img {{ width: 100% }}</style>
<h1>Load test</h1>
<ul>{about}</ul>
<pre>{table}</pre>
{plots}
</html>
"""


def write_report(path: Path, about: dict, table: str, answers: list[Answer], usage: Usage) -> None:
    """Write the page: ``about`` as a list, ``table`` as it was printed, and the plots."""
    items = "".join(f"<li>{html.escape(key)}: {html.escape(str(value))}</li>" for key, value in about.items())
    figures = {
        "Latency over time": plot_latencies(answers),
        "Latencies": plot_histogram(answers),
        "Requests a second": plot_rate(answers),
    }
    if usage.cpu:
        figures["Processor and memory of the server"] = plot_usage(usage)
    plots = "".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{as_base64(figure)}">'
        for title, figure in figures.items()
    )
    path.write_text(PAGE.format(about=items, table=html.escape(table), plots=plots))


def as_base64(figure: Figure) -> str:
    """The figure as a PNG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def new_axes(xlabel: str, ylabel: str):
    """Axes of a new figure that no window shows."""
    axes = Figure(figsize=(9, 3.2), layout="constrained").add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def plot_latencies(answers: list[Answer]) -> Figure:
    """Every answer as a dot; wrong ones in red."""
    axes = new_axes("seconds since the start", "latency, ms")
    for wrong, colour in ((False, "tab:blue"), (True, "tab:red")):
        some = [answer for answer in answers if bool(answer.fault) == wrong]
        axes.scatter([answer.at for answer in some], [1000 * answer.seconds for answer in some], s=4, color=colour)
    axes.set_ylim(bottom=0)
    return axes.figure


def plot_histogram(answers: list[Answer]) -> Figure:
    """How many answers took how long; the count on a logarithmic axis, so that the slow few are seen."""
    axes = new_axes("latency, ms", "answers")
    axes.hist([1000 * answer.seconds for answer in answers], bins=60)
    axes.set_yscale("log")
    return axes.figure


def plot_rate(answers: list[Answer]) -> Figure:
    """Requests that were sent in each second."""
    axes = new_axes("seconds since the start", "requests/s")
    counts = np.bincount([int(answer.at) for answer in answers])
    axes.step(range(len(counts)), counts, where="post")
    axes.set_ylim(bottom=0)
    return axes.figure


def plot_usage(usage: Usage) -> Figure:
    """Both over the samples: processor as a share of the machine, memory on the second axis."""
    axes = new_axes("sample", "processor, %")
    axes.plot([100 * share for share in usage.cpu], color="tab:blue")
    axes.set_ylim(0, 100)
    other = axes.twinx()
    other.plot([size / 1e6 for size in usage.bytes], color="tab:orange")
    other.set(ylabel="memory, MB")
    other.set_ylim(bottom=0)
    return axes.figure
