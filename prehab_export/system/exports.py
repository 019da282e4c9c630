"""Load a package's public names lazily, from the list in the ``__init__.pyi`` beside its ``__init__.py``.

Editors, type checkers and readers see the typed imports in the stub. At run time, each name is imported when it is
first used (as in SPEC 1, scientific-python.org). So the stub is the only list of what other rooms may use, and a room
is imported without loading torch or onnxruntime.

Nothing is imported at the top of this module, because it runs before the current folder is removed from the path
(see `current_folder`).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def lazy_exports(package: str, file: str) -> "tuple[Callable[[str], Any], Callable[[], list[str]]]":
    """Return the ``__getattr__`` and ``__dir__`` of a package with a stub.

    Args:
        package: the package's ``__name__``.
        file: its ``__file__``.
    """
    homes: dict[str, str] = {}

    def names() -> dict[str, str]:
        if not homes:
            homes.update(_read(file + "i"))
        return homes

    def get(name: str) -> object:
        if name == "__all__":
            return sorted(names())
        if name.startswith("__") or name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(names())


def _read(stub: str) -> dict[str, str]:
    """Map each name in the stub to the module that it is imported from."""
    import ast

    with open(stub, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
