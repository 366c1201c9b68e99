"""Packages import lower packages only, modules do not import each other in a circle, and each states its purpose."""

import ast
from functools import cache
from pathlib import Path

import limbeck

SOURCE = Path(limbeck.__file__).parent
LAYERS = (
    ("errors", "interrupt", "registry", "folders", "megatron_files", "version"),
    ("config",),
    ("objectives",),
    ("data",),
    ("models",),
    ("strategies",),
    ("cluster",),
    ("teachers",),
    ("rollout",),
    ("report",),
    ("train",),
    ("evaluate",),
    ("plan",),
    ("launch",),
    ("deploy",),
    ("demo",),
    ("commands",),
    ("api", "trainer", "cli", "__init__", "__main__"),
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}


@cache
def imports() -> dict[str, set[str]]:
    """Module → modules it imports, also inside functions and for type checking only."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        module = ".".join(("limbeck", *(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)))
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("limbeck"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.startswith("limbeck.")}
        found[module] = names
    return {
        module: {resolved for name in names if (resolved := resolve(name, found))} for module, names in found.items()
    }


def resolve(name: str, modules) -> str | None:
    """The module that ``name`` is, or that defines it."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_package_has_a_layer():
    assert {package(module) for module in imports()} <= LEVEL.keys()


def test_packages_import_lower_packages_only():
    upward = [
        f"{module} imports {name}"
        for module, names in imports().items()
        for name in names
        if package(name) != package(module) and LEVEL[package(name)] > LEVEL[package(module)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: names - {module} for module, names in imports().items()}
    # A package's __init__ re-exports its modules; what these import from it is resolved to the defining module elsewhere.
    graph = {m: {n for n in names if not (m.startswith(f"{n}.") or n == "limbeck")} for m, names in graph.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_module_has_a_docstring():
    files = SOURCE.rglob("*.py")
    assert not [str(path) for path in files if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
