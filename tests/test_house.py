"""The rules of the house that a program can see."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import prehab_export

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("converters", "prehab_export")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports, at any depth in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


def test_converters_never_import_prehab_export():
    known = modules()
    for name, path in known.items():
        if name.startswith("converters"):
            assert not any(other.startswith("prehab_export") for other in imports(path, set(known))), name


def test_imports_go_down_only():
    known = modules()
    graph = {name: imports(path, set(known) - set(PACKAGES)) for name, path in known.items() if name not in PACKAGES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError where an import goes up
    assert len(order) == len(graph)


# Rooms from the top floor down: each may import those below it, and nothing on its own floor or above.
FLOORS = (
    {"cli"},
    {"pipeline"},
    {"deployment", "measurement"},
    {"compression"},
    {"inputs", "linalg"},
    {"config"},
    {"system"},
)
ROOMS = {room for floor in FLOORS for room in floor}
# What Python itself asks for by name.
NO_ROOMS = {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}


def room_of(module: str) -> str | None:
    package, *rest = module.split(".")
    return rest[0] if package == "prehab_export" and rest and rest[0] in ROOMS else None


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def test_the_house_has_these_rooms():
    entries = {path.name for path in (ROOT / "prehab_export").iterdir() if path.name != "__pycache__"} - NO_ROOMS
    assert entries == ROOMS
    assert len(entries) <= 9
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((ROOT / "prehab_export" / room / "__init__.py").read_text(encoding="utf-8")))
        assert text is not None
        assert "\n\n" not in text, room  # one paragraph


def cross_imports() -> list[tuple[str, str, str]]:
    """(module, where it imports from, name) of every import from one room into another."""
    return [
        (name, node.module, alias.name)
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prehab_export")
        for alias in node.names
        if room_of(f"{node.module}.{alias.name}") not in (None, room_of(name)) and (room_of(name) or "__main__" in name)
    ]


def test_rooms_import_downward_and_only_what_is_shown():
    """What a room shows is in its stub; the one exception is what makes the stubs work."""
    for name, module, imported in cross_imports():
        if imported == "lazy_exports":
            continue
        other = room_of(module)
        assert module == f"prehab_export.{other}", f"{name} reaches into {module}"
        if (mine := room_of(name)) is not None:
            assert floor_of(str(other)) > floor_of(mine), f"{name} imports {module}, which is not below it"
        assert imported in import_module(module).__all__, f"{module} does not show {imported} to {name}"
    for name, path in modules().items():  # no import of another form gets round that
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("prehab_export.") for alias in node.names), name
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, name


def test_rooms_show_what_others_use_and_nothing_else():
    used = {(room_of(module), imported) for _, module, imported in cross_imports()}
    public = set(prehab_export.__all__)
    for room in ROOMS:
        for shown in import_module(f"prehab_export.{room}").__all__:
            assert (room, shown) in used or shown in public, f"nobody uses {shown} of {room}"
            assert getattr(import_module(f"prehab_export.{room}"), shown) is not None


def test_no_module_hides_a_name_or_a_standard_module():
    """A module named as a function of its package would stand in the function's place once it is imported."""
    for name in modules():
        last = name.rpartition(".")[2]
        assert last not in sys.stdlib_module_names or last == "__main__", name
        room = room_of(name)
        if room is not None and name != f"prehab_export.{room}":
            assert last not in import_module(f"prehab_export.{room}").__all__, name
    assert not ROOMS & set(prehab_export.__all__)


def test_no_two_classes_have_one_name():
    found: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name)
    assert not {name: places for name, places in found.items() if len(places) > 1}


def test_public_functions_take_seven_parameters_at_most():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                taken = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
                assert len(taken) <= 7, f"{name}.{node.name}: {', '.join(taken)}"


