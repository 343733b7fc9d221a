"""The house has floors, and imports go down only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import run_python

# What each floor must not bring into memory, directly or through what it imports.
FORBIDDEN = {
    "pulseopt_hf": ["torch", "transformers", "accelerate", "pulseopt_hf.config"],
    "pulseopt_hf.config": ["torch", "transformers", "pulseopt_hf.aees", "pulseopt_hf.optim"],
    "pulseopt_hf.aees": ["torch", "numpy", "transformers", "pulseopt_hf.optim"],
    "pulseopt_hf.optim": ["transformers", "accelerate", "pulseopt_hf.trainer"],
    "pulseopt_hf.trainer": [
        *("pulseopt_hf.quickstart", "pulseopt_hf.cli"),
        "pulseopt_hf.report",
    ],
    "pulseopt_hf.report.record_reader": [
        *("torch", "transformers", "numpy", "altair", "jinja2", "pulseopt_hf.recipes"),
    ],
}


PACKAGE = Path(__file__).parents[1] / "pulseopt_hf"
# From the lowest floor up. A floor imports those below it; names that share a line share a floor.
FLOORS = [
    {"pulseopt_hf", "config", "errors", "files", "embedded"},  # the package loads names lazily
    {"aees"},
    {"optim"},
    {"trainer"},
    {"command_line"},
    {"recipes", "report"},
    {"compare"},
    {"cli"},
    {"__main__", "quickstart"},
]
# Methods of public classes that import what they are a short form of, when they are called.
SHORT_FORMS = {
    ("pulseopt_hf.optim.suggestion", "pulseopt_hf.report"),  # plot
    ("pulseopt_hf.trainer.callback", "pulseopt_hf.trainer.mixin"),  # attach
    ("pulseopt_hf.trainer.mixin", "pulseopt_hf.trainer.find"),  # find_learning_rate
}


def modules() -> dict[str, Path]:
    """Return the package's files by the names of their modules."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield everything in a module but what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


def imported(module: str) -> set[str]:
    """Return the modules of the package that a module imports, in functions too."""
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() or {node.module}
    return (found & MODULES.keys()) - {module}


IMPORTS = [(module, other) for module in MODULES for other in imported(module)]


def floor_of(module: str) -> int:
    (name,) = module.split(".")[1:2] or [module]
    return next(level for level, names in enumerate(FLOORS) if name in names)


def is_short_form(module: str, other: str) -> bool:
    return any(module == one and other.startswith(target) for one, target in SHORT_FORMS)


def test_no_file_imports_one_of_a_floor_above_it() -> None:
    up = [(a, b) for a, b in IMPORTS if floor_of(b) > floor_of(a) and not is_short_form(a, b)]
    assert up == []


def test_no_two_files_import_each_other() -> None:
    imports = {(a, b) for a, b in IMPORTS if not is_short_form(a, b)}
    assert [(a, b) for a, b in imports if (b, a) in imports] == []


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_a_floor_imports_nothing_from_above(floor: str) -> None:
    code = f"import {floor}, sys; print(*sys.modules)"
    output = run_python("-c", code).stdout.split()
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
    run_python("-c", code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import pulseopt_hf

    with pytest.raises(AttributeError, match="no attribute 'PulseOptTrainr'"):
        pulseopt_hf.PulseOptTrainr  # noqa: B018
