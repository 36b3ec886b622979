"""The package and its house: what is installed, and that imports point down."""

import ast
import pathlib
import re
import tomllib
import warnings

import pytest

import kalman_flax as kf

PROJECT = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
#: rooms from the ground up, as docs/design.md draws them
FLOORS = [
    re.findall(r"`([\w/]+)`", line)
    for line in reversed(
        re.findall(r"^\| \d+ \|.*$", pathlib.Path("docs/design.md").read_text(), re.M)
    )
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The longest room whose path the module's begins with; None for other packages."""
    path = module.replace(".", "/")
    fits = [room for room in FLOOR if f"{path}/".startswith(f"{room}/")]
    return max(fits, key=len, default=None)


def modules() -> dict[str, ast.Module]:
    found = {}
    for top in ("kalman_flax", "train", "configs"):
        for path in pathlib.Path(top).rglob("*.py"):
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports(tree: ast.Module) -> set[str]:
    """Names of the modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return found


def test_imports_point_down():
    assert len(FLOORS) > 8
    upward = [
        f"{module} ({FLOOR[room_of(module)]}) imports {name} ({FLOOR[room_of(name)]})"
        for module, tree in MODULES.items()
        for name in imports(tree)
        if room_of(name) not in (None, room_of(module))
        and FLOOR[room_of(name)] >= FLOOR[room_of(module)]
    ]
    assert not upward, "\n".join(upward)


def test_no_module_imports_itself_by_a_detour():
    graph = {m: imports(tree) & MODULES.keys() - {m} for m, tree in MODULES.items()}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in graph:
        visit(module, ())


def test_the_library_needs_no_more_than_it_declares():
    allowed = {"kalman_flax", "jax", "jaxtyping", "flax", "numpy"}
    standard = {"__future__", "collections", "contextlib", "dataclasses", "functools"}
    for module, tree in MODULES.items():
        tops = {name.partition(".")[0] for name in imports(tree)}
        if module.startswith("kalman_flax"):
            assert not tops & {"train", "configs", "optax", "matplotlib"}, module
        if module.startswith("kalman_flax._filter"):
            rest = tops - standard - {"math", "typing", "numbers"}
            assert rest <= allowed - {"flax"}, module


def test_requirements_are_those_of_the_package():
    text = pathlib.Path("requirements.txt").read_text()
    sections = dict(re.findall(r"^# (.*)\n((?:[^#\n].*\n)*)", text, re.M))
    listed = {
        name: [line.partition("#")[0].strip() for line in lines.splitlines()]
        for name, lines in sections.items()
    }
    assert listed["The library"] == PROJECT["dependencies"]
    assert listed["Training"] == PROJECT["optional-dependencies"]["train"]


@pytest.mark.parametrize("name", sorted(kf._MOVED))
def test_names_that_moved_are_still_there_and_say_where_they_are(name):
    with pytest.warns(DeprecationWarning, match=rf"kalman_flax\.\w+\.{name} now"):
        found = getattr(kf, name)
    assert found is getattr(getattr(kf, kf._MOVED[name]), name)


def test_flat_names_warn_of_nothing_and_unknown_ones_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kf.KalmanNorm and kf.filter.predict_conv
    with pytest.raises(AttributeError, match="no attribute 'KalmanNrom'"):
        kf.KalmanNrom  # noqa: B018
