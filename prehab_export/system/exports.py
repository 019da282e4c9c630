"""What a package shows to the others: the names in the ``__init__.pyi`` beside its ``__init__.py``.

Editors, type checkers and readers see the stub's typed imports; at run time a name is imported when it is first asked
for (the arrangement of SPEC 1, scientific-python.org). So a stub is the one list of what other rooms may use, and
importing a room loads neither torch nor onnxruntime.

Nothing is imported at the top of this module: it runs before the current folder has left the path (`current_folder`).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def lazy_exports(package: str, file: str) -> "tuple[Callable[[str], Any], Callable[[], list[str]]]":
    """The ``__getattr__`` and ``__dir__`` of a package whose stub lies beside it.

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
    """Name → the module that it is imported from."""
    import ast

    with open(stub, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
