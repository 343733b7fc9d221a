"""What the tests on a GPU share: they are skipped without one, and compute the same every time."""

import os
from collections.abc import Callable, Iterator
from typing import Any

# cuBLAS has to know before it is used that its results are to be the same every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> Iterator[torch.device]:
    """The GPU, with deterministic kernels only."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    kernels = torch.backends.cuda
    kernels.enable_flash_sdp(False)
    kernels.enable_mem_efficient_sdp(False)
    kernels.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield torch.device("cuda", 0)
    torch.use_deterministic_algorithms(False)
    kernels.enable_flash_sdp(True)
    kernels.enable_mem_efficient_sdp(True)
    kernels.enable_cudnn_sdp(True)


@pytest.fixture
def on_gpu(arguments: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of training arguments as `arguments` is, but for one GPU."""

    def make(**overrides: Any) -> Any:
        made = arguments(**{"use_cpu": False, **overrides})
        made._n_gpu = min(1, made.n_gpu)  # without replicas where there are several
        return made

    return make
