"""Draws docs/figures/*.svg, one figure a method; with --check, says whether the files are up to date.

Plain SVG, so that the same files come out on every machine: no plotting library, no fonts, no dates. A figure is 480
wide with text of 13 and more, which can be read on a telephone. Its white card can be read in the dark.
"""

import math
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "figures"
WIDTH = 480
INK, MUTED, LINE, PALE, WHITE = "#1b1f24", "#57606a", "#8c959f", "#eaeef2", "#ffffff"
BLUE, ORANGE, GREEN = "#1a6fb5", "#c4570a", "#1a7f5a"
LIGHT = {BLUE: "#cfe4f7", ORANGE: "#fbe0cc", GREEN: "#cdeede", PALE: PALE, WHITE: WHITE}


class Figure:
    """The elements of one picture, from the top left corner."""

    def __init__(self, height: int, title: str) -> None:
        """A white card with a title for those who cannot see it."""
        self.height, self.title = height, title
        self.parts: list[str] = []

    def add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        """One element; an underscore in an attribute's name is a hyphen."""
        given = " ".join(f'{name.replace("_", "-")}="{_short(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{tag} {given}/>" if text is None else f"<{tag} {given}>{escape(text)}</{tag}>")

    def text(self, x: float, y: float, words: str, size: int = 14, at: str = "middle", **more: object) -> None:
        """A line of text; y is its baseline."""
        self.add("text", words, x=x, y=y, font_size=size, text_anchor=at, **({"fill": INK} | more))

    def code(self, x: float, y: float, words: str, size: int = 13, at: str = "middle", **more: object) -> None:
        """A line of an equation."""
        self.text(x, y, words, size, at, font_family="ui-monospace, Menlo, Consolas, monospace", **more)

    def bar(self, x: float, y: float, w: float, h: float, colour: str, **more: object) -> None:
        """A rectangle."""
        edge = LINE if colour in (PALE, WHITE) else colour
        self.add("rect", x=x, y=y, width=w, height=h, fill=LIGHT[colour], stroke=edge, **more)

    def box(self, x: float, y: float, w: float, h: float, colour: str, words: str = "", size: int = 14) -> None:
        """A box with a line of text in it."""
        self.bar(x, y, w, h, colour, rx=4)
        if words:
            self.text(x + w / 2, y + h / 2 + size * 0.36, words, size)

    def matrix(
        self, x: float, y: float, columns: int, rows: int, cell: float, used: Callable[[int, int], str]
    ) -> tuple[float, float]:
        """A matrix of cells, coloured by `used(column, row)`; its width and height."""
        for row in range(rows):
            for column in range(columns):
                self.bar(x + column * cell, y + row * cell, cell, cell, used(column, row))
        return columns * cell, rows * cell

    def line(
        self, points: Iterable[tuple[float, float]], colour: str = MUTED, arrow: bool = False, **more: object
    ) -> None:
        """A line through points, with an arrow's head at the last one if wanted."""
        along = list(points)
        path = " ".join(f"{_short(x)},{_short(y)}" for x, y in along)
        self.add("polyline", points=path, fill="none", stroke=colour, **({"stroke_width": 1.5} | more))
        if arrow:
            (x0, y0), (x1, y1) = along[-2:]
            angle = math.atan2(y1 - y0, x1 - x0)
            head = [(x1 - 8 * math.cos(angle + turn), y1 - 8 * math.sin(angle + turn)) for turn in (0.45, -0.45)]
            tip = " ".join(f"{_short(x)},{_short(y)}" for x, y in [(x1, y1), *head])
            self.add("polygon", points=tip, fill=colour)

    def svg(self) -> str:
        """The file."""
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        card = (
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{self.height - 2}" rx="8" fill="#ffffff" stroke="#d0d7de"/>'
        )
        font = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{font}">'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", card, *self.parts, "</svg>", ""])


def _short(value: object) -> str:
    """A number without a tail of rounding."""
    return f"{round(value, 1):g}" if isinstance(value, float) else escape(str(value))


