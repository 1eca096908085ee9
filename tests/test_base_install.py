"""The base install by itself, on the oldest Python that we claim and on the usual one: no torch, no ray, no redis.

The environments (.venv-base310, .venv-base311) are made once and made anew when pyproject.toml or a constraint changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROBOT_SIDE = """
import importlib, pathlib, sys
paths = [p for folder in ("fleet", "actors") for p in pathlib.Path(folder).rglob("*.py")]
left_out = ("fleet/server/", "actors/robots/", "actors/operators/")
for path in [*paths, pathlib.Path("infra/cli.py")]:
    name = path.as_posix()
    if name.startswith(left_out) and path.name != "__init__.py" or name.endswith("_lerobot.py"):
        continue
    importlib.import_module(name[:-3].replace("/", ".").replace(".__init__", ""))
heavy = {"torch", "ray", "redis", "matplotlib", "gymnasium", "scipy"} & set(sys.modules)
print("python", "%d.%d" % sys.version_info[:2], "heavy", sorted(heavy))
"""


def find_python(version: str) -> Path | None:
    """An interpreter of this version that runs: this one, on PATH (where pyenv may put a shim that does not), or pyenv's."""
    if "%d.%d" % sys.version_info[:2] == version:  # noqa: UP031
        return Path(sys.executable)
    found = [shutil.which(f"python{version}")]
    found += [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python{version}"))]
    for name in filter(None, found):
        asked = [name, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == version:
            return Path(name)
    return None


def base_environment(folder: Path, python: Path, constraints: Path) -> Path:
    """The folder's bin/, with the base dependencies and this checkout installed in it."""
    content = (ROOT / "pyproject.toml").read_bytes() + constraints.read_bytes() + str(ROOT).encode()
    stamp, wanted = folder / "ready", hashlib.sha256(content).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        install = [
            folder / "bin/python",
            "-m",
            "pip",
            "install",
            "-qq",
            "--disable-pip-version-check",
            "-c",
            constraints,
            "-e",
            ROOT,
        ]
        done = subprocess.run(install, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        stamp.write_text(wanted)
    return folder / "bin"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("version", "constraints"), [("3.10", "base-py310.txt"), ("3.11", "main.txt")])
def test_base_install_joins(version: str, constraints: str) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} with venv on PATH or under ~/.pyenv/versions: the base install was not tried on it")
    folder = ROOT / f".venv-base{version.replace('.', '')}"
    bin_folder = base_environment(folder, python, ROOT / "constraints" / constraints)

    installed = subprocess.run(
        [bin_folder / "python", "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True
    ).stdout
    assert not {"torch", "ray", "redis"} & {line.split("==")[0] for line in installed.splitlines()}
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    for command in ([bin_folder / "fleet", "join", "--help"], [bin_folder / "fleet", "--help"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd="/")
        assert done.returncode == 0, done.stderr
        assert "join" in done.stdout
    loaded = subprocess.run([bin_folder / "python", "-c", ROBOT_SIDE], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == f"python {version} heavy []"
