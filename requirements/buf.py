"""Runs buf over protos/ with the imports of Google's common protos beside them.

buf finds imports in its workspace or in a registry; here the workspace is put together for one run, from our
files and those of the package googleapis-common-protos. Only ours are judged.

Usage: python requirements/buf.py lint | breaking
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
BUF = Path(sys.executable).parent / "buf"
BASE_VARIABLE = "BREAKING_BASE"
"""The commit that wire compatibility is judged against; default: origin/main, else the last tag, else HEAD."""


def main(arguments: list[str]) -> int:
    """Runs one of buf's judgements."""
    if arguments not in (["lint"], ["breaking"]):
        print("usage: buf.py lint | breaking", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory) / "here"
        shutil.copytree(ROOT / "protos", here / "protos")
        add_imports(here)
        if arguments == ["lint"]:
            return run(here, "lint", "protos")
        base = base_commit()
        if base is None:
            print("no base to compare the protos with")
            return 0
        before = Path(directory) / "before"
        before.mkdir()
        archive = subprocess.run(["git", "archive", base, "protos"], cwd=ROOT, capture_output=True, check=True)
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as content:
            content.extractall(before, filter="data")
        add_imports(before)
        return run(here, "breaking", "protos", "--against", str(before))


def add_imports(workspace: Path) -> None:
    """Makes the folder a workspace of two modules: our protos, and Google's that they import."""
    for package in ("api", "rpc"):
        for source in (SITE_PACKAGES / "google" / package).glob("*.proto"):
            target = workspace / "imports" / "google" / package / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    own = yaml.safe_load((workspace / "protos" / "buf.yaml").read_text(encoding="utf-8"))
    (workspace / "protos" / "buf.yaml").unlink()
    own["modules"] = [
        {"path": "protos"},
        {"path": "imports", "lint": {"use": ["MINIMAL"], "ignore": ["imports"]}, "breaking": {"ignore": ["imports"]}},
    ]
    (workspace / "buf.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")


def run(workspace: Path, verb: str, *arguments: str) -> int:
    """Runs buf in the workspace, with a cache that ends with it."""
    environment = os.environ | {"BUF_CACHE_DIR": str(workspace / ".cache")}
    options = [] if verb == "lint" else list(arguments[1:])
    target = arguments[0] if verb == "lint" else "."
    return subprocess.run([str(BUF), verb, target, *options], cwd=workspace, env=environment, check=False).returncode


def base_commit() -> str | None:
    """The commit to compare with; None where there is none, or it has no protos."""
    named = os.environ.get(BASE_VARIABLE)
    for candidate in [named] if named else ["origin/main", git("describe", "--tags", "--abbrev=0"), "HEAD"]:
        if candidate and git("rev-parse", "--verify", "--quiet", f"{candidate}:protos/tidegate/v1"):
            return candidate
    return None


def git(*arguments: str) -> str:
    """What git says; empty when it cannot say it, or this is no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