def ranks() -> Figure:
    """What rank 2 of an update of rank 4 is: by singular components, and by prefix."""
    figure = Figure(400, "Rank 2 of a LoRA update of rank 4, cut by singular components and by prefix")
    cell, middle = 17, 110
    figure.text(20, 30, 'truncation="svd", the default', 15, "start", font_weight="bold")
    figure.matrix(30, 50, 4, 7, cell, lambda *_: BLUE)
    figure.matrix(128, middle - 2 * cell, 4, 4, cell, lambda c, _: ORANGE if c < 2 else PALE)
    figure.matrix(226, middle - 2 * cell, 4, 4, cell, lambda _, r: ORANGE if r < 2 else PALE)
    figure.matrix(324, middle - 2 * cell, 8, 4, cell, lambda *_: BLUE)
    for x, name in ((64, "B"), (162, "E"), (260, "F"), (392, "A")):
        figure.text(x, 190, name)
    figure.text(20, 214, "All of B and A are in use. E and F pick the two leading", 13, "start", fill=MUTED)
    figure.text(20, 231, "singular components of B A, and are made from B and A.", 13, "start", fill=MUTED)
    figure.line([(20, 245), (460, 245)], "#d0d7de")
    figure.text(20, 270, 'truncation="prefix", the paper\'s', 15, "start", font_weight="bold")
    figure.matrix(30, 285, 4, 5, cell, lambda c, _: BLUE if c < 2 else PALE)
    figure.matrix(128, 293, 8, 4, cell, lambda _, r: BLUE if r < 2 else PALE)
    figure.text(64, 387, "B")
    figure.text(196, 387, "A")
    for number, words in enumerate(
        ("Two columns of B and", "two rows of A are in use.", "Training decides what", "the first ones are.")
    ):
        figure.text(285, 308 + 18 * number, words, 13, "start", fill=MUTED)
    return figure


def mixer() -> Figure:
    """The products of rows of A and columns of B, in LoRA and in MoSLoRA."""
    figure = Figure(300, "LoRA joins each row of A with one column of B; MoSLoRA's mixer joins each with all")
    for left, name, formula, joined in ((40, "LoRA", "B A", False), (270, "MoSLoRA", "B M A", True)):
        figure.text(left + 85, 32, name, 15, font_weight="bold")
        for i in range(4):
            for j in range(4):
                if joined or i == j:
                    width = 1 + (i * 3 + j * 5) % 4 if joined else 2.5
                    ends = [(left + 44, 75 + 40 * i), (left + 126, 75 + 40 * j)]
                    figure.line(ends, ORANGE if joined else MUTED, stroke_width=width, stroke_opacity=0.75)
        for i in range(4):
            figure.box(left, 60 + 40 * i, 44, 30, BLUE, f"a{'₁₂₃₄'[i]}")
            figure.box(left + 126, 60 + 40 * i, 44, 30, BLUE, f"b{'₁₂₃₄'[i]}")
        figure.code(left + 85, 242, formula, 15)
    figure.text(240, 270, "a: rows of A. b: columns of B. Each line is a product b a.", 13, fill=MUTED)
    figure.text(240, 288, "M holds a trained weight for each of the 16 lines.", 13, fill=MUTED)
    return figure


def scales() -> Figure:
    """The stacked factors of two sources, and omega over B."""
    figure = Figure(330, "Two sources stacked: A has their rows, B their columns, each scaled by its source's omega")
    cell, top = 20, 70
    sources = ((2, BLUE, "₁"), (3, GREEN, "₂"))
    figure.text(20, 30, "trained", 14, "start", fill=ORANGE, font_weight="bold")
    figure.text(20, 48, "all else is as it was", 13, "start", fill=MUTED)
    x, y = 190, top
    for number, (rank, colour, index) in enumerate(sources):
        left = 30 + 44 * number
        figure.matrix(left, top, 1, 7, cell, lambda *_: ORANGE)
        figure.text(left + cell / 2, top + 164, f"ω{index}", 15)
        figure.matrix(x, top, rank, 7, cell, lambda *_, colour=colour: colour)
        figure.text(x + rank * cell / 2, top + 164, f"B{index}", 15)
        figure.matrix(340, y, 5, rank, cell, lambda *_, colour=colour: colour)
        figure.text(340 + 5 * cell + 16, y + rank * cell / 2 + 5, f"A{index}", 15)
        x, y = x + rank * cell, y + rank * cell
    figure.text(142, top + 66, "scale", 13)
    figure.text(142, top + 84, "rows of", 13)
    figure.text(315, top + 75, "×", 16)
    figure.text(240, 268, "One LoRA: its rank is the sum of the sources' ranks, here 2 + 3.", 13, fill=MUTED)
    figure.text(240, 288, "Each ω has a number for each row of B, or one for all.", 13, fill=MUTED)
    figure.text(240, 308, "After training ω is multiplied into B.", 13, fill=MUTED)
    return figure


