"""Charts drawn with Pillow: axes, lines, points, legends; and pages of images.

A `Canvas` is drawn at twice its size and halved at the end, so that lines and letters are smooth.
Coordinates are pixels of the finished picture, the origin top left. `Axes` map data to pixels;
`line_panel` and `scatter_panel` draw into a box (left, top, right, bottom) of a canvas;
`image_grid` makes a page of its own.

Colours are Okabe and Ito's eight (the yellow darkened), which colour-blind readers tell apart;
beyond eight the marker's shape changes too, so that no two of the first 40 look alike.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import replace_file

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#C9B800"]
SHAPES = ["circle", "square", "triangle", "diamond", "cross"]
INK, GRID, PALE = "#222222", "#E4E4E4", "#777777"
FACTOR = 2  # drawn at this scale, then averaged
SIDE, GAP, MARGIN = 64, 4, 16  # of an image in a grid, between images, around the page
Box = tuple[float, float, float, float]


def style(k: int) -> tuple[str, str]:
    """Colour and marker shape of the k-th series or class."""
    return COLOURS[k % len(COLOURS)], SHAPES[k // len(COLOURS) % len(SHAPES)]


# ---------------------------------------------------------------------------- text


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, `size` pixels high in the finished picture."""
    return ImageFont.load_default(size=size * FACTOR)


@lru_cache
def has_glyph(char: str) -> bool:
    """Can the font show this character? It draws all that it lacks as the same empty box."""
    if not char.isprintable():  # half a pair (of a damaged file name) stops some layout engines
        return False
    lacking = font(15).getmask("\uffff")  # no character, now and for ever
    return bytes(font(15).getmask(char)) != bytes(lacking)


def shown(text: str) -> str:
    """The text with escapes, such as \\u65e5, for the characters that the font lacks."""
    return "".join(char if has_glyph(char) else ascii(char)[1:-1] for char in text)


def text_width(text: str, size: int) -> float:
    """Pixels from the first letter to the last."""
    return font(size).getlength(shown(text)) / FACTOR


def shorten(text: str, size: int, room: float) -> str:
    """The text, escaped; if it is wider than `room` pixels, with dots in place of its middle, as
    names often differ at their end."""
    text = shown(text)
    cut, kept = text, len(text)
    while kept and text_width(cut, size) > room:
        kept -= 1
        cut = f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"
    return cut


# ---------------------------------------------------------------------------- canvas


class Canvas:
    """A white page, width x height pixels when finished."""

    def __init__(self, width: float, height: float):
        self.size = (math.ceil(width), math.ceil(height))
        self.image = Image.new("RGB", (self.size[0] * FACTOR, self.size[1] * FACTOR), "white")
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: list, colour: str, width: float = 1.0, dashed: bool = False) -> None:
        """A line through points [(x, y), ...]; dashed along its whole length."""
        scaled = [(FACTOR * x, FACTOR * y) for x, y in points]
        pieces = dashes(scaled, 9.0 * FACTOR, 6.0 * FACTOR) if dashed else [scaled]
        for piece in pieces:
            self.draw.line(piece, colour, round(FACTOR * width), joint="curve")

    def text(
        self, at: tuple, text: str, size: int = 15, anchor: str = "mm", room: float = math.inf
    ) -> None:
        """Text at (x, y), shortened to `room` pixels; anchor as in Pillow: l m r, then t m b."""
        text = shorten(text, size, room)
        self.draw.text((FACTOR * at[0], FACTOR * at[1]), text, INK, font(size), anchor=anchor)

    def upright(self, at: tuple, text: str, size: int = 15) -> None:
        """Text turned by 90 degrees, reading upwards, its middle at (x, y)."""
        text = shown(text)
        left, top, right, bottom = font(size).getbbox(text)
        label = Image.new("RGB", (round(right - left) + 8, round(bottom - top) + 8), "white")
        ImageDraw.Draw(label).text((4 - left, 4 - top), text, INK, font(size))
        label = label.rotate(90, expand=True)
        x, y = FACTOR * at[0] - label.width / 2, FACTOR * at[1] - label.height / 2
        self.image.paste(label, (round(x), round(y)))

    def marker(self, at: tuple, colour: str, shape: str = "circle", radius: float = 4.0) -> None:
        """One point."""
        x, y, r = FACTOR * at[0], FACTOR * at[1], FACTOR * radius
        if shape == "circle":
            self.draw.ellipse((x - r, y - r, x + r, y + r), colour)
        elif shape == "square":
            self.draw.rectangle((x - r, y - r, x + r, y + r), colour)
        elif shape == "triangle":
            self.draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], colour)
        elif shape == "diamond":
            self.draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], colour)
        else:
            pen = max(2, round(r / 2))
            self.draw.line((x - r, y - r, x + r, y + r), colour, pen)
            self.draw.line((x - r, y + r, x + r, y - r), colour, pen)

    def frame(self, box: Box, colour: str = INK, width: float = 1.0) -> None:
        """The outline of a box."""
        corners = [FACTOR * edge for edge in box]
        self.draw.rectangle(corners, outline=colour, width=round(FACTOR * width))

    def paste(self, pixels: np.ndarray, at: tuple, scale: int) -> None:
        """An image, uint8 (C, H, W), its top left at (x, y), each pixel scale x scale. It starts at
        a whole pixel, so that halving the page gives its own values."""
        pixels = np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)
        big = pixels.repeat(scale * FACTOR, 0).repeat(scale * FACTOR, 1)
        self.image.paste(Image.fromarray(big), (FACTOR * round(at[0]), FACTOR * round(at[1])))

    def save(self, path: Path) -> None:
        """Halve and write a PNG, whole or not at all."""
        page = self.image.reduce(FACTOR)
        replace_file(path, lambda to: page.save(to, format="PNG", optimize=True))


