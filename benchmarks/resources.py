"""What the compiler makes of each CUDA kernel: registers, spills, the instructions it should use.

`python -m benchmarks.resources` compiles every kernel for each architecture, which needs no GPU,
compares with the kept table and fails where a kernel got worse; `--update` keeps what was found.
Needs nvcc, and for the instructions cuobjdump and nvdisasm
(`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "cuda_resources.json"
ARCHITECTURES = ("80", "90a")
# Tensor-core products, copies past the registers, matrix loads, transposes; local memory last.
INSTRUCTIONS = ("HMMA", "LDGSTS", "LDSM", "MOVM", "LDL", "STL")
MORE_REGISTERS = 8  # what a kernel may gain before it counts as worse

Resources = dict[str, dict[str, int]]


def cuobjdump() -> str | None:
    """The program, from the path or from its package on PyPI."""
    for folder in sys.path:
        found = sorted(Path(folder).glob("nvidia/*/bin/cuobjdump")) if folder else []
        if found:
            return str(found[-1])
    return shutil.which("cuobjdump")


def compile_kernels(architecture: str) -> Resources:
    """Registers, spilled bytes and instructions of each kernel.

    Args:
        architecture: such as "90a".

    Returns:
        kernel -> {"registers", "spills", and one count for each of `INSTRUCTIONS`}.

    Raises:
        RuntimeError: if nvcc or cuobjdump fails; the message holds what it said.
    """
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_compile, source, architecture, Path(folder)) for source in sources]
        return {name: found for job in jobs for name, found in job.result().items()}


def worse(kept: Resources, found: Resources) -> list[str]:
    """What got worse, in words; kernels that are not in the kept table included."""
    problems = [f"{name} is not in the kept table" for name in found if name not in kept]
    problems += [f"{name} is gone" for name in kept if name not in found]
    for name in kept.keys() & found.keys():
        before, now = kept[name], found[name]
        if now["registers"] > before["registers"] + MORE_REGISTERS:
            problems.append(f"{name}: registers {before['registers']} -> {now['registers']}")
        for what in ("spills", "LDL", "STL"):
            if now[what] > before[what]:
                problems.append(f"{name}: {what} {before[what]} -> {now[what]}")
        for what in ("HMMA", "LDGSTS", "LDSM", "MOVM"):
            if before[what] and not now[what]:
                problems.append(f"{name}: {what} instructions are gone")
    return sorted(problems)


def _compile(source: Path, architecture: str, folder: Path) -> Resources:
    cubin = folder / f"{source.stem}.cubin"
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", "-O3", "-I", str(ROOT / "csrc"), "-gencode", target, "-cubin"]
    command += ['-DLOOKAGAIN_CUDA_ARCHS="none"', "-Xptxas", "-v", "-o", str(cubin), str(source)]
    report = _run(command).stderr
    found: Resources = {}
    entry = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    for name, stores, loads, registers in re.findall(
        entry + r".*?Used (\d+) registers", report, re.DOTALL
    ):
        found[name] = {"registers": int(registers), "spills": int(stores) + int(loads)}
    program = cuobjdump()
    if program is None:
        raise RuntimeError("no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    if found:
        listing = _run([program, "-sass", str(cubin)]).stdout
        for name, body in re.findall(
            r"Function : (\w+)\n(.*?)(?=Function :|\Z)", listing, re.DOTALL
        ):
            counts = Counter(re.findall(r"\b([A-Z][A-Z0-9]+)(?:\.[\w.]+)? ", body))
            found[name] |= {what: counts[what] for what in INSTRUCTIONS}
    return {_plain(name): resources for name, resources in found.items()}


def _plain(mangled: str) -> str:
    """routed_attention_decode<BFloat16, 128, 1> for the mangled name."""
    name = _run(["c++filt", mangled]).stdout.strip()
    name = name.removeprefix("void ").split("(lookagain")[0]
    return re.sub(r"\(\w+\)|lookagain::|cuda::|common::|\(anonymous namespace\)::", "", name)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # cuobjdump calls nvdisasm, which its package puts beside it.
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done


def main(
    update: Annotated[bool, typer.Option(help="Keep what was found.")] = False,
) -> None:
    """Compile every kernel for each architecture and compare with the kept table."""
    console = Console(width=150)
    found = {f"sm_{name}": compile_kernels(name) for name in ARCHITECTURES}
    for architecture, kernels in found.items():
        table = Table(title=architecture)
        for column in ("kernel", "registers", "spilled bytes", *INSTRUCTIONS):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for name, resources in sorted(kernels.items()):
            table.add_row(name, *(str(value) for value in resources.values()))
        console.print(table)
    version = re.search(r"release [\d.]+, (V[\d.]+)", _run(["nvcc", "--version"]).stdout)[1]
    if update:
        KEPT.write_text(json.dumps({"nvcc": version, "kernels": found}, indent=1) + "\n")
        console.print(f"kept in {KEPT.relative_to(ROOT)}")
        return
    kept = json.loads(KEPT.read_text())
    problems = [
        f"sm_{name}: {problem}"
        for name in ARCHITECTURES
        for problem in worse(kept["kernels"].get(f"sm_{name}", {}), found[f"sm_{name}"])
    ]
    if problems and kept["nvcc"] != version:
        console.print(f"the table was made with nvcc {kept['nvcc']}, this is {version}")
    for problem in problems:
        console.print(f"[bold red]worse[/bold red] {problem}", highlight=False)
    if problems:
        raise typer.Exit(1)
    console.print("no kernel got worse")


if __name__ == "__main__":
    typer.run(main)
