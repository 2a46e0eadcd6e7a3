"""The recipe: its commands, its journal, and its report. No stage is trained here."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lookagain_ext.commands.errors import UserError
from lookagain_ext.commands.recipe import run as run_command
from lookagain_ext.training import recipe
from lookagain_ext.training.config import SFTConfig
from lookagain_ext.training.recipe import JOURNAL, RecipeConfig, run_recipe, steps
from lookagain_ext.training.recipe_report import paired
from lookagain_ext.training.run_config import RunConfig

PACKAGED = ("configs/tiny/recipe-quick.yaml", "configs/tiny/recipe.yaml")
ALL = (*PACKAGED, "configs/qwen2.5-vl-7b/recipe.yaml")


def small(folder, **changes) -> RecipeConfig:
    return RecipeConfig.load(PACKAGED[0], output=str(folder), **changes)


@pytest.mark.parametrize("name", ALL)
def test_every_stage_of_a_packaged_recipe_has_a_valid_configuration(name) -> None:
    planned = steps(RecipeConfig.load(name))
    assert len({step.name for step in planned}) == len(planned)
    written = [step for step in planned if step.settings is not None]
    assert len(written) >= 5
    for step in written:
        settings = yaml.safe_load(yaml.safe_dump(step.settings, sort_keys=False))
        kind = RunConfig if "trainer" in settings else SFTConfig
        assert kind.from_dict(settings).output.endswith(step.name.removesuffix("-data"))
        assert step.launched == ("trainer" in settings and not step.name.endswith("-data"))


def test_the_stages_build_on_one_another(tmp_path) -> None:
    planned = {step.name: step for step in steps(small(tmp_path))}
    base, cold = f"{tmp_path}/base/model", f"{tmp_path}/coldstart/model"
    assert planned["coldstart"].settings["model"] == base
    for preset in ("paper", "hardened"):
        made = planned[f"brpo-{preset}"].settings
        assert made["model"] == cold and made["rewards"]["preset"] == preset
        assert made["trainer"]["look_again"] == "off"
    distilled = planned["distill"].command
    assert f"--model={tmp_path}/brpo-paper/model" in distilled and "--strategy=off" in distilled
    for strategy in ("off", "copy", "route"):
        made = planned[f"sft-{strategy}"].settings
        assert made["model"] == base  # the paper's: not the model that reinforcement made
        assert made["data"]["path"] == f"{tmp_path}/distill/kept-00000-of-00001.jsonl"
        assert made["trainer"]["look_again"]["strategy"] == strategy
        assert f"--strategy={strategy}" in planned[f"evaluate-sft-{strategy}"].command
    assert "--empty-reflections" in planned["evaluate-vision-only"].command
    assert "--ratio=0.25" in planned["evaluate-route-25"].command
    assert list(planned)[-1] == "speed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": ["papre"]}, "presets must be some of paper, hardened"),
        ({"strategies": [False, "copy"]}, "use quotes"),
        ({"sft": {"model": "x"}}, "sft: output and model are set by the recipe"),
        ({"distill": {"batch_size": 4}}, "distill needs questions"),
        ({"evaluate": {"ratios": [0.5]}}, "evaluate needs questions"),
        ({"base": {}}, "base must hold names and values"),
        ({"cold": 1}, "a recipe has no entry cold"),
    ],
)
def test_wrong_recipes_are_named(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_the_command_names_what_is_wrong(tmp_path) -> None:
    with pytest.raises(UserError, match="no recipe 'qwen'"):
        run_command("qwen", PACKAGED[0], tmp_path, None)
    with pytest.raises(UserError, match="no configuration"):
        run_command("qwen-la", "none.yaml", tmp_path, None)


def test_a_failed_step_is_repeated_and_no_other(tmp_path, monkeypatch) -> None:
    """Also after a change of the launcher; another recipe is refused."""
    broken, log = tmp_path / "broken", tmp_path / "log"
    broken.touch()

    def argv(step, launch):
        script = (
            "import pathlib, sys\n"
            f"with open({str(log)!r}, 'a') as file: print(sys.argv[1], file=file)\n"
            f"sys.exit(sys.argv[1] == 'distill' and pathlib.Path({str(broken)!r}).exists())\n"
        )
        return [recipe.sys.executable, "-c", script, step.name]

    monkeypatch.setattr(recipe, "_argv", argv)
    config, said = small(tmp_path / "out"), []
    names = [step.name for step in steps(config)]
    with pytest.raises(RuntimeError, match="distill failed with exit code 1: lookagain distill"):
        run_recipe(config, said.append)
    assert log.read_text().split() == names[: names.index("distill") + 1]
    journal = (tmp_path / "out" / JOURNAL).read_text()
    (tmp_path / "out" / JOURNAL).write_text(journal + '{"number": 5, "na')  # killed as it wrote
    broken.unlink()
    log.write_text("")
    done = run_recipe(small(tmp_path / "out", launch=("a",)), said.append)
    assert log.read_text().split() == names[names.index("distill") :]
    assert [entry["name"] for entry in done] == names
    assert done[0]["command"] == f"lookagain train sft --config {tmp_path}/out/configs/base.yaml"
    assert yaml.safe_load((tmp_path / "out/configs/sft-copy.yaml").read_text())["data"]
    log.write_text("")
    run_recipe(config, said.append)
    assert log.read_text() == "" and said[-1].startswith(f"[{len(names)}/{len(names)}] speed: done")
    with pytest.raises(ValueError, match="holds other work: presets"):
        run_recipe(small(tmp_path / "out", presets=["paper"]), said.append)


def test_a_step_ends_with_the_recipe(tmp_path) -> None:
    """Killed with -9, the recipe leaves no step behind that a second one would meet."""
    pid, step = tmp_path / "pid", tmp_path / "step.py"
    step.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(99)\n"
    )
    script = (
        "import sys\n"
        "from lookagain_ext.training import recipe\n"
        f"recipe._argv = lambda *_: [sys.executable, {str(step)!r}]\n"
        f"config = recipe.RecipeConfig.load({PACKAGED[0]!r}, output={str(tmp_path / 'out')!r})\n"
        "recipe.run_recipe(config)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while _alive(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_paired_differences() -> None:
    mean, low, high = paired("1100" * 25, "1010" * 25)
    assert mean == 0 and low == pytest.approx(-high)
    assert high == pytest.approx(1.959964 * math.sqrt(0.5 * 100 / 99 / 100))
    assert paired("1" * 50, "0" * 50) == (1, 1, 1)
    with pytest.raises(ValueError, match="of the same questions, got 2, 3"):
        paired("11", "111")


def test_the_report_says_what_the_stages_wrote(tmp_path) -> None:
    from lookagain_ext.training.recipe_report import write_report

    pytest.importorskip("trl", reason="the report names its version")
    config = small(tmp_path)
    (tmp_path / "evaluation").mkdir()
    right = {"base": 10, "coldstart": 40, "sft-off": 50, "sft-copy": 75, "sft-route": 60}
    right |= {"brpo-paper": 45, "brpo-hardened": 44, "vision-only": 20, "route-25": 55}
    for name, count in right.items():
        grade = {
            "questions": 100,
            "accuracy": count / 100,
            "interval": [count / 100 - 0.1, count / 100 + 0.1],
            "by_type": {"count": 0.5},
            "guessing": {"all": 0.337},
            "well_formed": 1.0,
            "mean_tokens": 120.0,
            "mean_reflections": 1.0,
            "mean_reflection_tokens": 20.0,
            "strategy": "copy",
            "seconds": 12.0,
            "marks": "1" * count + "0" * (100 - count),
        }
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps(grade))
    for preset, rise in (("paper", 1), ("hardened", -1)):
        (tmp_path / f"brpo-{preset}").mkdir()
        lines = [
            {"step": i, "reflections/count": 2 + rise * i / 10, "seconds/rollout": 3.0, "kl": 0.1}
            for i in range(10)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"brpo-{preset}" / "metrics.jsonl").write_text(text)
    (tmp_path / "distill").mkdir()
    journal = ['{"about": 1}', '{"status": "kept"}', '{"status": "wrong"}', '{"status": "kept"}']
    (tmp_path / "distill/journal-00000-of-00001.jsonl").write_text("\n".join(journal) + "\n")
    done = [{"number": 0, "name": "base", "command": "lookagain train sft", "seconds": 90.0}]
    page = write_report(config, done).read_text()
    assert "| sft-copy | sft-off | +25.0 | +" in page
    assert "| COPY | 75.0% | 65.0% to 85.0% | 60.3 |" in page
    assert "| 25 % | 55.0% | 45.0% to 65.0% | 120 | 17.9 |" in page
    assert "| paper, first fifth | 2.05 |" in page and "| hardened, last fifth | 1.15 |" in page
    assert "| paper | 3.00 | - | - | - |" in page
    assert "3 questions answered: 2 kept, 1 wrong." in page
    assert "lookagain train sft  # 90 s" in page and "guessing without the picture: 33.7%" in page
    for picture in ("accuracy.png", "brpo.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
