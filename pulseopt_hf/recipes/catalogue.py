"""The recipes that come with the package, by name. Loads neither torch nor Transformers."""

from __future__ import annotations

from pathlib import Path

from pulseopt_hf.errors import UsageError, nearest

RECIPE = "recipe.yaml"  # in a run's folder
LAUNCH = "launch/"  # the folder of Accelerate's launch profiles, which are not recipes
SLURM = "launch/slurm.sh"


def folder() -> Path:
    """Return the folder of the YAML files: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "library"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def names() -> list[str]:
    """Return the names of all recipes, such as `glue/sst2`."""
    return [name for name in _all() if not name.startswith(LAUNCH)]


def profiles() -> list[str]:
    """Return the names of all launch profiles, such as `launch/ddp`."""
    return [name for name in _all() if name.startswith(LAUNCH) and name != SLURM]


def find(name: str) -> Path:
    """Return the file of a recipe, a launch profile or `SLURM`, by its name or its path."""
    if name in _all():
        return _all()[name]
    path = Path(name)
    if path.is_file():
        return path
    if (path / RECIPE).is_file():
        raise UsageError(f"{name}: is a folder; did you mean `{path / RECIPE}`?")
    if path.suffix in (".yaml", ".yml") or path.is_absolute():
        raise UsageError(f"{name}: there is no such file.")
    kind = "launch profile" if name.startswith(LAUNCH) else "recipe"
    close = nearest(name, _all()) or "."
    raise UsageError(f"Unknown {kind} `{name}`{close} `pulseopt-hf list` shows all.")


def _all() -> dict[str, Path]:
    """Return every file by its name, which has an ending only if that is not `.yaml`."""
    root = folder()
    files = sorted(file for file in root.rglob("*") if file.suffix in (".yaml", ".sh"))
    return {file.relative_to(root).as_posix().removesuffix(".yaml"): file for file in files}
