"""Marks for what upstream could not do in the oldest versions that this package allows."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, lowest: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test below a version of a package.

    Args:
        package: name of the distribution.
        lowest: first version known to do it; not all between it and the oldest one were tried.
        reason: what upstream does otherwise.
    """
    found = Version(version(package))
    return pytest.mark.skipif(
        found < Version(lowest), reason=f"{package} {found} {reason}; runs from {lowest} on"
    )
