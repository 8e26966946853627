"""Charts of the status pages as coordinates for inline SVG; the template draws them, and says the same in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 14, 34
#: Heights of a bar with and without the space below it; widths of what stands left and right of all bars.
ROW, THICK, NAMES, VALUES = 36, 20, 190, 112
#: Steps of a scale in which labels look tidy.
TIDY = (1.0, 2.0, 2.5, 5.0, 10.0)


def bars(values: Sequence[tuple[str, float, bool]]) -> dict[str, Any] | None:
    """Horizontal bars of shares between 0 and 1; ``None`` without any.

    Args:
        values: name, share, and whether this one was chosen.
    """
    if not values:
        return None
    room = WIDTH - NAMES - VALUES
    rows = [
        {
            "name": name,
            "value": f"{share:.3f}",
            "chosen": chosen,
            "y": TOP + ROW * number,
            "width": round(room * min(1.0, max(0.0, share)), 1),
        }
        for number, (name, share, chosen) in enumerate(values)
    ]
    words = ", ".join(f"{row['name']} {row['value']}{' (elected)' if row['chosen'] else ''}" for row in rows)
    sizes = {"width": WIDTH, "height": TOP + ROW * len(rows), "left": NAMES, "room": room, "thick": THICK}
    return sizes | {"rows": rows, "words": words}


def line(points: Sequence[tuple[int, float]], steps: int) -> dict[str, Any] | None:
    """A curve over steps, from zero on; ``None`` where there are not two numbers to draw."""
    found = [(step, value) for step, value in points if math.isfinite(value)]
    if len(found) < 2:
        return None
    last, most = max(steps, found[-1][0], 1), max(value for _, value in found)
    tick = _tidy(most / 4)
    top = tick * max(1, math.ceil(most / tick - 1e-9))

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(top, max(0.0, value)) / top, 1)

    first, end = found[0], found[-1]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "points": " ".join(f"{x(step)},{y(value)}" for step, value in found),
        "ys": [{"at": y(tick * n), "text": f"{tick * n:.4g}"} for n in range(round(top / tick) + 1)],
        "xs": [{"at": x(last * n / 4), "text": str(round(last * n / 4))} for n in range(5)],
        "words": f"from {first[1]:.4f} at step {first[0]} to {end[1]:.4f} at step {end[0]} of {last}",
    }


def _tidy(rough: float) -> float:
    """The smallest tidy step that is not smaller."""
    if rough <= 0 or not math.isfinite(rough):
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in TIDY if step * power >= rough * (1 - 1e-9))
