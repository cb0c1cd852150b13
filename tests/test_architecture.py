"""The architecture: which folder may import which, what needs neither torch nor Lightning, and what deserialises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rexnet_lit"

# Every folder may import `utils`; `cli` may import everything. The other edges:
ALLOWED = {
    "utils": (),
    "data": (),
    "models": ("data",),
    "checks": ("data", "report"),
    "report": (),
    "training": ("data", "models", "checks"),
    "training/callbacks": ("data", "models", "checks", "report", "training"),
    "export": ("data", "models", "report"),
    "search": ("data", "models", "checks", "report", "training", "training/callbacks"),
    "cli": ("data", "models", "checks", "report", "training", "training/callbacks", "export", "search"),
    "__main__": ("cli",),
    "__init__": ("training/callbacks", "data", "training", "models"),  # lazily
}
# Lightning asks a module for its callbacks, which need the module's class.
LAZY = {"training/module.py": {"training/callbacks"}}
# `data` needs torch for transforms and loaders, and Lightning for the data module.
DATA_WITH_LIGHTNING = ("data/datamodule.py",)
DATA_WITHOUT_TORCH = (
    "settings", "image_header", "decode", "duplicates", "walk", "folder", "splits", "table", "verify", "cache",
    "sample", "fixes", "fixed_copy",
)  # fmt: skip
NO_TORCH = ("utils", "checks", "report")
NO_LIGHTNING = ("models", "export")
TORCH = {"torch", "torchvision", "torchmetrics", "timm", "lightning", "safetensors"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def folder(path: Path) -> str:
    """The sub-package, or the module at the top, that a file belongs to."""
    return folder_of(list(path.relative_to(PACKAGE).parts))


def folder_of(parts: list[str]) -> str:
    """The first part, or the first two for a folder in a folder that has rules of its own."""
    return "/".join(parts[:2]) if parts[:2] == ["training", "callbacks"] else parts[0].removesuffix(".py")


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


def imported_at_top(node: ast.AST) -> set[str]:
    """The modules of an import statement."""
    return imported(ast.Module([node], [])) if isinstance(node, ast.Import | ast.ImportFrom) else set()


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = {str(file.relative_to(PACKAGE)): imported(parse(file)) for file in FILES}


def file_of(module: str) -> str | None:
    """The file of one of this package's modules."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py", path.parent.with_suffix(".py")):
        if file.is_file():
            return str(file.relative_to(PACKAGE))
    return None


def packages(file: str) -> set[str]:
    """The third-party packages that a file and everything that it imports may import."""
    seen, todo = {file}, [file]
    while todo:
        for module in IMPORTS[todo.pop()]:
            other = file_of(module) if module.startswith("rexnet_lit.") else None
            if other is not None and other not in seen:
                seen.add(other)
                todo.append(other)
    return {module.split(".")[0] for each in seen for module in IMPORTS[each]} - {"rexnet_lit"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_folders_import_what_they_may(path):
    here = folder(path)
    there = {folder_of(m.split(".")[1:]) for m in IMPORTS[str(path.relative_to(PACKAGE))] if "rexnet_lit." in m}
    lazy = LAZY.get(str(path.relative_to(PACKAGE)), set())
    assert there - lazy - {here, "utils", "__version__"} <= set(ALLOWED[here])
    top = {module for node in parse(path).body if not is_type_checking(node) for module in imported_at_top(node)}
    assert not {folder_of(module.split(".")[1:]) for module in top if "rexnet_lit." in module} & lazy


def test_every_folder_says_what_belongs_in_it():
    for path in PACKAGE.rglob("*/__init__.py"):
        assert ast.get_docstring(parse(path)), path
        assert "import" in path.read_text("utf-8"), path


def test_the_top_level_is_small():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert len(names) <= 12, names


def test_the_package_itself_imports_only_what_costs_nothing():
    eager = {m for m in imported(parse(PACKAGE / "__init__.py")) if m.startswith("rexnet_lit")}
    assert eager == {"rexnet_lit.utils.errors", "rexnet_lit.utils.process"}


@pytest.mark.parametrize("file", sorted(IMPORTS))
def test_no_torch(file):
    part, _, name = file.removesuffix(".py").partition("/")
    if part in NO_TORCH or (part == "data" and name in DATA_WITHOUT_TORCH):
        assert not packages(file) & TORCH


@pytest.mark.parametrize("file", sorted(IMPORTS))
def test_no_lightning(file):
    part = file.removesuffix(".py").partition("/")[0]
    if part in NO_LIGHTNING or (part == "data" and file not in DATA_WITH_LIGHTNING):
        assert not packages(file) & LIGHTNING


def test_modules_and_functions_fit_a_screen():
    """At most 400 lines a module, and 55 a function, its signature and docstring apart."""
    for path in FILES:
        assert len(path.read_text("utf-8").splitlines()) <= 400, path
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                assert node.end_lineno - first.lineno < 55, f"{path}: {node.name}"


UNUSED_BY_A_FIT = {
    "sklearn", "pandas", "optuna", "cleanlab", "onnx", "onnxruntime", "openvino", "gradio", "tensorboard",
    "rexnet_lit.checks.check", "rexnet_lit.export.export", "rexnet_lit.models.predictor", "rexnet_lit.report.figures",
    "rexnet_lit.report.html", "rexnet_lit.search", "rexnet_lit.training.lr_finder",
}  # fmt: skip


def test_what_really_gets_imported():
    """The same two rules in fresh processes, where third parties' imports count too."""
    check = (
        "import sys, rexnet_lit.data.folder, rexnet_lit.data.decode, rexnet_lit.checks.check\n"
        "import rexnet_lit.report.test_page\n"
        "assert not {'torch', 'lightning', 'timm'} & sys.modules.keys(), 'torch is imported'\n"
        "import rexnet_lit.models.rexnet, rexnet_lit.models.predictor, rexnet_lit.export.export\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'lightning', 'pytorch_lightning'} & sys.modules.keys(), 'lightning is imported'\n"
        "for name in [n for n in sys.modules if n.startswith('rexnet_lit')]: del sys.modules[name]\n"
        "import rexnet_lit.cli.lightning_cli\n"  # what a fit imports before it reads its settings
        f"found = {UNUSED_BY_A_FIT} & sys.modules.keys()\n"
        "assert not found, f'{found} imported'\n"
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
    tree, name = parse(path), str(path.relative_to(PACKAGE))
    loads = [call for call in calls(tree) if call[0] in UNPICKLERS]
    if name == "models/checkpoint.py":
        assert {function for function, _ in loads} == {"torch.load"}
        for _, call in loads:
            flags = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert flags.get("weights_only") == "True"
    else:
        assert not loads
        assert not {m.split(".")[0] for m in imported(tree)} & PICKLES
        # What `torch.export.load` reads back is the file that the line above it wrote.
        assert name.startswith("export/") or not any(function == "torch.export.load" for function, _ in calls(tree))
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
    where = {
        str(path.relative_to(PACKAGE)) for path in FILES for function, _ in calls(parse(path)) if function in readers
    }
    assert where == {"models/checkpoint.py", "models/weights.py"}  # weights: timm's published ones
