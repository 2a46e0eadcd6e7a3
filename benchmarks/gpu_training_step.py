"""One optimiser step of a 7B-shaped decoder cut to a few layers: plain, COPY, ROUTE, expanded.

`python -m benchmarks.gpu_training_step --out FILE`; the weights are random and made on the device,
two reflections stand in every row. *plain* is the unpatched model with SDPA on the same tokens;
*expanded* the same on a sequence that has the picture's tokens twice more, which is what
re-injection replaces. `--device cpu --small` shows that it runs.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from lookagain_ext import LookAgainConfig, look_again
from lookagain_ext.bench import table
from lookagain_ext.bench.generation import GRID, REFLECTION, WORDS, decoder, prompt
from lookagain_ext.bench.measure import Comparison

from .gpu_kernels import row
from .gpu_timing import describe

REFLECTIONS = 2


def batch_of(length: int, rows: int, device: str, reflections: int) -> dict[str, Tensor]:
    """A prompt with a picture, answers with reflections at even distances, labels on those."""
    inputs = prompt(rows, device)
    asked = inputs["input_ids"].shape[1]
    draw = torch.Generator().manual_seed(1)
    answer = torch.randint(WORDS, 1024, (rows, length - asked), generator=draw).to(device)
    for number in range(reflections):
        answer[:, (number + 1) * answer.shape[1] // (reflections + 1)] = REFLECTION
    ids = torch.cat([inputs["input_ids"], answer], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = nn.functional.pad(inputs["mm_token_type_ids"], (0, answer.shape[1]))
    labels = ids.clone()
    labels[:, :asked] = -100
    return inputs | more | {"mm_token_type_ids": kinds, "labels": labels}


class Step:
    """Forward, backward and update of one kind."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        inputs: dict[str, Tensor],
        kind: str,
    ) -> None:
        self.model, self.optimiser, self.inputs, self.kind = model, optimiser, inputs, kind

    def __call__(self) -> float:
        """Seconds."""
        session = nullcontext()
        if self.kind in ("off", "copy", "route"):
            config = LookAgainConfig(strategy=self.kind, reflection_token_id=REFLECTION)
            session = look_again(self.model, config)
        with session:
            begin = self._now()
            loss = self.model(**self.inputs, use_cache=False).loss
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            return self._now() - begin

    def _now(self) -> float:
        if next(self.model.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    device: str = "cuda",
    layers: int = 8,
    length: int = 4096,
    batch: int = 2,
    small: Annotated[bool, typer.Option(help="A tiny model: does it run?")] = False,
    seconds: Annotated[float, typer.Option(help="For the comparison.")] = 15.0,
) -> None:
    """Measure and print the table."""
    console = Console(width=150)
    if small:
        layers, length, batch = 1, 760, 1
    narrow = {"hidden": 512, "intermediate": 1024, "heads": (4, 1)} if small else {}
    model = decoder(layers, device, **narrow)
    if small:
        model.float()  # bfloat16 products take a CPU long
    model.model.visual.requires_grad_(False)
    inputs = batch_of(length, batch, device, REFLECTIONS)
    expanded = batch_of(length + REFLECTIONS * GRID * GRID, batch, device, 0)
    fused = {"fused": True} if device == "cuda" else {}
    trained = [x for x in model.parameters() if x.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-6, **fused)
    steps = {
        kind: Step(model, optimiser, expanded if kind == "expanded" else inputs, kind)
        for kind in ("plain", "off", "copy", "route", "expanded")
    }
    memory = {}
    for kind, step in steps.items():
        step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            memory[kind] = torch.cuda.max_memory_allocated()
            console.print(f"{kind}: peak {memory[kind] / 1e9:.1f} GB", highlight=False)
    comparison = Comparison(steps, budget=seconds, least=3)
    name = f"step, {layers} layers, {batch} x {length} tokens, {REFLECTIONS} reflections"
    goals = {"copy": 1.1, "route": None, "off": None}
    rows = [
        row(f"{name}, {kind}", "plain", comparison, kind, "plain", goal)
        for kind, goal in goals.items()
    ]
    rows += [
        row(f"{name}, {kind}", "expanded sequence", comparison, kind, "expanded", goal)
        for kind, goal in {"copy": None, "route": None}.items()
    ]
    console.print(table(rows))
    if out is not None:
        result = {
            "machine": describe(torch.device(device)),
            "rows": [entry.as_dict() for entry in rows],
            "peak_bytes": memory,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"Results: {out}")


if __name__ == "__main__":
    typer.run(main)
