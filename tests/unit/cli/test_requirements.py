"""What the services import is what the requirement files install."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PINNED = re.compile(r"^[A-Za-z0-9_.-]+==[^\s=*]+$")


def requirement_lines(*names):
    texts = [(REPOSITORY / "requirements" / name).read_text() for name in names]
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def imported_packages(folder):
    for path in folder.rglob("*.py"):
        if path.parent.name == "v1":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.partition(".")[0], path


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_that_the_services_import_is_installed_by_mesh_txt():
    installed = {
        normal(line.partition("==")[0]) for line in requirement_lines("mesh.txt", "mesh-no-deps.txt", "xds.txt")
    }
    distributions = packages_distributions()
    missing = set()
    for package, path in imported_packages(REPOSITORY / "services" / "tidegate"):
        if package in sys.stdlib_module_names or package in {"tidegate", "xds", "udpa"}:
            continue
        if not installed & {normal(name) for name in distributions.get(package, [])}:
            missing.add(f"{package} ({path.relative_to(REPOSITORY)})")
    assert missing == set()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned_and_names_no_address(path):
    assert [line for line in requirement_lines(path.name) if not PINNED.match(line)] == []
