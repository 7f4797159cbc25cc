"""Samples as pictures: image grids with pillow, points with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from teachers.space import DataSpace

COLOURS = ("#2a6f97", "#d1495b", "#6a994e", "#8d6a9f", "#edae49", "#333333")


def png(figure: Figure) -> bytes:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def compare(rows: Mapping[str, Tensor], space: DataSpace) -> bytes:
    """PNG of samples from the same noise, a labelled row an entry ``[n, *shape]``: column i is noise i throughout.

    Images stand side by side; points of the plane are scattered; other vectors are drawn as curves over their index.
    """
    if space.is_image:
        return png(_image_rows(rows, space))
    return png(_vectors(rows))


def grid(x: Tensor, space: DataSpace) -> bytes:
    """PNG of samples ``[n, *shape]`` as one block, images enlarged to about 64 pixels."""
    if not space.is_image:
        return compare({"samples": x}, space)
    buffer = io.BytesIO()
    pixels = space.pixels(x)
    columns = min(8, len(pixels))
    pixels = torch.cat([pixels, pixels.new_zeros(-len(pixels) % columns, *space.shape)])  # the last row may not be full
    rows = [torch.cat(list(row), dim=-1) for row in pixels.split(columns)]
    image = _image(torch.cat(rows, dim=-2))
    scale = max(1, 64 // space.shape[-1])
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def _image(pixels: Tensor) -> Image.Image:
    array = pixels.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def _image_rows(rows: Mapping[str, Tensor], space: DataSpace) -> Figure:
    n = max(len(x) for x in rows.values())
    figure = Figure(figsize=(0.8 * n + 1.6, 0.85 * len(rows)))
    axes: Any = figure.subplots(len(rows), n, squeeze=False)
    for row, (name, x) in enumerate(rows.items()):
        for column in range(n):
            axis = axes[row][column]
            axis.set_axis_off()
            if column < len(x):
                pixels = _image(space.pixels(x[column]))
                axis.imshow(pixels, cmap="gray" if space.shape[0] == 1 else None, vmin=0, vmax=255)
        axes[row][0].text(-0.15, 0.5, name, transform=axes[row][0].transAxes, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    return figure


def _vectors(rows: Mapping[str, Tensor]) -> Figure:
    figure = Figure(figsize=(3.2 * len(rows), 3.2))
    axes: Any = figure.subplots(1, len(rows), squeeze=False, sharex=True, sharey=True)
    for axis, (name, x) in zip(axes[0], rows.items(), strict=True):
        flat = x.flatten(1).numpy()
        if flat.shape[1] == 2:
            axis.scatter(flat[:, 0], flat[:, 1], s=2, alpha=0.4, color=COLOURS[0], linewidths=0)
            axis.set_aspect("equal")
        elif flat.shape[1] == 1:
            axis.hist(flat[:, 0], bins=60, color=COLOURS[0])
        else:
            axis.plot(flat[:32].T, color=COLOURS[0], alpha=0.4, linewidth=0.8)
        axis.set_title(name, fontsize=10)
    return figure


def _text(name: str) -> str:
    # matplotlib reads $ as mathematics and hides labels that begin with an underscore
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> bytes:
    """PNG of named curves (xs, ys) with horizontal `levels`."""
    figure = Figure(figsize=(6.4, 3.6))
    axis: Any = figure.subplots()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        style = {"marker": "o"} if len(xs) < 20 else {"linewidth": 1.0}
        axis.plot(xs, ys, label=_text(name), color=COLOURS[i % len(COLOURS)], **style)
    for i, (name, level) in enumerate((levels or {}).items()):
        axis.axhline(level, label=_text(name), color="#555555", linestyle=("--", ":", "-.")[i % 3], linewidth=1.2)
    if log_x:
        axis.set_xscale("log", base=2)
        ticks = sorted({x for xs, _ in series.values() for x in xs})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    if log_y:
        axis.set_yscale("log")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return png(figure)
