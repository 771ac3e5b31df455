"""Each folder imports only from those below it, and no imports form a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "iou_balanced_d2"
# From the bottom to the top; what stands in one line may import each other, without a circle.
LAYERS = [
    {"arguments", "errors", "files", "projects", "threads"},
    {"config", "losses"},
    {"modeling"},
    {"data"},
    {"evaluation"},
    {"analysis"},
    {"engine"},
    {"experiments", "model_zoo"},
    {"commands"},
    {"__main__"},
]


def module_name(file, root):
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree, name, is_package, modules):
    """The modules of the package that a module names, also inside of functions."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in modules or source in modules:
                    yield inner if inner in modules else source


def import_graph(root):
    files = {module_name(file, root): file for file in (root / PACKAGE).rglob("*.py")}
    return {
        name: set(
            imports_of(ast.parse(file.read_text()), name, file.stem == "__init__", files.keys())
        )
        for name, file in files.items()
    }


def upward_imports(graph):
    """(module, imported) pairs from a folder to one above it."""
    height = {folder: i for i, layer in enumerate(LAYERS) for folder in layer}

    def height_of(name):
        # The package itself is imported for its version only, from anywhere.
        return height[name.split(".")[1]] if "." in name else -1

    return [
        (name, imported)
        for name, all_imported in graph.items()
        for imported in all_imported
        if name != PACKAGE and height_of(name) < height_of(imported)
    ]


def circle(graph):
    """The modules of a circle; [] if there is none. The package itself imports all its folders."""
    graph = {name: found - {name, PACKAGE} for name, found in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT)


def test_no_folder_imports_from_above(graph):
    assert upward_imports(graph) == []


def test_no_imports_form_a_circle(graph):
    assert circle(graph) == []


def test_what_is_wrong_is_found(tmp_path):
    """An import in a function counts; so does one of a module by its package."""
    for name, text in {
        "__init__": "from . import data",
        "data/__init__": "",
        "data/coco": "def read():\n    from ..evaluation.voc import ap",
        "evaluation/__init__": "",
        "evaluation/voc": "from . import metrics",
        "evaluation/metrics": "import iou_balanced_d2.evaluation.voc",
    }.items():
        file = tmp_path / PACKAGE / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    graph = import_graph(tmp_path)
    assert upward_imports(graph) == [(f"{PACKAGE}.data.coco", f"{PACKAGE}.evaluation.voc")]
    assert set(circle(graph)) == {f"{PACKAGE}.evaluation.{x}" for x in ("voc", "metrics")}
