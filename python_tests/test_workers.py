"""Into how many processes the tests go."""

from argparse import Namespace

import pytest
from workers import MOST, spread


@pytest.mark.parametrize(
    ("given", "cores", "processes", "dist"),
    [
        ({}, 2, 2, "worksteal"),
        ({}, 64, MOST, "worksteal"),
        ({}, 1, None, "no"),
        ({"dist": "loadfile"}, 2, 2, "loadfile"),
        ({"numprocesses": 0}, 2, 0, "no"),
        ({"numprocesses": 10}, 2, 10, "no"),  # xdist then takes its own default
        ({"capture": "no"}, 2, None, "no"),
        ({"usepdb": True}, 2, None, "no"),
    ],
)
def test_one_for_each_core_unless_told(given, cores, processes, dist) -> None:
    defaults = {"numprocesses": None, "dist": "no", "capture": "fd", "usepdb": False}
    option, environment = Namespace(**{**defaults, **given}), {}
    spread(option, environment, cores)
    assert (option.numprocesses, option.dist) == (processes, dist)
    assert environment == ({"OMP_NUM_THREADS": "1"} if processes else {})


def test_a_worker_starts_no_workers(pytestconfig) -> None:
    option, environment = Namespace(numprocesses=None), {"PYTEST_XDIST_WORKER": "gw0"}
    spread(option, environment, 2)
    assert option.numprocesses is None and len(environment) == 1
    if hasattr(pytestconfig, "workerinput"):
        assert not pytestconfig.option.numprocesses


def test_without_xdist_there_is_one_process() -> None:
    option = Namespace(usepdb=False, capture="fd")
    spread(option, environment := {}, 2)
    assert vars(option) == {"usepdb": False, "capture": "fd"} and environment == {}
