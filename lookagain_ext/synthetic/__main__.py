"""``python -m lookagain_ext.synthetic [FOLDER]``: grade a model on held-out questions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from .grade import evaluate
from .scenes import Scene
from .tiny import SHIPPED, load_tiny


def main() -> None:
    """Answer, grade, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SHIPPED, help="of the model")
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0, help="of the held-out set")
    parser.add_argument("--strategy", default="copy", choices=("copy", "route", "off"))
    parser.add_argument("--ratio", type=float, default=0.5, help="share of tokens route takes")
    parser.add_argument("--blank", action="store_true", help="show an empty picture instead")
    parser.add_argument(
        "--empty-reflections", action="store_true", help="close each reflection at once"
    )
    parser.add_argument("--no-guessing", action="store_true", help="leave out the guessing rate")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    model, processor = load_tiny(given.folder)
    report = evaluate(
        model,
        processor,
        given.questions,
        seed=given.seed,
        strategy=given.strategy,
        route_ratio=given.ratio,
        picture=_blank if given.blank else Scene.render,
        empty_reflections=given.empty_reflections,
        guess=not given.no_guessing,
    )
    print(report.summary())
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


def _blank(scene: Scene) -> Image.Image:
    """A picture of nothing."""
    return Image.new("RGB", scene.render(1).size, (255, 255, 255))


if __name__ == "__main__":
    main()
