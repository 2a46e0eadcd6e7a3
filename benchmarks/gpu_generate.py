"""generate() with a 7B-shaped decoder: COPY, ROUTE and off at equal length, and where time goes.

`python -m benchmarks.gpu_generate --out FILE`; the weights are random and made on the device, three
reflections are forced at the same steps in every row. `--device cpu --layers 1 --small` shows that
it runs.
"""

from __future__ import annotations

import json
import statistics
import traceback
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LogitsProcessorList

from lookagain_ext import LookAgainConfig, look_again, ops
from lookagain_ext.bench.generation import REFLECTION, Force, decoder, prompt

from .gpu_plots import plot_generate
from .gpu_timing import candidate, compare, describe

KINDS = ("unpatched", "off", "copy", "route")
PROFILED_STEPS = 12  # a profile of many takes longer than the steps


class Run:
    """One way of generating, measured as often as asked for."""

    def __init__(self, model: nn.Module, kind: str, batch: int, steps: int, static: bool) -> None:
        self.model, self.kind, self.batch, self.steps, self.static = (
            model,
            kind,
            batch,
            steps,
            static,
        )
        self.device = next(model.parameters()).device
        self.inputs = prompt(batch, str(self.device))

    def seconds(self, steps: int | None = None) -> float:
        """From the first new token to the last."""
        steps = self.steps if steps is None else steps
        forced = Force({steps // 4, steps // 2, 3 * steps // 4})
        options = {"cache_implementation": "static"} if self.static else {}
        if self.kind == "eager":
            options |= {"output_attentions": True, "return_dict_in_generate": True}
        self.model.generate(
            **self.inputs,
            do_sample=False,
            min_new_tokens=steps,
            max_new_tokens=steps,
            logits_processor=LogitsProcessorList([forced]),
            **options,
        )
        return forced.times[-1] - forced.times[0]

    def measure(self, rounds: int) -> dict[str, object]:
        """Tokens a second, memory, and the share of the device's time that attention takes."""
        on_gpu = self.device.type == "cuda"
        if self.kind == "eager":
            self.model.set_attn_implementation({"text_config": "eager"})
        session = None
        if self.kind in ("off", "copy", "route"):
            config = LookAgainConfig(strategy=self.kind, reflection_token_id=REFLECTION)
            session = look_again(self.model, config)
        try:
            self.seconds()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times = [self.seconds() for _ in range(rounds)]
            memory = torch.cuda.max_memory_allocated() if on_gpu else None
            shares = self._shares() if on_gpu else {}
        finally:
            if session is not None:
                session.detach()
            self.model.set_attn_implementation({"text_config": "sdpa"})
        took = statistics.median(times)
        return {
            "kind": self.kind,
            "batch": self.batch,
            "static": self.static,
            "steps": self.steps,
            "seconds": took,
            "seconds_all": times,
            "tokens_per_second": self.batch * (self.steps - 1) / took,
            "peak_bytes": memory,
            **shares,
        }

    def _shares(self) -> dict[str, float]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            took = self.seconds(min(self.steps, PROFILED_STEPS))
        attention = other = 0.0
        words = ("routed_attention", "attention", "flash", "fmha", "softmax")
        for event in trace.key_averages():
            here = event.self_device_time_total / 1e6
            if any(word in event.key.lower() for word in words):
                attention += here
            else:
                other += here
        return {"attention_seconds": attention, "other_seconds": other, "profiled_seconds": took}


def reencoding(model: nn.Module, tokens: int, seconds: float) -> dict[str, object]:
    """append_visual_ in every layer against the same tokens through the decoder again."""
    device = next(model.parameters()).device
    text = model.config.text_config
    size = text.hidden_size // text.num_attention_heads
    draw = {"dtype": torch.bfloat16, "device": device}
    hidden = torch.randn(1, tokens, text.hidden_size, **draw)
    shape = (1, text.num_key_value_heads, 4 * tokens, size)
    caches = [  # one for each layer, as in a model
        [torch.randn(shape, **draw) for _ in range(2)] for _ in range(text.num_hidden_layers)
    ]
    spans = torch.tensor([[[8, tokens]]], dtype=torch.int32, device=device)
    shift = torch.full((1,), 3 * tokens, dtype=torch.int32, device=device)
    start, length = shift.clone(), shift.clone()
    inv_freq = 1e6 ** -(torch.arange(size // 2, device=device) / (size // 2))

    def append() -> None:
        for cache in caches:
            length.copy_(start)
            ops.append_visual_(*cache, length, spans, shift, inv_freq, check_room=False)

    @torch.no_grad()
    def again() -> None:
        model.model.language_model(inputs_embeds=hidden, use_cache=False)

    calls = {"append": candidate(append, [()]), "again": candidate(again, [()])}
    comparison = compare(calls, seconds)
    ratio = comparison.ratio("append", "again")
    return {
        "kind": f"append_visual_ of {tokens} tokens, all layers, against re-encoding them",
        "ratio": ratio.p50,
        "goal": 0.01,
        "met": ratio.p50 <= 0.01,
        "seconds_append": comparison.timing("append").p50,
        "seconds_again": comparison.timing("again").p50,
    }


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    device: str = "cuda",
    layers: int = 28,
    steps: int = 128,
    rounds: int = 3,
    batches: Annotated[list[int] | None, typer.Option("--batch")] = None,
    static: Annotated[bool, typer.Option(help="Static cache, compiled, CUDA graphs.")] = False,
    small: Annotated[bool, typer.Option(help="Narrow layers: does every row run?")] = False,
) -> None:
    """Measure and print the table."""
    console = Console(width=150)
    narrow = {"hidden": 512, "intermediate": 1024, "heads": (4, 1)} if small else {}
    model = decoder(layers, device, **narrow)
    kinds = ("off", "copy", "route") if static else KINDS
    plans = [(kind, batch) for batch in batches or (1, 8, 32) for kind in kinds]
    if not static:  # attention weights of all layers and steps do not fit at large batches
        plans.append(("eager", 1))
    where = describe(torch.device(device))
    results = []
    for kind, batch in plans:
        try:
            found = Run(model, kind, batch, steps, static).measure(rounds)
        except Exception as error:  # a row that fails must not take the others with it
            console.print(traceback.format_exc(), highlight=False, markup=False)
            found = {"kind": kind, "batch": batch, "static": static, "error": str(error)[:500]}
        results.append(found)
        console.print(found, highlight=False)
        kept = {"machine": where, "layers": layers, "rows": results}
        _keep(kept, out)
    table = Table(title=f"{layers} layers of the 7B's shape, {steps} new tokens")
    for column in ("kind", "batch", "cache", "tokens/s", "over off", "peak GB", "attention"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    base = {
        (x["batch"], x["static"]): x["seconds"]
        for x in results
        if x["kind"] == "off" and "seconds" in x
    }
    for found in results:
        cells = [found["kind"], str(found["batch"]), "static" if found["static"] else "dynamic"]
        if "error" in found:
            cells += ["failed", "", "", ""]
        else:
            off = base.get((found["batch"], found["static"]))
            cells += [
                f"{found['tokens_per_second']:.1f}",
                f"{found['seconds'] / off:.3f}x" if off else "",
                f"{found['peak_bytes'] / 1e9:.1f}" if found["peak_bytes"] else "",
                f"{found['attention_seconds'] / found['profiled_seconds']:.1%}"
                if "attention_seconds" in found
                else "",
            ]
        table.add_row(*cells)
    console.print(table)
    if not static:
        kept["reencoding"] = reencoding(model, 1024 if device != "cpu" else 32, 2.0)
        console.print(kept["reencoding"], highlight=False)
    if out is not None:
        _keep(kept, out)
        plot_generate(kept, out.with_suffix(".png"))
        console.print(f"Results: {out}")


def _keep(result: dict[str, object], out: Path | None) -> None:
    """Row by row: a run that is cut off keeps what it found."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
