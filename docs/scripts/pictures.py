"""Draw the pictures of the pages: docs/reduction_tree.svg and docs/packages.svg.

Usage: .venv/bin/python docs/scripts/pictures.py

Each picture has its own background, so that it can be read on a light and on a dark page. Which rank computes which
micro-batch comes from BatchPlan. A test checks that the files are current.
"""

from __future__ import annotations

from pathlib import Path

from tinytrain_dist.distributed.batch_plan import BatchPlan

DOCS = Path(__file__).resolve().parents[1]

STYLE = """
  svg { font-family: system-ui, sans-serif; font-size: 15px; }
  .page { fill: #ffffff; stroke: #d0d4da; }
  text { fill: #1c2128; }
  .quiet { fill: #57606a; }
  .line { stroke: #57606a; stroke-width: 1.5; fill: none; }
  .sum { fill: #eef1f5; stroke: #57606a; }
  .box { fill: #e4ecf7; stroke: #5b7fb0; }
  .rank0 { fill: #cfe2ff; } .rank1 { fill: #ffe0b8; } .rank2 { fill: #d3f0d0; } .rank3 { fill: #f4d3e6; }
  .rank { stroke: #57606a; }
  .middle { text-anchor: middle; dominant-baseline: central; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #1c2128; stroke: #444c56; }
    text { fill: #e6edf3; }
    .quiet { fill: #adbac7; }
    .line, .sum, .rank { stroke: #adbac7; }
    .sum { fill: #2d333b; }
    .box { fill: #24344d; stroke: #6d94cc; }
    .rank0 { fill: #1f4373; } .rank1 { fill: #6b4410; } .rank2 { fill: #1f5226; } .rank3 { fill: #6a2950; }
  }
"""

LEAVES = 8
LAYOUTS = [
    ("1 process", 1, 1),
    ("DDP, 2 ranks", 2, 1),
    ("DDP, 3 ranks", 3, 1),
    ("FSDP, 4 ranks", 1, 4),
    ("HSDP, 2 x 2 ranks", 2, 2),
]


def svg(width: int, height: int, title: str, shapes: list[str]) -> str:
    """Return a picture with a background."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, content: str, kind: str = "middle") -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{content}</text>'


def box(x: float, y: float, width: float, height: float, content: str, kind: str) -> list[str]:
    """Return a rectangle around a line of text; (x, y) is its center."""
    corner = f'x="{x - width / 2:g}" y="{y - height / 2:g}"'
    return [f'<rect class="{kind}" {corner} width="{width:g}" height="{height:g}" rx="5"/>', text(x, y, content)]


def rank_of_micro_batch(replicate: int, shard: int) -> list[int]:
    """Return the rank that computes each of the micro-batches of a step, by the plan that training uses."""
    plan = BatchPlan(LEAVES, 1, 1, replicate, shard)
    ranks = {
        index: replica * shard + part
        for replica in range(replicate)
        for part in range(shard)
        for index in plan.share(replica, part).micro_batches
    }
    return [ranks[index] for index in range(LEAVES)]


def reduction_tree() -> str:
    """Return the picture of the order in which the gradients of eight micro-batches are added."""
    left, gap, leaf_y = 190, 66, 250
    centers = [[float(left + gap * leaf) for leaf in range(LEAVES)]]
    while len(centers[-1]) > 1:
        below = centers[-1]
        centers.append([(a + b) / 2 for a, b in zip(below[::2], below[1::2], strict=True)])
    shapes = [text(20, 36, "The gradients of a step are added in this order:", "quiet")]
    for level in range(1, len(centers)):
        y, child_y = leaf_y - 62 * level, leaf_y - 62 * (level - 1)
        for number, x in enumerate(centers[level]):
            for child in centers[level - 1][2 * number : 2 * number + 2]:
                shapes.append(f'<path class="line" d="M{x:g} {y} L{child:g} {child_y}"/>')
    for level in range(1, len(centers)):
        for x in centers[level]:
            shapes.append(f'<circle class="sum" cx="{x:g}" cy="{leaf_y - 62 * level}" r="13"/>')
            shapes.append(text(x, leaf_y - 62 * level, "+"))
    shapes.append(text(20, leaf_y + 5, "micro-batch index", "quiet"))
    for leaf, x in enumerate(centers[0]):
        shapes += box(x, leaf_y, 52, 28, f"{leaf}", "sum")
    shapes.append(text(20, leaf_y + 58, "The rank that computes each micro-batch depends on the layout:", "quiet"))
    for row, (name, replicate, shard) in enumerate(LAYOUTS):
        y = leaf_y + 92 + 42 * row
        shapes.append(text(20, y + 5, name, ""))
        for x, rank in zip(centers[0], rank_of_micro_batch(replicate, shard), strict=True):
            shapes += box(x, y, 52, 28, f"{rank}", f"rank rank{rank}")
    title = "Binary tree over eight micro-batches, and the ranks that compute them in five layouts"
    return svg(left + gap * LEAVES - 20, leaf_y + 92 + 42 * len(LAYOUTS), title, shapes)


LAYERS = [
    ["train.py, agent.py, __main__.py"],
    ["cli"],
    ["launch"],
    ["training"],
    ["checkpoint"],
    ["reliability"],
    ["metrics"],
    ["parallel"],
    ["optim"],
    ["distributed", "model"],
    ["config", "data"],
    ["errors.py", "utils"],
]


def packages() -> str:
    """Return the picture of the packages, from the programs at the top to the helpers at the bottom."""
    shapes = []
    for row, names in enumerate(LAYERS):
        for column, name in enumerate(names):
            width = 300 if len(names) == 1 else 140
            x = 200 if len(names) == 1 else 120 + 160 * column
            shapes += box(x, 38 + 46 * row, width, 34, name, "box")
    shapes.append('<path class="line" d="M380 30 V545 M374 535 L380 545 L386 535"/>')
    shapes.append(text(396, 290, "may import", "quiet"))
    title = "The packages: each may import from those below it"
    return svg(500, 38 + 46 * len(LAYERS), title, shapes)


PICTURES = {"reduction_tree.svg": reduction_tree, "packages.svg": packages}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