def test_importing_the_package_is_light():
    script = "import sys, prehab_export, converters; sys.exit(bool({'torch', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_public_name_is_what_it_says_and_documented():
    for name in prehab_export.__all__:
        value = getattr(prehab_export, name)
        assert value is not None
        if callable(value):
            assert value.__doc__, name
    # A function must not be shadowed by a module of the same name.
    for module in modules():
        if module.startswith("prehab_export."):
            import_module(module)
    assert all(
        callable(getattr(prehab_export, name)) for name in ("calibrate", "prehab", "truncate", "rehab", "bench", "run")
    )


def _opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text that Python would have to guess the encoding of."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg for keyword in call.keywords}
    if name == "open" and ast.unparse(call.func).startswith("tarfile."):
        return False
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if "encoding" in given or (isinstance(owner, ast.Name) and owner.id[0].isupper()):  # Workspace.open, Image.open
        return False
    if name in ("read_text", "write_text"):
        return True
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if name in ("fdopen", "NamedTemporaryFile") or (name == "open" and set("".join(modes)) <= set("rwax+t")):
        return not any("b" in mode for mode in modes) and (name != "NamedTemporaryFile" or bool(modes))
    return bool(given & {"text", "universal_newlines"})  # of a child's pipes


def test_every_text_has_an_encoding():
    """What is not said is guessed from the system: UTF-8 here, something else on Windows."""
    found = [
        f"{name}:{node.lineno}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _opens_text(node)
    ]
    assert not found


def test_one_door_for_child_processes():
    """`prehab_export.system.children` builds their command lines and environments, so that none looks into the current
    folder. The kit's runner stands alone, and is a file whose folder is its own."""
    for name, path in modules().items():
        if name == "prehab_export.measurement.targets.kit_runner":
            continue
        text = path.read_text(encoding="utf-8")
        if name != "prehab_export.system.children":
            assert "sys.executable" not in text, name
            assert "shutil.which" not in text, name
        assert not {"multiprocessing", "os.system", "os.popen"} & set(re.findall(r"\b[a-z]+(?:\.[a-z]+)?\b", text)), (
            name
        )
        for node in ast.walk(ast.parse(text)):
            starts = isinstance(node, ast.Call) and ast.unparse(node.func) in ("subprocess.run", "subprocess.Popen")
            assert not starts or "env" in {keyword.arg for keyword in node.keywords}, f"{name}:{node.lineno}"


# Fields of a model's configuration that some family lacks, or keeps elsewhere.
CONFIG_FIELDS = (
    {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "n_positions"}
    | {"type_vocab_size", "image_size", "num_channels", "num_labels", "id2label", "problem_type", "architectures"}
    | {"auto_map", "quantization_config", "use_cache", "is_encoder_decoder", "is_decoder", "tie_word_embeddings"}
    | {"num_experts", "num_local_experts", "layer_types", "rope_parameters", "_experts_implementation"}
    | {"_attn_implementation", "_attn_implementation_internal"}
)
TOKEN_FIELDS = {"pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id"}
READS_CONFIGS = {"converters.model_config"}


