"""``python -m tests.house_picture``: draws docs/house.svg, the folders of moe_fx by floors, from
the tree as it is. ``tests/test_house.py`` fails if the picture is not the tree's.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

from tests.house import FLOORS, ROOT, floor_of, modules

__all__ = ["PICTURE", "picture"]

PICTURE = ROOT / "docs" / "house.svg"
_WIDTH, _ROW, _GAP, _LEFT = 1180, 62, 10, 16
_PASSES = "#dcebff"
_OTHERS = "#f1ece2"


def _boxes() -> dict[int, list[tuple[str, list[str]]]]:
    """floor -> (folder or file, what is in it), in reading order."""
    held: dict[str, list[str]] = defaultdict(list)
    for name, file in sorted(modules(ROOT).items()):
        folder = name if file.name == "__init__.py" else name.rpartition(".")[0]
        if folder in ("moe_fx", "moe_fx.passes"):
            held[name] += []
        elif name != folder:
            held[folder].append(name.rpartition(".")[2])
    floors: dict[int, list[tuple[str, list[str]]]] = defaultdict(list)
    for name, inside in held.items():
        floors[floor_of(name)].append((_shown(name), inside))
    return floors


def _shown(name: str) -> str:
    """``moe_fx.passes.plan`` -> ``passes/plan``."""
    return name.replace("moe_fx.passes", "passes", 1).replace(".", "/") if "." in name else name


def _lines(words: list[str], width: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def picture() -> str:
    floors = _boxes()
    drawn: list[str] = []
    top = _GAP
    for level in reversed(range(len(FLOORS))):
        boxes = floors.get(level, [])
        if not boxes:
            continue
        width = (_WIDTH - 2 * _LEFT - _GAP * (len(boxes) - 1)) / len(boxes)
        texts = [_lines(inside, int(width / 6.1)) for _, inside in boxes]
        height = 30 + 13 * max(len(lines) for lines in texts)
        for at, ((name, _), lines) in enumerate(zip(boxes, texts, strict=True)):
            left = _LEFT + at * (width + _GAP)
            fill = _PASSES if name.startswith("passes") else _OTHERS
            drawn.append(
                f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{height}" rx="5" '
                f'fill="{fill}" stroke="#8a8a8a"/>'
            )
            drawn.append(
                f'<text x="{left + 7:.0f}" y="{top + 18}" class="name">{escape(name)}</text>'
            )
            drawn += [
                f'<text x="{left + 7:.0f}" y="{top + 33 + 13 * row}">{escape(line)}</text>'
                for row, line in enumerate(lines)
            ]
        top += height + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
        'font-family="sans-serif" font-size="11">\n<style>.name{font-weight:bold;font-size:12px}'
        "</style>\n<rect width='100%' height='100%' fill='white'/>"
    )
    return "\n".join((head, *drawn, "</svg>")) + "\n"


def main() -> None:
    PICTURE.write_text(picture())
    print(f"{PICTURE.relative_to(Path.cwd())}: {len(FLOORS)} floors")


if __name__ == "__main__":
    main()
