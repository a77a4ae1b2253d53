"""Where the time of each build goes, as a picture: one panel a build, one bar an operator, longest first.

Sums of products are drawn apart from all else, since all else is what lowering and fused operators are there to remove.
Written by hand as SVG: a device has no plotting library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from xml.sax.saxutils import escape

#: operators that are sums of products, in the words of the runtimes (``Convert`` is none)
PRODUCTS = re.compile(r"conv(?!ert)|matmul|product|gemm|fullyconnected|lstm|attention", re.IGNORECASE)
COLOURS = {True: "#2a6fbb", False: "#c2c7ce"}
BAR, LABEL, WIDE, TITLE = 18, 260, 380, 30  # px: height of a bar, room for its name, the bar of all the time, a heading


def profile_svg(rows: Iterable[Mapping[str, Any]]) -> str:
    """The picture of rows that have an ``audit`` with ``ms`` and ``operators``, or are one themselves.

    Returns:
        SVG text; a share below the panel's last bar is left to operators too small to be listed.
    """
    body, y = [_text(10, 20, "Share of the time of one query: sums of products blue, all else grey", bold=True)], 34
    for row in rows:
        found = row.get("audit", row)
        if not found.get("operators"):
            continue
        name = " ".join(str(row[k]) for k in ("runtime", "precision", "ops", "length") if row.get(k))
        products = sum(o["share"] for o in found["operators"] if PRODUCTS.search(o["operator"]))
        body.append(
            _text(
                10, y + 20, f"{name}: {found['ms']:.2f} ms in kernels, {products:.0%} in the products shown", bold=True
            )
        )
        y += TITLE
        for operator in found["operators"]:
            share, is_product = operator["share"], bool(PRODUCTS.search(operator["operator"]))
            body += [
                _text(LABEL, y + BAR - 5, f"{operator['operator']}, {operator['precision']}", end=True),
                f'<rect x="{LABEL + 8}" y="{y + 2}" width="{max(1.0, share * WIDE):.1f}" height="{BAR - 4}"'
                f' fill="{COLOURS[is_product]}"/>',
                _text(LABEL + 14 + share * WIDE, y + BAR - 5, f"{share:.1%}"),
            ]
            y += BAR
        y += 8
    size = f'width="{LABEL + WIDE + 80}" height="{y + 10}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>", ""])


def _text(x: float, y: int, text: str, bold: bool = False, end: bool = False) -> str:
    style = (' font-weight="bold"' if bold else "") + (' text-anchor="end"' if end else "")
    return f'<text x="{x:.1f}" y="{y}"{style}>{escape(text)}</text>'
