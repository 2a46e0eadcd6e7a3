"""The `lookagain` command: what it takes and where it goes.

Each command checks nothing and computes nothing itself; `commands/` does. Torch is imported only
there, so that help comes at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .commands.errors import tells_errors

app = typer.Typer(
    name="lookagain",
    help="Vision-language models that look at the picture again while they reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(name="train", help="Train a model.", no_args_is_help=True)
app.add_typer(train_app)

_OUT = Path("lookagain_out")

Model = Annotated[
    str, typer.Option("--model", "-m", help="lookagain-tiny, a folder, or a name on the hub.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures and the trace.")]
Ratio = Annotated[
    float, typer.Option(help="Share of the visual tokens that route shows again, 0 to 1.")
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, max=2**31 - 1, help="The longest answer, in tokens.")
]
_LARGEST_SEED = 2**32 - 1  # what every random generator takes


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lookagain_ext {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Vision-language models that look at the picture again while they reason."""


@app.command()
@tells_errors
def ask(
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP, …")],
    question: Annotated[str, typer.Argument(help="What to ask about it, in quotes.")],
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="What a reflection shows: copy, route or off.")
    ] = "copy",
    ratio: Ratio = 0.5,
    model: Model = "lookagain-tiny",
    out: Out = _OUT,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the sampling.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, …; default: a GPU for large models, if any.")
    ] = None,
) -> None:
    """Ask a question about a picture and watch where the model looks."""
    from .commands.ask import run

    run(image, question, strategy, ratio, model, out, max_new_tokens, temperature, seed, device)


@app.command()
@tells_errors
def demo(
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=_LARGEST_SEED, help="Of the scene and the question; none: a fresh one."
        ),
    ] = None,
    ratio: Ratio = 0.5,
    model: Model = "lookagain-tiny",
    out: Out = _OUT / "demo",
) -> None:
    """Draw a scene, ask about it, and show the three strategies side by side."""
    from .commands.demo import run

    run(seed, ratio, model, out)


@app.command()
@tells_errors
def scene(
    path: Annotated[Path, typer.Argument(metavar="OUT.png", help="The picture to write.")],
    seed: Annotated[
        int,
        typer.Option(min=0, max=_LARGEST_SEED, help="The same seed draws the same scene."),
    ] = 0,
    scale: Annotated[int, typer.Option(min=1, max=32, help="168 pixels a side, times this.")] = 3,
) -> None:
    """Draw a scene, and print questions about it with their answers."""
    from .commands.scene import run

    run(path, seed, scale)


@app.command()
@tells_errors
def info() -> None:
    """Say what is installed and what the kernels use here."""
    from .commands.info import run

    run()


@app.command()
@tells_errors
def doctor(
    model: Annotated[str, typer.Argument(help="lookagain-tiny, a folder, or a name on the hub.")],
) -> None:
    """Check on a model that looking again computes what it should."""
    from .commands.doctor import run

    run(model)


@app.command()
@tells_errors
def bench(
    quick: Annotated[bool, typer.Option(help="Fewer and smaller cases: about a minute.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the figures, as JSON.")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Measure this part only; may be repeated.")
    ] = None,
) -> None:
    """Measure the kernels beside their baselines on this machine."""
    from .commands.bench import run

    run(quick, out, suite or ())


@app.command()
@tells_errors
def distill(
    questions: Annotated[
        str, typer.Argument(help="A .jsonl or .parquet file, a hub data set, or scenes:COUNT.")
    ],
    reader: Annotated[
        str, typer.Option(help="Shape of the records: geometry or llava-cot.")
    ] = "geometry",
    split: Annotated[str, typer.Option(help="Of a data set on the hub.")] = "train",
    model: Model = "lookagain-tiny",
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="What a reflection shows: copy, route or off.")
    ] = "copy",
    ratio: Ratio = 0.5,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results; shards may share it.")
    ] = Path("lookagain_out/distill"),
    shard: Annotated[str, typer.Option(help="INDEX/COUNT: the questions this call does.")] = "0/1",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST_SEED, help="Of the sampling.")] = 0,
    judge: Annotated[
        list[str] | None, typer.Option(help="MODEL@URL of a chat endpoint; may be repeated.")
    ] = None,
    judge_key: Annotated[
        str | None, typer.Option(help="Environment variable that holds the judges' key.")
    ] = None,
    judge_sees: Annotated[bool, typer.Option(help="Send the judges the picture.")] = False,
    review_votes: Annotated[
        int, typer.Option(min=1, help='So many "incorrect" send an answer to review.')
    ] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
) -> None:
    """Let a model answer questions, and keep the good answers as training data."""
    from .commands.distill import run

    run(
        questions,
        reader,
        split,
        model,
        strategy,
        ratio,
        out,
        shard,
        batch_size,
        max_new_tokens,
        temperature,
        seed,
        judge or (),
        judge_key,
        judge_sees,
        review_votes,
        device,
    )


@app.command()
@tells_errors
def recipe(
    name: Annotated[str, typer.Argument(help="qwen-la: Qwen Look Again, arXiv 2505.23558.")],
    config: Annotated[
        str, typer.Option("--config", "-c", help="A YAML file, or one that the package brings.")
    ] = "configs/tiny/recipe-quick.yaml",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of everything; default: the file's.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Held-out questions a model; default: the file's.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Stages at the same time; default: the file's, or 1.")
    ] = None,
) -> None:
    """Run all stages of a method; interrupted, the same command goes on."""
    from .commands.recipe import run

    run(name, config, out, questions, jobs)


@train_app.command()
@tells_errors
def coldstart(
    config: Annotated[
        str, typer.Option("--config", "-c", help="A YAML file, or one that the package brings.")
    ] = "configs/tiny/coldstart.yaml",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; default: the file's.")
    ] = None,
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Write the reflections, and do not train.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on from a checkpoint in the folder, if there is one.")
    ] = True,
) -> None:
    """Teach a model to reflect: write one reflection into each answer, then fine-tune on them."""
    from .commands.train import run_coldstart

    run_coldstart(config, out, data_only, resume)


@train_app.command()
@tells_errors
def sft(
    config: Annotated[
        str, typer.Option("--config", "-c", help="A YAML file, or one that the package brings.")
    ] = "configs/tiny.yaml",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; default: the file's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from a checkpoint in the folder, if there is one.")
    ] = True,
) -> None:
    """Supervised fine-tuning: of the tiny model on drawn scenes, or of any model through TRL.

    A configuration with an entry "trainer" is for TRL, such as configs/qwen2.5-vl-7b/sft.yaml.
    """
    from .commands.train import run_sft

    run_sft(config, out, resume)


@train_app.command()
@tells_errors
def brpo(
    config: Annotated[
        str, typer.Option("--config", "-c", help="A YAML file, or one that the package brings.")
    ] = "configs/tiny/brpo.yaml",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; default: the file's.")
    ] = None,
    look_again: Annotated[
        str | None,
        typer.Option(
            help="What rollouts see in a reflection: copy, route, off; default: the file's."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from a checkpoint in the folder, if there is one.")
    ] = True,
) -> None:
    """Balanced Reflective Policy Optimization, through TRL."""
    from .commands.train import run_trl

    run_trl("brpo", config, out, look_again, resume)


if __name__ == "__main__":
    app()