def tensor_train() -> Figure:
    """A matrix and the cores that make it."""
    shape, rank = (8, 8, 12, 8, 8), 5
    sizes = [(1 if i == 0 else rank, k, 1 if i == 4 else rank) for i, k in enumerate(shape)]
    numbers = [math.prod(size) for size in sizes]
    figure = Figure(300, "A matrix of 768 x 64 numbers as a train of five cores with 780 numbers")
    figure.box(140, 24, 200, 56, PALE, "768 × 64 matrix", 15)
    figure.text(240, 98, f"{768 * 64:,} numbers", 13, fill=MUTED)
    figure.line([(240, 108), (240, 132)], arrow=True)
    figure.text(252, 126, "is the product of the cores", 13, "start", fill=MUTED)
    for i, ((before, k, after), count) in enumerate(zip(sizes, numbers, strict=True)):
        x = 20 + 92 * i
        if i < 4:
            figure.line([(x + 72, 170), (x + 92, 170)], BLUE, stroke_width=2.5)
            figure.text(x + 82, 160, str(rank), 13, fill=BLUE)
        figure.box(x, 146, 72, 48, BLUE, f"{before}×{k}×{after}")
        figure.line([(x + 36, 194), (x + 36, 212)], MUTED)
        figure.text(x + 36, 226, str(k), 14, font_weight="bold")
        figure.text(x + 36, 246, f"{count}", 13, fill=MUTED)
    figure.text(240, 270, f"8 · 8 · 12 · 8 · 8 = {math.prod(shape):,}, the entries of the matrix.", 13, fill=MUTED)
    figure.text(240, 288, f"The cores hold {' + '.join(map(str, numbers))} = {sum(numbers)} numbers.", 13, fill=MUTED)
    return figure


def loretta() -> Figure:
    """Where the trains are, in LoRETTA_rep and in LoRETTA_adp."""
    figure = Figure(392, "LoRETTA_rep adds an update beside a weight; LoRETTA_adp puts adapters after blocks")
    figure.text(110, 30, "LoRETTA_rep", 15, font_weight="bold")
    figure.text(110, 372, "x", 15)
    figure.line([(110, 356), (110, 330), (65, 330), (65, 300)], arrow=True)
    figure.line([(110, 330), (160, 330), (160, 300)], arrow=True)
    figure.box(25, 140, 80, 160, PALE, "W₀")
    figure.box(120, 250, 80, 50, BLUE, "TT_A")
    figure.line([(160, 250), (160, 230)], arrow=True)
    figure.box(120, 180, 80, 50, BLUE, "TT_B")
    figure.line([(160, 180), (160, 165)])
    figure.text(160, 158, "× α / width", 13)
    figure.text(205, 245, "width", 13, "end", fill=MUTED)
    figure.line([(65, 140), (65, 110), (98, 110)], arrow=True)
    figure.line([(160, 144), (160, 110), (122, 110)], arrow=True)
    figure.add("circle", cx=110, cy=110, r=12, fill="#ffffff", stroke=INK)
    figure.text(110, 115, "+", 15)
    figure.line([(110, 98), (110, 62)], arrow=True)
    figure.text(110, 54, "y", 15)
    figure.line([(228, 20), (228, 372)], "#d0d7de")
    figure.text(352, 30, "LoRETTA_adp", 15, font_weight="bold")
    steps = ("attention", "adapter", "+ and norm", "feed-forward", "adapter", "+ and norm")
    for number, words in enumerate(steps):
        colour = ORANGE if words == "adapter" else PALE
        y = 324 - 42 * number
        figure.line([(305, y + 44), (305, y + 28)], arrow=True)
        figure.box(248, y, 114, 28, colour, words, 13)
    figure.line([(305, 114), (305, 90)], arrow=True)
    figure.text(420, 104, "an adapter", 13, fill=ORANGE)
    for number, words in enumerate(("TT up", "ReLU", "TT down")):
        figure.box(385, 122 + 38 * number, 70, 26, BLUE if "TT" in words else PALE, words, 13)
        if number:
            figure.line([(420, 122 + 38 * number), (420, 110 + 38 * number)])
    frame = [(362, 170), (372, 171), (377, 112), (465, 112), (465, 234), (377, 234), (372, 171)]
    figure.line(frame, ORANGE, stroke_dasharray="4 3")
    figure.text(420, 256, "h + up(ReLU(", 13, fill=MUTED)
    figure.text(420, 273, "down(h)))", 13, fill=MUTED)
    return figure