def dashes(points: list, on: float, off: float) -> list[list]:
    """Cut a polyline into dashes of length `on` with gaps `off`, carried on around corners."""
    pieces, piece, left, drawing = [], [points[0]], on, True
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - done > left:
            done += left
            cut = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if drawing:
                pieces.append([*piece, cut])
            piece, drawing = [cut], not drawing
            left = on if drawing else off
        left -= length - done
        piece.append((x1, y1))
    return [*pieces, piece] if drawing and len(piece) > 1 else pieces


# ---------------------------------------------------------------------------- axes


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that lie in low .. high."""
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in low .. high; 1, 2, 5 times them and more where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [m * 10.0**p for p in powers for m in multiples]
        ticks = [v for v in ticks if low * 0.999 <= v <= high * 1.001]
        if len(ticks) >= 3:
            return ticks
    return nice_ticks(low, high)


def tick_label(value: float) -> str:
    """A tick's number, short."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.6g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def padded(values: list[float], log: bool, margin: float = 0.04) -> tuple[float, float]:
    """A range that holds the values with a little room; never empty."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** margin if high > low else 1.5
        return low / room, high * room
    room = margin * (high - low) if high > low else max(1e-3, abs(high) * 0.1)
    return low - room, high + room


@dataclass
class Axes:
    """The map from data to pixels: x_range to the box's width, y_range to its height, upwards."""

    box: Box
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Where a data point lies on the canvas."""
        left, top, right, bottom = self.box
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        if self.log_y:
            y, y0, y1 = math.log(y), math.log(y0), math.log(y1)
        u, w = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + u * (right - left), bottom - w * (bottom - top)

    def draw(
        self, canvas: Canvas, title: str, x_label: str, y_label: str, x_ticks: dict | None = None
    ) -> None:
        """Grid, ticks, their numbers, labels and title around the box; x_ticks {x: text}."""
        left, top, right, bottom = self.box
        for x, text in (x_ticks or {x: tick_label(x) for x in nice_ticks(*self.x_range)}).items():
            at = self.pixel(x, self.y_range[0])[0]
            canvas.line([(at, top), (at, bottom)], GRID)
            canvas.line([(at, bottom), (at, bottom + 5)], INK)
            canvas.text((at, bottom + 9), text, 13, "mt")
        for y in (log_ticks if self.log_y else nice_ticks)(*self.y_range):
            at = self.pixel(self.x_range[0], y)[1]
            canvas.line([(left, at), (right, at)], GRID)
            canvas.line([(left - 5, at), (left, at)], INK)
            canvas.text((left - 9, at), tick_label(y), 13, "rm")
        canvas.frame(self.box)
        canvas.text(((left + right) / 2, top - 18), title, 16, room=right - left + 60)
        canvas.text(((left + right) / 2, bottom + 40), x_label, 14)
        canvas.upright((left - 62, (top + bottom) / 2), y_label, 14)


# ---------------------------------------------------------------------------- panels


@dataclass
class Series:
    """One line of a chart."""

    name: str  # "" leaves it out of the legend
    x: list[float]
    y: list[float]
    colour: str
    dashed: bool = False
    width: float = 2.0
    shape: str | None = "circle"  # None: no markers


def line_panel(
    canvas: Canvas,
    box: Box,
    series: list[Series],
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    x_ticks: dict[float, str] | None = None,
) -> Axes:
    """Lines in a box, the legend to its right; returns the axes. Needs one point at least; log_y
    is for values that are all above 0, and else left out."""
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in s.y]
    log_y = log_y and min(ys) > 0
    axes = Axes(box, padded(xs, False, 0.02), padded(ys, log_y), log_y)
    axes.draw(canvas, title, x_label, y_label, x_ticks)
    for s in series:
        points = [axes.pixel(x, y) for x, y in zip(s.x, s.y)]
        if len(points) > 1:
            canvas.line(points, s.colour, s.width, s.dashed)
        for point in points if s.shape or len(points) == 1 else ():  # one point is no line
            canvas.marker(point, s.colour, s.shape or SHAPES[0], 1.5 + s.width)
    named = [s for s in series if s.name]
    left, top = box[2] + 18, box[1] + 10
    for k, s in enumerate(named):
        y = top + 24 * k
        canvas.line([(left, y), (left + 34, y)], s.colour, s.width, s.dashed)
        if s.shape:
            canvas.marker((left + 17, y), s.colour, s.shape, 1.5 + s.width)
        canvas.text((left + 42, y), s.name, 14, "lm")
    return axes


def scatter_panel(
    canvas: Canvas, box: Box, points: np.ndarray, labels: np.ndarray, title: str, radius: float
) -> Axes:
    """Points (N, 2) coloured by label (N,) in a box, equal scales; no ticks, as t-SNE's axes have
    no unit. Drawn in a mixed order, so that no class hides the others."""
    middle = (points.max(0) + points.min(0)) / 2
    half = 1.04 * max((points.max(0) - points.min(0)).max() / 2, 1e-9)
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    reach = (half * max(1, wide / high), half * max(1, high / wide))
    axes = Axes(box, *[(m - r, m + r) for m, r in zip(middle, reach)])
    for k in np.random.default_rng(0).permutation(len(points)):
        canvas.marker(axes.pixel(*points[k]), *style(int(labels[k])), radius)
    canvas.frame(box, PALE)
    canvas.text(((left + right) / 2, top - 14), title, 15, room=wide)
    return axes


def class_legend(canvas: Canvas, at: tuple, names: list[str], rows: int = 40, wide: float = 160):
    """The marker and name of each class from (x, y) on, `rows` of them below one another, then a
    new column `wide` pixels to the right. Longer names are shortened."""
    for k, name in enumerate(names):
        x, y = at[0] + k // rows * wide, at[1] + k % rows * 22
        canvas.marker((x, y), *style(k), 5)
        canvas.text((x + 14, y), name, 14, "lm", room=wide - 24)


def image_grid(
    rows: list[tuple[str, np.ndarray]], heads: list[str], path: Path, title: str = ""
) -> None:
    """A page of images: one row for each (label, uint8 (n, C, S, S)), a head above each column.

    Small images are enlarged by a whole factor to about 64 pixels. An empty head is left out, and
    so are the labels' column, the line of heads and the title where all of them are empty.
    """
    scale = max(1, round(SIDE / rows[0][1].shape[-1]))
    side = scale * rows[0][1].shape[-1]
    columns = max(len(images) for _, images in rows)
    pitch = math.ceil(max([side, *(text_width(head, 14) for head in heads)])) + GAP
    labels = max(text_width(name, 14) for name, _ in rows)
    left = MARGIN + (labels + 10 if labels else 0)
    top = MARGIN + (30 if title else 0) + (24 if any(heads) else 0)
    width = max(left + columns * pitch - GAP, MARGIN + text_width(title, 16)) + MARGIN
    canvas = Canvas(width, top + len(rows) * (side + GAP) - GAP + MARGIN)
    canvas.text((MARGIN, MARGIN), title, 16, "lt")
    for k, head in enumerate(heads):
        canvas.text((left + k * pitch + side / 2, top - 14), head, 14)
    for r, (name, images) in enumerate(rows):
        y = top + r * (side + GAP)
        canvas.text((left - 10, y + side / 2), name, 14, "rm")
        for k, image in enumerate(images):
            canvas.paste(image, (left + k * pitch, y), scale)
    canvas.save(path)
