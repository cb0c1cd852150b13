"""The house: who may import whom (design, section 3), who needs neither torch nor Lightning, who deserialises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rexnet_lit"

# A module imports from the groups above its own, and from what stands before it in its own.
LAYERS = (
    ("errors", "process", "files"),  # what even L0 stands on
    ("spec", "image_header", "decode", "folder"),  # L0
    (
        "sample",
        "quarantine",
        "cache",
        "transforms",
        "blocks",
        "network",
        "metrics",
        "schedules",
        "losses",
        "strategies",
        "probe",
    ),  # L1
    ("sampler", "datasets", "loader", "data", "checkpoint", "checkpoint_io", "sync_batchnorm"),  # L2
    ("doctor", "module", "report", "predictor", "hub", "export"),  # L3
    (
        "config",
        "run_folder",
        "guards",
        "finite_loss",
        "calibration",
        "blend",
        "loggers",
        "callbacks",
        "trainer_rules",
        "lr_finder",
        "runs",
        "cli",
        "__main__",
    ),  # L4
)
NO_TORCH = ("errors", "spec", "folder", "decode", "quarantine", "cache", "doctor", "report")
NO_LIGHTNING = (
    "network",
    "transforms",
    "schedules",
    "losses",
    "strategies",
    "probe",
    "checkpoint",
    "predictor",
    "hub",
    "export",
)
TORCH = {"torch", "torchvision", "torchmetrics", "timm", "lightning", "safetensors"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def room(path: Path) -> str:
    """The module or sub-package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST) -> set[str]:
    """Every module that is imported below ``node``, in functions too; what is for type checkers only is not."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import of {child.module}"
            # `from rexnet_lit import network` names a module, `from rexnet_lit.spec import ModelSpec` does not.
            names = [alias.name for alias in child.names] if child.module == "rexnet_lit" else [""]
            found |= {f"{child.module}.{name}".rstrip(".") for name in names}
        found |= imported(child)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS: dict[str, set[str]] = {}
for file in FILES:
    IMPORTS.setdefault(room(file), set()).update(imported(parse(file)))


def inside(name: str) -> set[str]:
    """The rooms of this package that a room imports, other than itself."""
    rooms = {module.split(".")[1] for module in IMPORTS[name] if module.startswith("rexnet_lit.")}
    return (rooms & IMPORTS.keys()) - {name, "__init__"}


def outside(name: str) -> set[str]:
    """The top-level packages that a room and everything below it may import."""
    seen, todo = {name}, [name]
    while todo:
        todo += [n for n in inside(todo.pop()) if n not in seen and not seen.add(n)]  # type: ignore[func-returns-value]
    return {module.split(".")[0] for room_ in seen for module in IMPORTS[room_]} - {"rexnet_lit"}


def test_every_room_has_a_layer():
    assert sorted(name for layer in LAYERS for name in layer) == sorted(IMPORTS.keys() - {"__init__"})


@pytest.mark.parametrize("name", sorted(IMPORTS.keys() - {"__init__"}))
def test_imports_go_down_only(name):
    ranks = [room_ for layer in LAYERS for room_ in layer]
    upwards = {other for other in inside(name) if ranks.index(other) >= ranks.index(name)}
    assert not upwards, f"{name} imports {upwards}, which stand above it"


def test_the_package_itself_imports_only_what_costs_nothing():
    tree = parse(PACKAGE / "__init__.py")
    assert {m for m in imported(tree) if m.startswith("rexnet_lit")} == {"rexnet_lit.errors", "rexnet_lit.process"}


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch(name):
    assert not outside(name) & TORCH


@pytest.mark.parametrize("name", NO_LIGHTNING)
def test_no_lightning(name):
    assert not outside(name) & LIGHTNING


def test_what_really_gets_imported():
    """The same two rules in fresh processes, where third parties' imports count too."""
    check = (
        "import sys, rexnet_lit.folder, rexnet_lit.decode, rexnet_lit.doctor, rexnet_lit.report\n"
        "assert not {'torch', 'lightning', 'timm'} & sys.modules.keys(), 'torch is imported'\n"
        "import rexnet_lit.network, rexnet_lit.predictor, rexnet_lit.export\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'lightning', 'pytorch_lightning'} & sys.modules.keys(), 'lightning is imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLERS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "np.fromfile",
}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_checkpoint_deserialises(path):
    tree, name = parse(path), room(path)
    loads = [call for call in calls(tree) if call[0] in UNPICKLERS]
    if name == "checkpoint":
        assert {function for function, _ in loads} == {"torch.load"}
        for _, call in loads:
            flags = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert flags.get("weights_only") == "True"
    else:
        assert not loads
        assert not {m.split(".")[0] for m in imported(tree)} & PICKLES
        # What `torch.export.load` reads back is the file that the line above it wrote.
        assert name == "export" or not any(function == "torch.export.load" for function, _ in calls(tree))
    for function, call in calls(tree):
        flags = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert flags.get("allow_pickle", "False") == "False", function
        assert flags.get("weights_only", "True") == "True", function
        if function.endswith("np.load"):
            assert "allow_pickle" in flags
        assert not function.endswith("load_from_checkpoint")
        assert function not in ("eval", "exec")


def test_safetensors_are_read_in_two_places():
    readers = {"safe_open", "load_file", "safetensors.torch.load", "safetensors.torch.load_file"}
    where = {room(path) for path in FILES for function, _ in calls(parse(path)) if function in readers}
    assert where == {"checkpoint", "network"}  # network: timm's published weights