def adapter() -> Figure:
    """One adapter of LoRETTA_adp behind a block, with the cores of its two trains and their sizes."""
    shape, rank = (8, 8, 12, 8, 8), 5
    sizes = [(1 if i == 0 else rank, k, 1 if i == 4 else rank) for i, k in enumerate(shape)]
    cores, biases = sum(math.prod(size) for size in sizes), 768 + 64
    figure = Figure(384, "An adapter of LoRETTA_adp: down from 768 to 64 and up again, each a train of five cores")
    figure.text(105, 30, "behind a block", 15, font_weight="bold")
    figure.text(350, 30, "its two trains", 15, font_weight="bold")
    figure.line([(222, 20), (222, 318)], "#d0d7de")
    figure.line([(75, 320), (75, 302)], arrow=True)
    figure.box(20, 270, 110, 32, PALE, "attention", 13)
    figure.line([(75, 270), (75, 226)], arrow=True)
    figure.text(84, 262, "h, 768 wide", 13, "start", fill=MUTED)
    figure.line([(75, 244), (195, 244), (195, 82), (89, 82)], arrow=True)
    # Narrow in the middle, as the states are
    for top, below, above, words in ((192, 55, 27, "down"), (110, 27, 55, "up")):
        corners = [(75 - below, top + 34), (75 + below, top + 34), (75 + above, top), (75 - above, top)]
        points = " ".join(f"{x},{y}" for x, y in corners)
        figure.add("polygon", points=points, fill=LIGHT[BLUE], stroke=BLUE)
        figure.text(75, top + 22, words, 13)
    figure.line([(75, 192), (75, 144)])
    figure.box(50, 157, 50, 22, WHITE, "ReLU", 13)
    figure.text(110, 173, "64 wide", 13, "start", fill=MUTED)
    figure.line([(75, 110), (75, 94)], arrow=True)
    figure.add("circle", cx=75, cy=82, r=12, fill="#ffffff", stroke=INK)
    figure.text(75, 87, "+", 15)
    figure.line([(75, 70), (75, 46)], arrow=True)
    for top, words in ((72, "up: 64 to 768"), (192, "down: 768 to 64")):
        figure.text(240, top, words, 14, "start")
        for number, k in enumerate(shape):
            x = 240 + 46 * number
            if number:
                figure.line([(x - 12, top + 27), (x, top + 27)], BLUE, stroke_width=2.5)
            figure.box(x, top + 12, 34, 30, BLUE, str(k))
        figure.text(240, top + 62, f"{cores} numbers, not {768 * 64:,}", 13, "start", fill=MUTED)
    figure.text(240, 290, "A line between two cores: rank 5.", 13, "start", fill=MUTED)
    total = f"The adapter has {2 * cores + biases:,} numbers: 2 × {cores}, and {biases} of two biases."
    figure.text(240, 346, total, 13, fill=MUTED)
    figure.text(240, 366, "The feed-forward block gets one of its own. The block stays as it was.", 13, fill=MUTED)
    return figure


def cut() -> Figure:
    """One rank for all modules, and one budget."""
    figure = Figure(420, "Components of three modules, kept by one rank for all, and by one budget for all")
    modules = {
        "q_proj": (9.5, 8, 6.5, 5.2, 2.2, 1),
        "v_proj": (7.2, 2.4, 1.2, 0.8, 0.5, 0.3),
        "up_proj": (8.6, 5.8, 2.9, 1.8, 1, 0.6),
    }
    order = sorted((-height, name, i) for name, heights in modules.items() for i, height in enumerate(heights))
    chosen = {(name, i) for _, name, i in order[:6]}
    limit = -(order[5][0] + order[6][0]) / 2
    for top, title, kept in (
        (30, "One rank for all modules: 2, 2, 2", {(name, i) for name in modules for i in range(2)}),
        (205, "One budget of six components for all modules", chosen),
    ):
        figure.text(20, top, title, 15, "start", font_weight="bold")
        base = top + 120
        for number, (name, heights) in enumerate(modules.items()):
            left = 30 + 150 * number
            for i, height in enumerate(heights):
                colour = BLUE if (name, i) in kept else PALE
                figure.bar(left + 20 * i, base - 10 * height, 15, 10 * height, colour)
            figure.text(left + 58, base + 18, f"{name}: {sum(each == name for each, _ in kept)}", 13)
        if kept is chosen:
            figure.line([(20, base - 10 * limit), (460, base - 10 * limit)], ORANGE, stroke_dasharray="5 4")
    for number, words in enumerate(
        (
            "Height: what a component is worth per number (made up here).",
            "Without data this is its squared singular value. With moments",
            "of a few batches it is what dropping it would do to the loss.",
        )
    ):
        figure.text(20, 368 + 18 * number, words, 13, "start", fill=MUTED)
    return figure