def config_reads(tree: ast.AST) -> list[str]:
    """Expressions that read a field of a model's configuration, whether or not the family has it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner, field = ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            owner, field = ast.unparse(node.args[0]), str(getattr(node.args[1], "value", ""))
        else:
            continue
        of_config = field in CONFIG_FIELDS and "config" in owner and owner != "model_config"
        of_text = field in TOKEN_FIELDS and not {"tokenizer", "processor"} & set(owner.split("."))
        if of_config or of_text or field == "get_text_config":
            found.append(ast.unparse(node))
    return found


def test_config_reads_are_seen():
    tree = ast.parse("text.pad_token_id; m.config.vocab_size; getattr(config, 'num_labels', 2); c.get_text_config()")
    assert len(config_reads(tree)) == 4
    tree = ast.parse("text.pad_token_id = 0; tokenizer.pad_token_id; graph.vocab_size; model_config.image_size(config)")
    assert config_reads(tree) == []


def test_one_module_reads_the_configurations_of_models():
    reads = {name: config_reads(ast.parse(path.read_text())) for name, path in modules().items()}
    assert {name: found for name, found in reads.items() if found and name not in READS_CONFIGS} == {}


def test_terminal_text_is_literal():
    """Names stand in nearly every line that is printed: looks are given as a style, never as markup in the text."""
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        if name != "prehab_export.system.terminal":
            assert not re.search(r"\bConsole\((?!\))", text), name
        assert "rich.markup" not in text, name
        assert not re.search(r"[\"'] *\[/?(bold|dim|red|yellow|green)\]", text), name


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _moves(call: ast.Call) -> bool:
    """Whether a call puts a file somewhere else; ``Path.replace`` takes one argument, that of texts two."""
    function = ast.unparse(call.func)
    if function in ("os.replace", "os.rename", "os.renames", "shutil.move"):
        return True
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return name == "rename" or (name == "replace" and len(call.args) == 1 and not call.keywords)


def test_one_place_publishes_files():
    """Everything else writes through `converters.publishing`. The kit's runner stands alone."""
    allowed = {"converters.publishing", "prehab_export.measurement.targets.kit_runner"}
    found = {name for name, path in modules().items() for call in calls(ast.parse(path.read_text())) if _moves(call)}
    assert found == allowed


def importers(library: str) -> set[str]:
    """Modules of ours that import a library, at any depth in them."""
    found = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            taken = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            taken += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found |= {name for module in taken if module.partition(".")[0] == library}
    return found


def test_one_place_for_each_basic_thing():
    digests = {"prehab_export.system.digests", "prehab_export.deployment.parity"}  # of files and texts; of tensors
    assert importers("hashlib") == digests | {"prehab_export.measurement.targets.kit_runner"}
    assert importers("filelock") == {"converters.owned_folders", "prehab_export.pipeline.workspace"}
    assert importers("fcntl") | importers("msvcrt") == set()
    assert importers("platformdirs") == {"prehab_export.system.files"}
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    for pattern, place in {
        r"\b(linalg|torch)\.cholesky": "converters.roots",
        r"\"(B?F16|F32|F64|tensor\()": "converters.number_formats",
    }.items():
        assert {name for name, text in texts.items() if re.search(pattern, text)} - {place} == set(), pattern


def test_no_pickle():
    for name, path in modules().items():
        text = path.read_text()
        assert "torch.load(" not in text, name
        assert "torch.save(" not in text, name
        assert "import pickle" not in text, name


def classes_of_ours(hint: object) -> set[type]:
    """The classes of this project in a type."""
    parts = set[type]().union(*(classes_of_ours(part) for part in get_args(hint)))
    ours = isinstance(hint, type) and hint.__module__.split(".")[0] in PACKAGES
    return parts | ({hint} if ours else set())


def signatures() -> Iterator[tuple[str, dict[str, object], str]]:
    """(name, types, documentation) of every public function, class and public method."""
    for name in prehab_export.__all__:
        value = getattr(prehab_export, name)
        if not callable(value):
            continue
        members = [member for key, member in vars(value).items() if key[0] != "_"] if isinstance(value, type) else []
        for function in (value, *members):
            function = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
            if isinstance(function, type) or inspect.isfunction(function):
                lazily = {"InferenceSession": object}  # imported for type checkers only, since it is slow to load
                yield name, get_type_hints(function, localns=lazily), function.__doc__ or ""


def test_what_public_functions_take_return_and_raise_is_public():
    known = set(prehab_export.__all__)
    for name, hints, documentation in signatures():
        for part, hint in hints.items():
            classes = {found.__name__ for found in classes_of_ours(hint)}
            assert classes <= known, f"{name}, {part}: {classes - known} is not public"
        raised = set(re.findall(r"^\s+(\w+(?:Error|Chain|Warning)):", documentation, re.MULTILINE))
        assert raised <= known | set(dir(builtins)), f"{name} raises {raised - known}"
