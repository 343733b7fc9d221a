"""What is uploaded is right, holds all that the package needs, and runs with no repository."""

import email
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
from trove_classifiers import classifiers

from pulseopt_hf.report.record_reader import read_run
from tests.conftest import run_command, run_python

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys, pulseopt_hf
from pulseopt_hf.quickstart import main
main(["--max_steps", "20", "--output_dir", "run"])
print(json.dumps([pulseopt_hf.__file__, pulseopt_hf.__version__]))
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and from that the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    run_python("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def run_quickstart(python: Path | str, folder: Path, environment: dict[str, str]) -> str:
    output = run_command(python, "-c", CODE, cwd=folder, env={**os.environ, **environment}).stdout
    assert (folder / "run" / "model.safetensors").exists()
    assert read_run(folder / "run").episodes[-1].end_step == 19
    loaded, version = json.loads(output.strip().splitlines()[-1])
    assert version
    return str(loaded)


def test_twine_accepts_what_is_built(built: Path) -> None:
    pytest.importorskip("twine", reason="install the extra `dev` to run this")
    done = run_python("-m", "twine", "check", "--strict", *built.iterdir())
    assert done.stdout.count("PASSED") == 2, done.stdout


def test_the_project_page_has_links_and_classifiers_that_pypi_knows(wheel: Path) -> None:
    name = wheel.name.removesuffix("-py3-none-any.whl")
    text = zipfile.ZipFile(wheel).read(f"{name}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    assert metadata.get_all("Project-URL") == ["Method, https://pypi.org/project/pulseopt/"]
    found = set(metadata.get_all("Classifier") or [])
    assert len(found) > 8
    assert found <= classifiers
    assert f"Programming Language :: Python :: {metadata['Requires-Python'][2:]}" in found


def test_the_wheel_is_typed_and_has_every_module_and_recipe(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    assert "pulseopt_hf/py.typed" in names
    (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"pulseopt-hf = pulseopt_hf.cli:main" in archive.read(scripts)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pulseopt_hf").rglob("*.py")}
    assets = (ROOT / "pulseopt_hf" / "report" / "assets").iterdir()
    assert modules | {str(path.relative_to(ROOT)) for path in assets} <= names
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.*")}
    library = "pulseopt_hf/recipes/library/"
    assert {f"recipes/{n[len(library) :]}" for n in names if n.startswith(library)} == shipped
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)


@pytest.mark.slow
def test_the_wheel_runs_the_embedded_example(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run_python("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    loaded = run_quickstart(sys.executable, tmp_path, {"PYTHONPATH": str(site)})
    assert loaded.startswith(str(site))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_installs_into_an_empty_environment_and_runs(wheel: Path, tmp_path: Path) -> None:
    run_python("-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    for package in ("torch", wheel):
        run_command(python, *install, package)
    loaded = run_quickstart(python, tmp_path, {"PYTHONPATH": ""})
    assert loaded.startswith(str(tmp_path / "env"))