def exits() -> Figure:
    """The layers of a model, four exits, and the head that they share."""
    figure = Figure(340, "Exits after 12, 18, 24 and 30 layers share the model's own norm and head")
    figure.text(352, 318, "tokens", 14)
    spans, tops = ("layers 1 to 12", "13 to 18", "19 to 24", "25 to 30"), (244, 186, 128, 70)
    figure.line([(352, 302), (352, 284)], arrow=True)
    for number, (words, top) in enumerate(zip(spans, tops, strict=True)):
        figure.box(282, top, 140, 40, PALE, words)
        depth = 12 + 6 * number
        if number:
            figure.line([(352, top + 58), (352, top + 40)], arrow=True)
        y = top - 8
        figure.line([(352, top), (352, y), (206, y)], BLUE, arrow=True)
        figure.text(276, y - 5, f"exit {depth}", 13, "end", fill=BLUE)
        figure.line([(118, y), (92, y)], BLUE, arrow=True)
        figure.text(86, y + 5, f"loss {depth}", 14, "end")
    figure.box(118, 36, 88, 226, ORANGE)
    figure.text(162, 142, "final norm", 14)
    figure.text(162, 160, "and head", 14)
    figure.text(20, 298, "The training loss is the", 13, "start", fill=MUTED)
    figure.text(20, 316, "weighted mean of the four.", 13, "start", fill=MUTED)
    figure.text(162, 26, "one for all exits", 13, fill=ORANGE)
    return figure


def density() -> Figure:
    """The surrogates of the count, and what a cut leaves to compute."""
    figure = Figure(440, "How an activation counts in the density loss, and what a cut leaves to compute")
    figure.text(20, 28, "How much an activation a counts", 15, "start", font_weight="bold")
    left, base, high, unit = 60, 178, 110, 60
    figure.line([(left, base - high - 12), (left, base), (400, base)], MUTED)
    for share, words in ((0, "0"), (1, "1")):
        figure.text(left - 10, base - high * share + 5, words, 13, "end")
    for number in range(6):
        figure.text(left + unit * number, base + 18, str(number), 13)
    figure.text(420, base + 18, "|a| / √eps", 13)
    curves = (
        (BLUE, "rational", lambda a: a * a / (a * a + 1), "none"),
        (GREEN, "tanh", math.tanh, "7 3"),
        (ORANGE, "hinge", lambda a: min(1.0, a), "2 3"),
    )
    for number, (colour, name, value, dashes) in enumerate(curves):
        points = [(left + unit * i / 20, base - high * value(i / 20)) for i in range(106)]
        figure.line(points, colour, stroke_width=2.5, stroke_dasharray=dashes)
        figure.line(
            [(290, 110 + 20 * number), (320, 110 + 20 * number)], colour, stroke_width=2.5, stroke_dasharray=dashes
        )
        figure.text(328, 115 + 20 * number, name, 13, "start")
    figure.line([(20, 212), (460, 212)], "#d0d7de")
    figure.text(20, 238, "What is left under a cut", 15, "start", font_weight="bold")
    values = (14, 46, -8, 22, 5, -12, 62, -16, 9, 38, 12, -6, 3, 54, 10, -14)
    zero, limit = 318, 18
    figure.add("rect", x=20, y=zero - limit, width=330, height=2 * limit, fill=LIGHT[ORANGE], fill_opacity=0.6)
    figure.text(356, zero + 5, "|a| ≤ t is 0", 13, "start", fill=ORANGE)
    for number, value in enumerate(values):
        colour = BLUE if abs(value) > limit else PALE
        x = 24 + 20.5 * number
        figure.bar(x, min(zero, zero - value), 14, abs(value), colour)
        figure.bar(x, 358, 14, 52, colour)
    figure.text(356, 380, "columns of the", 13, "start")
    figure.text(356, 397, "down-projection", 13, "start")
    figure.text(20, 430, "On a CPU, sparse_inference reads the blue columns only.", 13, "start", fill=MUTED)
    return figure


