"""The trainers without the extra `train`."""

import importlib
import sys

import pytest

from lookagain_ext.commands.errors import UserError
from lookagain_ext.commands.train import run_trl


@pytest.mark.parametrize("name", ["brpo", "trl_sft", "trl_run"])
def test_the_extra_is_named(name, monkeypatch):
    for package in ("trl", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    for module in ("brpo", "trl_sft", "trl_run"):
        monkeypatch.delitem(sys.modules, f"lookagain_ext.training.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lookagain_ext\[train\]'"):
        importlib.import_module(f"lookagain_ext.training.{name}")
    with pytest.raises(UserError, match=r"pip install 'lookagain_ext\[train\]'"):
        run_trl("brpo", "configs/tiny/brpo.yaml", None, None, True)


def test_helpers_need_no_extra():
    for name in ("looking", "trainable", "run_config"):
        importlib.import_module(f"lookagain_ext.training.{name}")
