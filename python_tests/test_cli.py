"""The command as a person meets it: what it prints, what it writes, how it says no."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging
from typer.testing import CliRunner

import lookagain_ext
from lookagain_ext import plots
from lookagain_ext.cli import app
from lookagain_ext.commands import inputs
from lookagain_ext.commands.errors import UserError
from lookagain_ext.commands.printing import styled
from lookagain_ext.synthetic.processor import to_rgb
from lookagain_ext.synthetic.tiny import build_tiny
from lookagain_ext.template import TAGS

SCRIPT = (
    "<SUMMARY>How many red shapes?</SUMMARY> <REASONING>I count row by row.</REASONING> "
    "<REFLECTION>B2 is 1, C4 is 2.</REFLECTION> <CONCLUSION>2</CONCLUSION><|im_end|>"
)


class Recite(LogitsProcessor):
    """Makes a model write one text, whatever it thinks."""

    def __init__(self, ids):
        self.ids, self.written = ids, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[self.written % len(self.ids)]] = 0
        self.written += 1
        return forced


@pytest.fixture(scope="module")
def tiny():
    """An untrained model, small enough to be quick."""
    return build_tiny(text_layers=2, vision_layers=1)


@pytest.fixture
def reciting(tiny, monkeypatch):
    """Every --model is the tiny one, and writes SCRIPT."""
    model, processor = tiny
    ids = processor.tokenizer.encode(SCRIPT)
    plain = type(model).generate

    def generate(**kwargs):
        script = LogitsProcessorList([Recite(ids)])
        return plain(model, logits_processor=script, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(inputs, "load_model", lambda name, device=None: (model, processor))


@pytest.fixture
def no_plots(monkeypatch):
    """For tests that do not look at the pictures: drawing them takes longer than answering."""
    for name in ("overlay", "curve"):
        monkeypatch.setattr(plots, name, lambda *args: None)


@pytest.fixture
def picture(tmp_path):
    """A picture that is no drawn scene."""
    path = tmp_path / "picture.png"
    Image.effect_noise((120, 90), 50).save(path)
    return path


def lookagain(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args):
    """The one line on stderr with which a call is refused."""
    result = lookagain(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")
    return result.stderr.strip()


# --- asking ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "shown"), [("copy", 36), ("route", 18)])
def test_ask_prints_the_answer_and_marks_the_reflection(
    reciting, no_plots, picture, tmp_path, strategy, shown
):
    result = lookagain("ask", picture, "How many?", "-s", strategy, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:4] == [
        "<SUMMARY>How many red shapes?</SUMMARY>",
        "<REASONING>I count row by row.</REASONING>",
        f"<REFLECTION> ⟲ looked again: {shown} of 36 visual tokens",
        "B2 is 1, C4 is 2.</REFLECTION>",
    ]
    assert lines[4] == "<CONCLUSION>2</CONCLUSION>"
    assert "<|im_end|>" not in result.stdout
    assert "\x1b" not in result.stdout


def test_ask_with_off_says_that_the_reflection_is_text_only(reciting, no_plots, picture, tmp_path):
    result = lookagain("ask", picture, "How many?", "-s", "off", "-o", tmp_path / "out")
    assert "<REFLECTION> ⟲ text only\n" in result.stdout


def test_ask_writes_two_pictures_and_the_trace_and_says_where(reciting, picture, tmp_path):
    out = tmp_path / "a" / "b"
    result = lookagain("ask", picture, "How many?", "-s", "route", "--ratio", 0.25, "-o", out)
    for name in ("overlay.png", "curve.png", "trace.json"):
        assert str(out / name) in result.stdout
    assert Image.open(out / "overlay.png").width > 800
    assert Image.open(out / "curve.png").width > 800
    trace = json.loads((out / "trace.json").read_text())
    assert trace["conclusion"] == "2"
    assert (trace["strategy"], trace["ratio"]) == ("route", 0.25)
    assert trace["tokens"][trace["reflections"][0]["step"]] == "<REFLECTION>"
    assert trace["tokens"][trace["reflections"][0]["end"] - 1] == "</REFLECTION>"
    assert sum(trace["reflections"][0]["shown"]) == 9
    assert len(trace["attention"]) == len(trace["tokens"]) - 1 == trace["generated_tokens"] - 1
    assert all(0 < share < 1 for share in trace["attention"])


def test_an_answer_that_was_cut_off_is_said_to_be(tiny, reciting, no_plots, picture, tmp_path):
    result = lookagain("ask", picture, "Why?", "--max-new-tokens", 5, "-o", tmp_path / "out")
    assert "cut off: give it more with --max-new-tokens" in result.stdout
    assert result.exit_code == 0
    length = len(tiny[1].tokenizer.encode(SCRIPT))
    result = lookagain("ask", picture, "Why?", "--max-new-tokens", length, "-o", tmp_path / "out")
    assert f"{length} tokens in" in result.stdout and "cut off" not in result.stdout


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_any_kind_of_picture_can_be_read(tiny, tmp_path, mode):
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "I;16") else "picture.png")
    source = Image.effect_noise((50, 30), 80)
    (source.convert("I").convert(mode) if mode == "I;16" else source.convert(mode)).save(path)
    picture = to_rgb(inputs.read_picture(path))
    assert (picture.mode, picture.size) == ("RGB", (50, 30))
    assert picture.getextrema()[0][1] > 100


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert inputs.read_picture(tmp_path / "photo.jpg").size == (20, 40)


def test_demo_shows_three_strategies_with_the_right_answer(reciting, no_plots, tmp_path):
    result = lookagain("demo", "--seed", 5, "-o", tmp_path)
    assert result.exit_code == 0, result.stderr
    for words in ("copy: all", "route: the", "off: text only", "right answer:", "--seed 5"):
        assert words in result.stdout
    for strategy in ("copy", "route", "off"):
        assert json.loads((tmp_path / strategy / "trace.json").read_text())["conclusion"] == "2"
    assert (tmp_path / "scene.png").exists()
    answer = re.search("right answer: (.*)", result.stdout)[1].strip()
    assert ("✓ 2" in result.stdout) == (answer == "2")


def test_a_whole_answer_has_a_line_for_each_block():
    said = styled(
        "<REFLECTION> <REFLECTION>A</REFLECTION> <CONCLUSION> 2 </CONCLUSION>", ["x", "y"]
    )
    assert said.plain.splitlines() == [
        "<REFLECTION> ⟲ x",
        "<REFLECTION> ⟲ y",
        "A </REFLECTION>",
        "<CONCLUSION> 2 </CONCLUSION>",
    ]


# --- mistakes -------------------------------------------------------------------------------


def test_no_such_picture(tmp_path):
    assert f"there is no file {tmp_path}/none.png" in refused("ask", tmp_path / "none.png", "Why?")


def test_a_folder_for_a_picture(tmp_path):
    assert "is a folder" in refused("ask", tmp_path, "Why?")


def test_a_pipe_for_a_picture(tmp_path):
    """It is refused before it is opened: that would wait for a writer."""
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png is no file" in refused("ask", tmp_path / "pipe.png", "Why?")


def test_a_question_for_a_picture():
    said = refused("ask", "How many red shapes are there? " * 20, "picture.png")
    assert "may not be read (File name too long)" in said


def test_a_text_file_for_a_picture(tmp_path):
    (tmp_path / "notes.png").write_text("no pixels here")
    said = refused("ask", tmp_path / "notes.png", "Why?")
    assert "notes.png is not a picture. PNG, JPEG" in said


def test_half_a_picture(picture):
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a picture" in refused("ask", picture, "Why?")


def test_percent_for_a_ratio(picture):
    said = refused("ask", picture, "Why?", "-s", "route", "--ratio", 50)
    assert said == "error: --ratio must be between 0 and 1, got 50. For 50 % say --ratio 0.5."


@pytest.mark.parametrize("ratio", ["-0.1", "nan", "inf"])
def test_other_wrong_ratios(picture, ratio):
    assert "--ratio must be between 0 and 1" in refused("ask", picture, "Why?", f"--ratio={ratio}")


def test_misspelt_strategy(picture):
    said = refused("ask", picture, "Why?", "--strategy", "rout")
    assert said.endswith("got 'rout'. Did you mean route?")


def test_empty_question(picture):
    assert "the question is empty" in refused("ask", picture, "  ")


def test_a_question_that_is_no_text(picture, tmp_path):
    said = refused("ask", picture, os.fsdecode(b"Why \xff?"), "--out", tmp_path / "out")
    assert "the question is not UTF-8 text, from character 5 on" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", ["99999999999999999999999", "-1"])
@pytest.mark.parametrize("command", [("ask", "a.png", "Why?"), ("demo",), ("scene", "a.png")])
def test_a_seed_that_no_generator_takes(tmp_path, monkeypatch, command, seed):
    monkeypatch.chdir(tmp_path)
    result = lookagain(*command, "--seed", seed)
    assert result.exit_code == 2
    assert "Invalid value for '--seed'" in result.stderr


def test_negative_temperature(picture):
    assert "--temperature must be 0 or more" in refused("ask", picture, "Why?", "-t", "-1")


def test_a_file_where_the_results_should_go(picture):
    assert f"cannot write to {picture}" in refused("ask", picture, "Why?", "--out", picture)


def test_a_model_without_the_reflection_token(tiny, picture, monkeypatch):
    model, processor = tiny
    real = inputs.reflection_token
    assert real(processor.tokenizer) is not None
    monkeypatch.setattr(inputs, "load_model", lambda name, device=None: (model, processor))
    monkeypatch.setattr(inputs, "reflection_token", lambda tokenizer: None)
    said = refused("ask", picture, "Why?", "-m", "some/model")
    assert said.startswith("error: some/model has no <REFLECTION> token")
    assert "--strategy off" in said and "add_reflection_tokens" in said


def test_a_model_without_the_reflection_token_answers_with_off(
    reciting, no_plots, picture, tmp_path, monkeypatch
):
    monkeypatch.setattr(inputs, "reflection_token", lambda tokenizer: None)
    result = lookagain("ask", picture, "Why?", "-s", "off", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["reflections"] == []


def test_no_such_model(picture, tmp_path):
    said = refused("ask", picture, "Why?", "-m", tmp_path / "none")
    assert f"{tmp_path}/none" in said and "--model takes lookagain-tiny, a folder" in said


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99", "mps:7", "hpu"])
def test_a_device_that_is_not_there(picture, tmp_path, device):
    said = refused("ask", picture, "Why?", "--out", tmp_path / "out", "--device", device)
    assert said.startswith("error: --device") and device in said
    assert "cpu is always there" in said


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_model(picture, tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(logging, "_tqdm_active", False)  # no bar beside the one line
    folder = tmp_path / "model"
    shutil.copytree(files("lookagain_ext") / "weights" / "lookagain-tiny", folder)
    whole = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(whole[: len(whole) // 2])
    said = refused("ask", picture, "Why?", "--out", tmp_path / "out", "--model", folder)
    assert str(folder) in said and "--model takes" in said


def test_a_text_model(picture, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    said = refused("ask", picture, "Why?", "-m", tmp_path)
    assert "text-only" in said


def test_no_such_training_configuration(tmp_path):
    said = refused("train", "sft", "--config", tmp_path / "none.yaml")
    assert "no configuration" in said and "tiny.yaml" in said


def test_names_in_brackets_are_no_markup(reciting, no_plots, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("x[/y]", "x[red]"):
        result = lookagain("ask", picture, "Why?", "--out", out, "--model", "[/m]")
        assert result.exit_code == 0, result.output
        assert f"{out}/overlay.png  where it looked\n" in result.stdout
    result = lookagain("scene", "b[/z].png")
    assert result.exit_code == 0, result.output
    assert "b[/z].png  " in result.stdout


def test_names_that_are_no_text(reciting, no_plots, picture, tmp_path):
    name = os.fsdecode(b"\xff")
    picture = picture.rename(picture.with_name(f"{name}.png"))
    result = lookagain("ask", picture, "Why?", "--out", tmp_path / name)
    assert result.exit_code == 0, result.output
    assert r"\udcff/overlay.png" in result.stdout
    trace = json.loads((tmp_path / name / "trace.json").read_text())
    assert trace["image"] == str(picture)


def test_a_scene_in_no_format(tmp_path):
    assert "End the name in .png" in refused("scene", tmp_path / "scene")


def test_messages_are_one_line_whatever_they_quote():
    assert str(UserError("two\nlines.", "a\n hint")) == "error: two lines. a hint"


# --- the small commands ---------------------------------------------------------------------


def test_scene_is_the_same_for_the_same_seed(tmp_path):
    outputs = [lookagain("scene", tmp_path / f"{i}.png", "--seed", 7).stdout for i in range(2)]
    assert Image.open(tmp_path / "0.png").tobytes() == Image.open(tmp_path / "1.png").tobytes()
    assert outputs[0].replace("0.png", "1.png") == outputs[1]
    assert "comparison" in outputs[0]


def test_info_tells_versions_and_instruction_set():
    result = lookagain("info")
    assert result.exit_code == 0
    assert lookagain_ext.__version__ in result.stdout
    assert torch.__version__ in result.stdout


def test_training_finds_the_packaged_configuration_anywhere(monkeypatch, tmp_path):
    from lookagain_ext.training import sft

    seen = []
    monkeypatch.setattr(sft, "train", lambda config, **options: seen.append((config, options)))
    monkeypatch.chdir(tmp_path)
    assert lookagain("train", "sft", "--out", tmp_path / "run", "--no-resume").exit_code == 0
    ((config, options),) = seen
    assert config.stages
    assert options == {"output": tmp_path / "run", "resume": False}


def test_bench_hands_over_its_options(monkeypatch, tmp_path):
    import lookagain_ext.bench

    seen = []
    monkeypatch.setattr(lookagain_ext.bench, "run", lambda *args: seen.append(args))
    assert lookagain("bench", "--quick", "--out", tmp_path / "b.json").exit_code == 0
    assert lookagain("bench", "--suite", "decode", "--suite", "append").exit_code == 0
    assert seen == [(True, tmp_path / "b.json", None), (False, None, ["decode", "append"])]


def test_version():
    assert lookagain("--version").stdout == f"lookagain_ext {lookagain_ext.__version__}\n"


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from lookagain_ext.cli import app\n"
        "try: app(['ask', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'matplotlib', 'numpy'} & {*sys.modules}\n"
        "sys.exit(', '.join(sorted(slow)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_public_names_can_be_had_and_are_listed():
    for name in lookagain_ext.__all__:
        assert getattr(lookagain_ext, name) is not None
    assert set(lookagain_ext.__all__) <= set(dir(lookagain_ext))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        lookagain_ext.nonsense  # noqa: B018


def test_doctor_stays_a_function_when_its_module_is_imported():
    code = (
        "import lookagain_ext.doctor; from lookagain_ext.doctor import DoctorReport\n"
        "assert lookagain_ext.doctor.__name__ == 'doctor' and callable(lookagain_ext.doctor)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_doctor_prints_its_findings(tiny, monkeypatch):
    model, processor = tiny
    monkeypatch.setattr(inputs, "load_model", lambda name, device=None: (model, processor))
    result = lookagain("doctor", "some/model")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "Looking again holds on this model." in result.stdout


def test_every_tag_is_printed_whole(tiny):
    """The tags are single tokens, so that the printer can dim them as they come."""
    vocabulary = tiny[1].tokenizer.get_vocab()
    assert all(tag in vocabulary for tag in TAGS)


def test_cold_start_data(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"output: {tmp_path / 'run'}\nmodel: lookagain-tiny\ndata: {{scenes: 3}}\n")
    command = ["train", "coldstart", "--config", str(plan), "--data-only"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "3 of 3 records: 3 whole" in done.output
    assert (tmp_path / "run/data/reflected.jsonl").read_text().count("<REFLECTION>") == 3
    plan.write_text("output: x\n")
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "the configuration needs data, model" in refused.output


def test_one_part_of_the_benchmarks():
    refused = CliRunner().invoke(app, ["bench", "--suite", "decoding"])
    assert refused.exit_code == 2 and "suite must be one of decode," in refused.output
