"""The house has floors, and imports go down only."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What each floor must not bring into memory, directly or through what it imports.
FORBIDDEN = {
    "pulseopt_hf": ["torch", "transformers", "accelerate", "pulseopt_hf.config"],
    "pulseopt_hf.config": ["torch", "transformers", "pulseopt_hf.aees", "pulseopt_hf.optim"],
    "pulseopt_hf.aees": ["torch", "numpy", "transformers", "pulseopt_hf.optim"],
    "pulseopt_hf.optim": ["transformers", "accelerate", "pulseopt_hf.trainer"],
    "pulseopt_hf.trainer": [
        *("pulseopt_hf.quickstart", "pulseopt_hf.progress", "pulseopt_hf.cli"),
        "pulseopt_hf.report",
    ],
    "pulseopt_hf.report.record_reader": [
        *("torch", "transformers", "numpy", "altair", "jinja2", "pulseopt_hf.recipes"),
    ],
}


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_a_floor_imports_nothing_from_above(floor: str) -> None:
    code = f"import {floor}, sys; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert floor in output
    assert [name for name in FORBIDDEN[floor] if name in output] == []


def test_every_public_name_is_loaded_when_it_is_used() -> None:
    code = (
        "import pulseopt_hf, sys\n"
        "pulseopt_hf.PulseOptConfig()\n"
        "assert 'torch' not in sys.modules\n"
        "pulseopt_hf.AEES\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
        "for name in pulseopt_hf.__all__: getattr(pulseopt_hf, name)\n"
        "assert 'transformers' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import pulseopt_hf

    with pytest.raises(AttributeError, match="no attribute 'PulseOptTrainr'"):
        pulseopt_hf.PulseOptTrainr  # noqa: B018