def rollout() -> Figure:
    """The tokens of one row of a rollout, and where its reward stands."""
    figure = Figure(400, "One row of a PPO rollout: the score stands on the last token of the completion")
    tokens = ("Is it", "good?", "I", "liked", "it", "EOS", "pad", "pad")
    xs = [88 + 48 * i for i in range(8)]
    figure.text(12, 80, "tokens", 13, "start")
    for number, (x, word) in enumerate(zip(xs, tokens, strict=True)):
        if number > 5:
            figure.box(x, 60, 44, 30, WHITE)
            figure.text(x + 22, 80, word, 13, fill=MUTED)
        else:
            figure.box(x, 60, 44, 30, PALE if number < 2 else BLUE, word, 13)
    for first, last, words in ((0, 1, "prompt"), (2, 5, "completion, sampled"), (6, 7, "padding")):
        figure.line([(xs[first], 52), (xs[first], 46), (xs[last] + 44, 46), (xs[last] + 44, 52)], LINE)
        figure.text((xs[first] + xs[last] + 44) / 2, 38, words, 13)
    rows = (("KL", 122, ORANGE, "−β KL"), ("score", 162, GREEN, "score"), ("value", 202, BLUE, "V"))
    for name, y, colour, words in rows:
        figure.text(12, y + 5, name, 13, "start")
        for number in range(2, 6):
            if name != "score" or number == 5:
                figure.box(xs[number], y - 14, 44, 28, colour, words, 13)
    figure.text(xs[6] + 4, 162 - 4, "on EOS, not", 13, "start", fill=GREEN)
    figure.text(xs[6] + 4, 162 + 13, "on padding", 13, "start", fill=GREEN)
    figure.text(12, 250, "advantage", 13, "start")
    for number in range(5, 1, -1):
        figure.box(xs[number], 232, 44, 28, PALE, "adv", 13)
        if number > 2:
            here, before = xs[number] + 14, xs[number - 1] + 30
            figure.line([(here, 260), (here, 272), (before, 272), (before, 260)], arrow=True)
    figure.text(xs[6] + 4, 246, "GAE, taken", 13, "start", fill=MUTED)
    figure.text(xs[6] + 4, 263, "backwards", 13, "start", fill=MUTED)
    lines = (
        "The reward of a token is −β times its KL to the reference",
        "policy; the last token has the score of the text as well.",
        "A completion that was cut off has its score on its last token,",
        "too. With bootstrap_truncated the value of the next state",
        "stands there in its place.",
    )
    for number, words in enumerate(lines):
        figure.text(12, 304 + 18 * number, words, 13, "start", fill=MUTED)
    return figure


def fid() -> Figure:
    """Passages through the encoder one by one, and one decoder over all."""
    figure = Figure(330, "Fusion-in-Decoder encodes each passage alone; the decoder reads all of them")
    for number in range(3):
        y = 44 + 66 * number
        figure.box(14, y, 150, 42, PALE)
        figure.text(89, y + 17, "question", 13)
        figure.text(89, y + 34, f"[{number + 1}] passage", 13)
        figure.line([(164, y + 21), (190, y + 21)], arrow=True)
        figure.box(190, y, 84, 42, BLUE, "encoder")
        figure.line([(274, y + 21), (300, y + 21)], arrow=True)
        for part in range(4):
            figure.bar(300, y + 10.5 * part, 20, 10.5, BLUE)
    figure.text(232, 30, "the same one", 13, fill=BLUE)
    figure.text(310, 30, "states", 13)
    for y in (65, 131, 197):
        figure.line([(320, y), (352, y)], arrow=True)
    figure.box(352, 44, 112, 174, ORANGE)
    figure.text(408, 112, "decoder", 14)
    figure.text(408, 136, "attends to all", 13)
    figure.text(408, 153, "states at once", 13)
    figure.line([(408, 218), (408, 240)], arrow=True)
    figure.text(464, 258, "“In May [1]. It cost little [3].”", 14, "end")
    figure.text(14, 290, "No passage attends to another one, so the encoder's work grows", 13, "start", fill=MUTED)
    figure.text(14, 308, "in a straight line with their number.", 13, "start", fill=MUTED)
    return figure


FIGURES = {
    "calibrated-cut": cut,
    "density": density,
    "exits": exits,
    "fid": fid,
    "loretta": loretta,
    "loretta-adp": adapter,
    "mixer": mixer,
    "ppo-rollout": rollout,
    "ranks": ranks,
    "scales": scales,
    "tensor-train": tensor_train,
}


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        path, drawn = FOLDER / f"{name}.svg", draw().svg()
        if "--check" not in sys.argv:
            path.write_text(drawn, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != drawn:
            raise SystemExit(f"{path} is out of date: run python docs/make_figures.py")
