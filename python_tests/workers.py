"""How the tests are spread over the cores: with pytest-xdist, a process for each.

Not by addopts: there -n would be an error without pytest-xdist, and would also hold for benchmarks,
which are to be measured in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import MutableMapping

MOST = 8  # each process holds torch and small models: up to 1 GB


def spread(option: argparse.Namespace, environment: MutableMapping[str, str], cores: int) -> None:
    """Set how many processes run the tests, unless -n says so or they are watched (-s, --pdb).

    Args:
        option: of pytest; changed.
        environment: of the processes; each is to have one thread, so that they do not fight.
        cores: that this process may use.
    """
    # A worker is asked too, without the -n that it came from: it would start workers of its own.
    if "PYTEST_XDIST_WORKER" in environment or not hasattr(option, "numprocesses"):
        return
    watched = option.usepdb or option.capture == "no"
    if option.numprocesses is None and cores > 1 and not watched:
        option.numprocesses = min(cores, MOST)
        if option.dist == "no":  # neighbours share models; who has no test left takes some
            option.dist = "worksteal"
    if option.numprocesses:
        environment.setdefault("OMP_NUM_THREADS", "1")
