"""The README tells the truth: its examples run, its tables name what there is."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from lookagain_ext import bench, config
from lookagain_ext.synthetic.scenes import Scene
from lookagain_ext.synthetic.tiny import SHIPPED

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def text():
    return README.read_text(encoding="utf-8")


def example(text, name):
    """The block of code after a marker."""
    found = re.search(rf"<!-- test:{name} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md has no example marked test:{name}"
    return found[1]


def test_routed_attention_example(text):
    names = {}
    exec(example(text, "routed"), names)
    assert names["out"].shape == (1, 300, 512)
    queries = 300 - 15  # those that see the picture give it a part of 8 heads each
    assert 0 < names["mass"].sum() < 8 * queries
    assert torch.isfinite(names["out"]).all()


def test_huggingface_example(text, tmp_path, monkeypatch, capsys):
    Scene.random(3).render().save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    code = example(text, "huggingface").replace("max_new_tokens=512", "max_new_tokens=20")
    exec(code, {})
    assert "Row 0 (1 image, 36 visual tokens)" in capsys.readouterr().out


def test_configuration_table_has_every_field_and_default(text):
    section = text.split("## Configuration")[1].split("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section, re.MULTILINE)
    fields = dataclasses.fields(config.LookAgainConfig)
    expected = [(f.name, repr(f.default).replace("'", '"')) for f in fields]
    assert sorted(rows) == sorted(expected)


def test_accuracy_of_the_small_model_is_that_of_the_shipped_weights(text):
    metrics = json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))
    low, high = metrics["interval"]
    row = (
        f"{metrics['accuracy']:.1%} | {100 * low:.1f} to {high:.1%} | "
        f"{metrics['guessing']['all']:.1%} |"
    )
    assert row.replace("%", " %") in text
    assert f"{metrics['questions']} questions" in text


def test_measured_ratios_are_those_kept(text):
    section = re.search(r"<!-- bench: (\S+) -->\n(.*?)\n<!-- /bench -->", text, re.DOTALL)
    kept = json.loads((README.parent / section[1]).read_text(encoding="utf-8"))
    assert section[2] == bench.markdown(kept)


def test_pictures_and_files_that_it_shows_exist(text):
    for path in re.findall(r"!?\[[^]]*\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / path).exists(), path


def test_ci_finds_the_test_command(text):
    found = re.search(
        r"<!-- ci:test -->\n```sh\n(pip install torch==[\d.]+ && .*pytest)\n```", text
    )
    assert found
