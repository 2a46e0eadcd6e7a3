"""The recipe: its commands, its journal, and its report. No stage is trained here."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lookagain_ext.commands.errors import UserError
from lookagain_ext.commands.recipe import run as run_command
from lookagain_ext.training import recipe_run
from lookagain_ext.training.config import SFTConfig
from lookagain_ext.training.recipe import RecipeConfig, Step, steps
from lookagain_ext.training.recipe_report import paired
from lookagain_ext.training.recipe_run import JOURNAL, run_recipe
from lookagain_ext.training.run_config import RunConfig

PACKAGED = ("configs/tiny/recipe-quick.yaml", "configs/tiny/recipe.yaml")
ALL = (*PACKAGED, "configs/qwen2.5-vl-7b/recipe.yaml")


def small(folder, jobs=1, **changes) -> RecipeConfig:
    return RecipeConfig.load(PACKAGED[0], output=str(folder), jobs=jobs, **changes)


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


@pytest.mark.parametrize("name", ALL)
def test_each_step_comes_after_what_it_needs(name) -> None:
    planned = steps(RecipeConfig.load(name, evaluate={"questions": 6, "ratios": [0.25]}))
    known = set()
    for step in planned:
        assert known.issuperset(step.needs), step.name
        known.add(step.name)
        # What another step makes is named in the words or the settings of those that need it.
        reads = f"{step.command} {step.settings}"
        read = {one for one in known if f"/{one}/" in reads and one != step.name}
        assert read <= set(step.needs), step.name


def test_what_each_step_needs(tmp_path) -> None:
    planned = {step.name: step for step in steps(small(tmp_path))}
    assert {name: set(step.needs) for name, step in planned.items() if name != "speed"} == {
        "base": set(),
        "coldstart-data": {"base"},
        "coldstart": {"base", "coldstart-data"},
        "brpo-paper": {"coldstart"},
        "brpo-hardened": {"coldstart"},
        "distill": {"brpo-paper"},
        **{f"sft-{looks}": {"base", "distill"} for looks in ("off", "copy", "route")},
        **{f"evaluate-{name}": {name} for name in ("base", "coldstart")},
        **{f"evaluate-brpo-{preset}": {f"brpo-{preset}"} for preset in ("paper", "hardened")},
        **{f"evaluate-sft-{looks}": {f"sft-{looks}"} for looks in ("off", "copy", "route")},
        "evaluate-vision-only": {"sft-copy"},
        **{f"evaluate-route-{percent}": {"sft-route"} for percent in (0, 25, 75, 100)},
    }
    assert set(planned["speed"].needs) == set(planned) - {"speed"}
    given = {step.name: step for step in steps(small(tmp_path, base={"model": "x"}))}
    assert given["coldstart-data"].needs == given["evaluate-base"].needs == ()
    assert given["sft-off"].needs == ("distill",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": ["papre"]}, "presets must be some of paper, hardened"),
        ({"strategies": [False, "copy"]}, "use quotes"),
        ({"sft": {"model": "x"}}, "sft: output and model are set by the recipe"),
        ({"distill": {"batch_size": 4}}, "distill needs questions"),
        ({"evaluate": {"ratios": [0.5]}}, "evaluate needs questions"),
        ({"base": {}}, "base must hold names and values"),
        ({"jobs": 0}, "jobs must be a number from 1 on, got 0"),
        ({"jobs": True}, "jobs must be a number from 1 on, got True"),
        ({"cold": 1}, "a recipe has no entry cold"),
        ({"evaluate": {"questions": 6, "ratios": [2]}}, "evaluate: ratios must be a list of"),
        ({"evaluate": {"questions": 6, "qestions": 1}}, "evaluate has no entry qestions; did you"),
        ({"distill": {"questions": "scenes:4", "batch": 4}}, "distill has no entry batch; did you"),
        ({"launch": "accelerate launch"}, "launch must be a list, got 'accelerate launch'"),
        ({"presets": 5}, "presets must be a list, got 5"),
        ({"evaluate": [6]}, "evaluate must hold names and values, got"),
        ({"route_ratio": 50}, "route_ratio must be a number from 0 to 1, got 50"),
        ({"base": {"init": "lookagain-tiny", "stages": []}}, "base: stages must name at least one"),
        (
            {"coldstart": {"data": {"scenes": "x"}}},
            "coldstart: data: scenes must be",
        ),
        ({"brpo": {"trainer": 1}}, "brpo: trainer must hold names and values, got 1"),
        (
            {"brpo": {"data": {"scenes": 4}, "rewards": {"foo": 1}}},
            "rewards has no entry foo",
        ),
        ({"sft": {"rewards": {"preset": "paper"}}}, "sft: rewards: only BRPO has them"),
    ],
)
def test_wrong_recipes_are_named(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"brpo": {"data": {"scenes": 4}, "trainer": {"foo": 1}}},
            "brpo: trainer has no entry",
        ),
        ({"sft": {"trainer": {"learning_rate": "5e-4"}}}, "sft: trainer: learning_rate must be a"),
        ({"sft": {"trainer": {"seed": 0}, "lora": {"rank": 1}}}, "sft: lora has no entry rank"),
    ],
)
def test_what_a_trainer_would_refuse_is_refused_at_once(changes, message, tmp_path) -> None:
    pytest.importorskip("trl", reason="needs the extra 'train'")
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_a_file_that_is_not_there_is_named_before_anything_runs(tmp_path) -> None:
    wrong = small(tmp_path, brpo={"data": {"path": "no.jsonl"}, "trainer": {"seed": 0}})
    with pytest.raises(ValueError, match="brpo: data: there is no file no.jsonl"):
        run_recipe(wrong)


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
        return [sys.executable, "-c", script, step.name]

    monkeypatch.setattr(recipe_run, "_argv", argv)
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


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_launcher_that_is_not_there(jobs, tmp_path, monkeypatch) -> None:
    nowhere = str(tmp_path / "launch")
    monkeypatch.setattr(recipe_run, "_argv", lambda step, launch: [nowhere])
    with pytest.raises(RuntimeError, match=f"base cannot be started: .*{nowhere}"):
        run_recipe(small(tmp_path / "out", jobs=jobs), lambda line: None)


def timeless(line: str) -> str:
    return re.sub(r" \d+ s\b", "", line)


def pretend(monkeypatch, script, planned=None) -> None:
    """Each step is a Python script that finds its own name in `name`."""
    head = "import os, pathlib, sys, time; name = sys.argv[1]\n"
    argv = [sys.executable, "-S", "-c", head + script]
    monkeypatch.setattr(recipe_run, "_argv", lambda step, launch: [*argv, step.name])
    monkeypatch.setattr(recipe_run, "_POLL", 0.01)
    if planned is not None:
        monkeypatch.setattr(recipe_run, "steps", lambda config: planned)


def test_steps_at_the_same_time_wait_for_what_they_need(tmp_path, monkeypatch) -> None:
    log = tmp_path / "log"
    pretend(
        monkeypatch,
        f"file = open({str(log)!r}, 'a', buffering=1)\n"
        "print('begin', name, os.environ.get('OMP_NUM_THREADS'), file=file)\n"
        "print('end', name, None, file=file)\n",
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6))
    config = small(tmp_path / "out", jobs=3)
    planned = {step.name: step for step in steps(config)}
    done = run_recipe(config, lambda line: None)
    assert [entry["name"] for entry in done] == list(planned)
    running, ended = set(), set()
    for what, name, threads in map(str.split, log.read_text().splitlines()):
        if what == "end":
            running.remove(name)
            ended.add(name)
            continue
        assert ended.issuperset(planned[name].needs), name
        assert threads == ("None" if name == "speed" else "2")  # a third of the cores
        running.add(name)
        assert len(running) <= 3
    assert ended == set(planned)


FOUR = [Step("a", ("a",)), Step("b", ("b",)), Step("c", ("c",)), Step("d", ("d",), needs=("a",))]


def test_two_steps_run_at_the_same_time(tmp_path, monkeypatch) -> None:
    """Each waits for the other to have begun, and prints to a log of its own."""
    pretend(
        monkeypatch,
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / name).touch()\n"
        "print('from', name)\n"
        "deadline = time.monotonic() + 30\n"
        "while not all((folder / other).exists() for other in 'ab'):\n"
        "    time.sleep(0.01)\n"
        "    if time.monotonic() > deadline: sys.exit(1)\n",
        FOUR[:2],
    )
    said = []
    run_recipe(small(tmp_path / "out", jobs=2), said.append)
    assert said[:2] == ["[1/2] a: a", "[2/2] b: b"] and len(said) == 4
    assert sorted(map(timeless, said[2:])) == ["[1/2] a: ended after", "[2/2] b: ended after"]
    for name in "ab":
        assert (tmp_path / "out/logs" / f"{name}.log").read_text() == f"from {name}\n"


def test_beside_a_failed_step_the_others_end_and_none_begins(tmp_path, monkeypatch) -> None:
    """The same folder goes on with one at a time, and runs only what was not done."""
    told = tmp_path / "told"
    pretend(
        monkeypatch,
        f"told = pathlib.Path({str(told)!r})\n"
        "with (told.parent / 'ran').open('a') as file: file.write(name)\n"
        "if name == 'a' and not told.exists(): sys.exit('first\\nlast words')\n"
        "deadline = time.monotonic() + 30\n"
        "while name == 'b' and not told.exists():\n"
        "    time.sleep(0.01)\n"
        "    if time.monotonic() > deadline: sys.exit(1)\n",
        FOUR,
    )
    said = []

    def say(line: str) -> None:
        said.append(line)
        if "failed" in line:
            told.touch()  # only now b ends

    with pytest.raises(RuntimeError, match="^a failed with exit code 1: a$"):
        run_recipe(small(tmp_path / "out", jobs=2), say)
    log = tmp_path / "out/logs/a.log"
    assert timeless(said[2]) == (
        f"[1/4] a: failed after\nfirst\nlast words\n(the whole log: {log})"
    )
    assert list(map(timeless, said[3:])) == ["[2/4] b: ended after"]
    about, *entries = map(json.loads, (tmp_path / "out" / JOURNAL).read_text().splitlines())
    assert "jobs" not in about and [entry["number"] for entry in entries] == [1]
    (tmp_path / "ran").unlink()
    done = run_recipe(small(tmp_path / "out", jobs=1), said.append)
    assert [entry["name"] for entry in done] == list("abcd")
    assert (tmp_path / "ran").read_text() == "acd"


def test_what_one_at_a_time_began_goes_on_with_two(tmp_path, monkeypatch) -> None:
    ran = tmp_path / "ran"
    script = (
        f"with open({str(ran)!r}, 'a') as file: file.write(name)\n"
        f"sys.exit(name == 'b' and len(open({str(ran)!r}).read()) == 2)\n"
    )
    pretend(monkeypatch, script, FOUR)
    with pytest.raises(RuntimeError, match="b failed"):
        run_recipe(small(tmp_path / "out", jobs=1), lambda line: None)
    run_recipe(small(tmp_path / "out", jobs=2), lambda line: None)
    assert ran.read_text()[:2] == "ab" and sorted(ran.read_text()[2:]) == list("bcd")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_step_ends_with_the_recipe(jobs, tmp_path) -> None:
    """Killed with -9, the recipe leaves no step behind that a second one would meet."""
    step = tmp_path / "step.py"
    step.write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid-' + sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(99)\n"
    )
    names = ["a", "b"][:jobs]
    script = (
        "import sys\n"
        "from lookagain_ext.training import recipe, recipe_run\n"
        f"recipe_run.steps = lambda _: [recipe.Step(name, (name,)) for name in {names}]\n"
        f"recipe_run._argv = lambda step, _: [sys.executable, {str(step)!r}, step.name]\n"
        f"config = recipe.RecipeConfig.load({PACKAGED[0]!r}, output={str(tmp_path / 'out')!r}, "
        f"jobs={jobs})\n"
        "recipe_run.run_recipe(config)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    pids = [tmp_path / f"pid-{name}" for name in names]
    while not all(pid.is_file() and pid.read_text() for pid in pids):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(_alive(int(pid.read_text())) for pid in pids):
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
    page = write_report(config, [{**done[0], "jobs": 2}]).read_text()
    assert "1 commands, 2 minutes in sum, up to 2 at the same time. " in page
    page = write_report(config, done).read_text()
    assert "1 commands, 2 minutes. " in page
    assert "| sft-copy | sft-off | +25.0 | +" in page
    assert "| COPY | 75.0% | 65.0% to 85.0% | 60.3 |" in page
    assert "| 25 % | 55.0% | 45.0% to 65.0% | 120 | 17.9 |" in page
    assert "| paper, first fifth | 2.05 |" in page and "| hardened, last fifth | 1.15 |" in page
    assert "| paper | 3.00 | - | - |\n" in page
    assert "3 questions answered: 2 kept, 1 wrong." in page
    assert "lookagain train sft  # 90 s" in page and "guessing without the picture: 33.7%" in page
    for picture in ("accuracy.png", "brpo.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
