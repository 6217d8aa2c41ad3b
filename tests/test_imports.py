"""Who imports whom: every import of ours against the table in CONTRIBUTING.md."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import ROOT
from finetune.families import FAMILIES

# What the patches of upstream models may stand on, besides Python itself.
UPSTREAM = {"moshi", "torch", "transformers"}
HEADING = "## Who may import whom"
FAMILY_NAMES = {*FAMILIES, *(path.parent.name for path in ROOT.glob("finetune/families/*/__init__.py"))}


def module_name(path: Path) -> str:
    """`loss`, `data.types`, `train`: as in the table, without the `finetune.` before it."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts).removeprefix("finetune.")


FILES = [
    path
    for pattern in ("*.py", "finetune/**/*.py", "moshi_overrides/**/*.py", "scripts/*.py", "tests/*.py")
    for path in sorted(ROOT.glob(pattern))
]
MODULES = {module_name(path): path for path in FILES}


@dataclass(frozen=True)
class Rule:
    allowed: frozenset[str] | None
    """Names and patterns that may be imported; None means anything."""


def read_rules() -> dict[str, Rule]:
    """The table's rows by module. In the second column what stands after a semicolon is a remark."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    rules = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        allowed = cells[1].split(";")[0]
        rule = Rule(None if allowed == "anything" else frozenset(re.findall(r"`([^`]+)`", allowed)))
        rules.update(dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), rule))
    return rules


RULES = read_rules()


def family_of(module: str) -> str | None:
    """The family that a module below `families` belongs to: `families.moshi_files` to `moshi`."""
    names = [name for name in FAMILY_NAMES if module.startswith(f"families.{name}")]
    return max(names, key=len) if names else None


def rule_of(module: str) -> Rule | None:
    """A module's own row, that of the families, or that of the folder above it."""
    if module in RULES:
        return RULES[module]
    if family_of(module):
        return RULES["families.<x>"]
    return RULES.get(module.split(".")[0]) if "." in module and not module.startswith("families.") else None


def admits(pattern: str, module: str, target: str) -> bool:
    if pattern == "families.<x>":
        return family_of(target) is not None and family_of(target) == family_of(module)
    if pattern == "moshi_overrides" or pattern.endswith(".*"):
        folder = pattern.removesuffix(".*")
        return target == folder or target.startswith(f"{folder}.")
    return pattern == target


def imported(source: str, module: str) -> Iterator[str]:
    """Full names of everything a source imports, also inside functions."""
    package = f"finetune.{module}".split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner.removeprefix("finetune.") in MODULES else base


def violations(module: str, source: str) -> list[str]:
    """What a source imports against the table."""
    rule = rule_of(module) or Rule(frozenset())
    found = []
    for name in imported(source, module):
        target = name.removeprefix("finetune.")
        if target not in MODULES:
            continue
        target_rule = rule_of(target)
        is_program = target_rule is not None and target_rule.allowed is None
        if rule.allowed is None:
            wrong = is_program and not module.startswith("tests.")
        else:
            wrong = is_program or not any(admits(pattern, module, target) for pattern in rule.allowed)
        if wrong:
            found.append(f"{module} imports {target}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_the_table_allows(module):
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name != "__init__.py"])
def test_every_module_has_a_row(module):
    assert rule_of(module) is not None, f"{module} is not in the table of CONTRIBUTING.md"


def test_every_row_has_a_module():
    gone = [name for name in RULES if "<x>" not in name and name not in MODULES and not (ROOT / name).is_dir()]
    assert gone == []
    named = {pattern for rule in RULES.values() for pattern in rule.allowed or () if "<x>" not in pattern}
    assert {name for name in named if name.removesuffix(".*") not in MODULES} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("moshi_overrides")])
def test_overrides_stand_on_upstream_alone(module):
    roots = {name.split(".")[0] for name in imported(MODULES[module].read_text(encoding="utf-8"), module)}
    assert roots - set(sys.stdlib_module_names) - {"moshi_overrides"} <= UPSTREAM


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("loss", "from finetune.families.moshi import MoshiFamily"),
        ("loss", "def f():\n    import finetune.families.moshi"),
        ("loss", "from .families import moshi"),
        ("families.moshi", "from finetune.args import TrainArgs"),
        ("families.moshi", "from finetune import args"),
        ("families.base", "from finetune.families import moshi"),
        ("data.types", "from finetune.errors import UserError"),
        ("data.loader", "from finetune.codec import Codec"),
        ("args", "import finetune.distributed"),
        ("moshi_overrides.layers", "from finetune.data.types import ABSENT"),
        ("metrics", "import train"),
        ("setup_new_model", "from train import build_family"),
    ],
)
def test_the_table_forbids(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("families.moshi", "from finetune.families import moshi_files"),
        ("families.moshi", "from moshi_overrides.fsdp import allow_fully_shard"),
        ("data.loader", "from finetune import distributed"),
        ("data.loader", "from .types import Clip"),
        ("train", "from finetune.families import family_class"),
        ("tests.test_train", "import train"),
    ],
)
def test_the_table_allows(module, source):
    assert violations(module, source) == []
