"""Fixtures shared by all tests, and how these are spread over the cores."""

import os
import threading
from collections.abc import Iterator

import emulated
import pytest
import torch
import workers
from fake_endpoint import Endpoint

from lookagain_ext._native import native


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """See `workers`; xdist reads these options after this."""
    workers.spread(config.option, os.environ, len(os.sched_getaffinity(0)))


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Every device that the ops have kernels for; CUDA cases skip without one.

    "emulated": the CUDA kernels on the host, with CPU tensors.
    """
    if request.param == "emulated":
        emulated.install(monkeypatch)
        return torch.device("cpu")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled instruction set that this machine has."""
    module = native()
    if request.param not in module.build_info()["isas"]:
        pytest.skip(f"{request.param} is not compiled in")
    in_use = module.build_info()["isa"]
    try:
        module.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.set_isa(in_use)


@pytest.fixture
def set_threads():
    """torch.set_num_threads; the number of before is set again at the end."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(set_threads):
    """Tiny models run fifty times faster when their layers are not spread over threads."""
    set_threads(1)


@pytest.fixture
def endpoint():
    """Starts small chat endpoints on this machine; all are closed at the end."""
    started = []

    def start(*replies) -> Endpoint:
        server = Endpoint(*replies)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
