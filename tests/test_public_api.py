"""The public list, its documentation, the layering, the import, README and guides."""

import ast
import contextlib
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import subprocess
import textwrap
import tokenize

import cv2
import keras
import numpy as np
import pytest
from harness import ROOT, run_script

import kerastrip

PACKAGE = ROOT / "kerastrip"

# The folders, and the files beside them, that each of them may import. The ground is for all.
GROUND = {"_checks", "_files", "_labels", "_numerics", "_outputs", "_version"}
MAY_IMPORT = {
    "distances": set(),
    "sources": set(),
    "augmentation": set(),
    "sampling": {"sources", "augmentation"},
    "mining": {"distances"},
    "losses": {"distances", "mining"},
    "metrics": {"distances", "mining"},
    "evaluation": {"distances", "sources"},
    "verification": {"evaluation"},
    "plotting": {"distances", "sources", "metrics", "evaluation"},
}
MAY_IMPORT["callbacks"] = set(MAY_IMPORT) - {"losses", "verification"}
MAY_IMPORT["__init__"] = set(MAY_IMPORT)
# `PKSampler.plot_batch` shows a batch with the figure for it, when it is called.
EXCEPTION = ("sampling.sampler", "plotting")
# What evaluates arrays of embeddings, whoever made them, and what runs a model.
ON_ARRAYS = {
    f"evaluation.{name}"
    for name in (
        *("search", "ranking", "reranking", "retrieval", "verification"),
        *("confusions", "intervals", "comparison"),
    )
}
RUNS_MODELS = {"_outputs", "evaluation.embedding", "evaluation.recalibration"}
FREE_OF_KERAS = {"_checks", "_labels", "_version"} | {
    f"sampling.{name}" for name in ("epoch_modes", "permutation", "plan", "splits")
}
OPTIONAL = {"albumentations", "cv2", "faiss", "matplotlib", "sklearn", "tensorboard"}
BACKENDS = {"jax", "tensorflow", "torch"}
# The one private name of Keras, and the standard library's way out of a process.
FOREIGN_PRIVATE = {"_metrics", "_exit", "_children"}
# What a NamedTuple offers to everybody.
NAMED_TUPLE = {"_asdict", "_fields", "_replace"}
TOP_LEVEL = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "examples",
    "kerastrip",
    "setup.cfg",
    "setup.py",
    "tests",
}


def module_name(path):
    """`kerastrip/losses/focal.py` -> "losses.focal"; a package is its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in PATHS.items()}
each_module = pytest.mark.parametrize("name", PATHS)


# The public list


def public_modules():
    """Every module of the package whose path has no leading underscore."""
    found = [kerastrip]
    for info in pkgutil.walk_packages(kerastrip.__path__, "kerastrip."):
        if "._" not in info.name:
            found.append(importlib.import_module(info.name))
    return found


def is_definition(value):
    is_cached = hasattr(value, "cache_clear")
    return inspect.isclass(value) or inspect.isfunction(value) or is_cached


# The public classes and functions of every public module, where they are defined.
DEFINITIONS = [
    pytest.param(name, value, id=f"{module.__name__}.{name}")
    for module in public_modules()
    for name, value in vars(module).items()
    if not name.startswith("_")
    and is_definition(value)
    and value.__module__ == module.__name__
]
EXPORTED = [
    pytest.param(getattr(kerastrip, name), id=name)
    for name in kerastrip.__all__
    if is_definition(getattr(kerastrip, name))
]
each_definition = pytest.mark.parametrize(("name", "value"), DEFINITIONS)


def test_all_is_what_the_package_shows():
    assert len(set(kerastrip.__all__)) == len(kerastrip.__all__)
    shown = {
        name
        for name, value in vars(kerastrip).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    modules = {
        name for name in kerastrip.__all__ if inspect.ismodule(getattr(kerastrip, name))
    }
    assert set(kerastrip.__all__) - modules == shown | {"__version__"}
    assert not {name for name in modules if name.startswith("_")}
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", kerastrip.__version__)


@each_definition
def test_keras_classes_are_all_public(name, value):
    bases = (
        keras.losses.Loss,
        keras.metrics.Metric,
        keras.callbacks.Callback,
        keras.layers.Layer,
        keras.utils.PyDataset,
    )
    if inspect.isclass(value) and issubclass(value, bases):
        assert getattr(kerastrip, name, None) is value
        assert name in kerastrip.__all__


@pytest.mark.parametrize(
    "module", [pytest.param(m, id=m.__name__) for m in public_modules()[1:]]
)
def test_a_public_module_lists_what_it_shows(module):
    listed = set(module.__all__)
    assert len(listed) == len(module.__all__)
    # A folder shows what its files define; `verification` is where its names were before.
    name = module.__name__
    is_face = hasattr(module, "__path__") or name == "kerastrip.verification"
    shown = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and is_definition(value)
        and value.__module__.startswith("kerastrip" if is_face else name)
    }
    constants = {key for key in listed if key.isupper()}
    assert listed - constants == shown
    assert all(hasattr(module, key) for key in constants)


def test_a_star_gives_what_is_listed_and_no_more():
    found = {}
    exec("from kerastrip import *", found)
    assert found.keys() - {"__builtins__"} == set(kerastrip.__all__)


def test_the_registry_of_keras_holds_only_public_classes():
    keys = [key.partition(">") for key in keras.saving.get_custom_objects()]
    registered = {name for package, _, name in keys if package == "kerastrip"}
    assert "TripletLoss" in registered
    assert registered <= set(kerastrip.__all__)


# Documentation


def documented(doc, *headings):
    """The names of the first section of a docstring that has one of the headings."""
    lines = inspect.cleandoc(doc or "").splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip() in headings]
    if not starts:
        return None
    start = starts[0]
    margin = len(lines[start]) - len(lines[start].lstrip())
    names = []
    for line in lines[start + 1 :]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= margin:
            break
        entry = re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*):", line.strip())
        if entry and indent == margin + 4:
            names += [name.strip(" *") for name in entry.group(1).split(",")]
    return names


def argument_names(value):
    # Past Keras' __new__, whose signature is (*args, **kwargs).
    is_plain_class = inspect.isclass(value) and "__init__" in vars(value)
    names = list(
        inspect.signature(value.__init__ if is_plain_class else value).parameters
    )
    return names[1:] if is_plain_class else names


def own_methods(cls):
    """(name, function or property) of what a class adds to its bases."""
    for name, value in vars(cls).items():
        is_member = inspect.isfunction(value) or isinstance(value, property)
        inherited = any(hasattr(base, name) for base in cls.__mro__[1:])
        if is_member and not name.startswith("_") and not inherited:
            yield name, value


@each_definition
def test_every_public_definition_is_documented(name, value):
    assert value.__doc__, name
    first = value.__doc__.strip().splitlines()[0]
    assert first.endswith((".", "?")), first
    if inspect.isclass(value):
        attributes = documented(value.__doc__, "Attributes:") or []
        for method, member in own_methods(value):
            assert member.__doc__ or method in attributes, f"{name}.{method}"


@each_definition
def test_documented_arguments_are_those_of_the_signature(name, value):
    names = documented(value.__doc__, "Args:")
    assert names is None or names == argument_names(value)
    if inspect.isclass(value):
        for method, member in own_methods(value):
            if inspect.isfunction(member):
                names = documented(member.__doc__, "Args:")
                expected = argument_names(member)[1:]
                assert names is None or names == expected, f"{name}.{method}"


@pytest.mark.parametrize("value", EXPORTED)
def test_public_names_have_arguments_and_an_example(value):
    doc = value.__doc__ or ""
    if not documented(doc, "Args:") and documented(doc, "Attributes:"):
        return  # a result: nobody makes one by hand
    assert documented(doc, "Args:") or not argument_names(value), "no Args section"
    assert re.search(r"^\s*Examples?:", doc, re.MULTILINE), "no Example section"
    assert ">>>" in doc, "the example does not run"


# Layering


def imports(tree):
    """(dotted name, whether it waits) of every import, for type checkers too."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.extend(
                (f"{node.module}.{alias.name}", inside) for alias in node.names
            )
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = inside or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def own_imports(tree):
    """The modules of the package that a tree imports."""
    for target, _ in imports(tree):
        package, _, rest = target.partition(".")
        if package != "kerastrip":
            continue
        # The longest part that is a module: what follows is a name in it.
        while rest and rest not in PATHS:
            rest = rest.rpartition(".")[0]
        yield rest or "__init__"


def broken_rules(trees):
    """What is wrong with the imports of a package: a line for each."""
    arrows = {name: set(own_imports(tree)) for name, tree in trees.items()}
    wrong = []
    for name, others in arrows.items():
        folder = name.split(".")[0]
        for other in others:
            to = other.split(".")[0]
            may = GROUND | MAY_IMPORT.get(folder, set()) | {folder}
            if to not in may and (name, other) != EXCEPTION:
                wrong.append(f"{name} must not import {other}")
    for name in arrows:
        reached = reached_from(name, arrows)
        if name in reached:
            wrong.append(f"{name} imports itself in the end")
        if name in ON_ARRAYS:
            for other in reached:
                if other in RUNS_MODELS or other.startswith("callbacks"):
                    wrong.append(f"{name} works on arrays, and must not reach {other}")
    return wrong


def reached_from(name, arrows):
    """The modules that a module imports, and those that they import in turn."""
    reached, todo = set(), [name]
    while todo:
        new = arrows[todo.pop()] - reached
        reached |= new
        todo += new
    return reached


def test_imports_run_one_way():
    folders = {name.split(".")[0] for name in PATHS}
    assert folders == GROUND | set(MAY_IMPORT)
    assert broken_rules(TREES) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mining.blocks", "from kerastrip import callbacks"),
        ("evaluation.retrieval", "def f():\n    from kerastrip.losses import triplet"),
        (
            "evaluation.search",
            "def f():\n    from kerastrip.evaluation import embedding",
        ),
        ("evaluation.confusions", "from kerastrip.evaluation.recalibration import x"),
        ("sampling.plan", "if TYPE_CHECKING:\n    import kerastrip.mining.engine"),
        ("mining.blocks", "def f():\n    from kerastrip.mining import pairs"),
        ("_checks", "from kerastrip._labels import LabelTable"),
        ("callbacks.collapse", "import kerastrip"),
    ],
)
def test_one_line_that_breaks_a_rule_is_seen(name, line):
    added = ast.parse(f"{PATHS[name].read_text('utf-8')}\n{line}\n")
    wrong = broken_rules({**TREES, name: added})
    assert wrong
    assert any(name in one for one in wrong)


@each_module
def test_foreign_imports(name):
    for target, inside in imports(TREES[name]):
        top = target.split(".")[0]
        assert not target.startswith(
            ("keras.src", "tensorflow.keras", "tensorflow.python")
        )
        assert top != "tf_keras"
        heavy = OPTIONAL | BACKENDS
        assert inside or top not in heavy, f"{name} imports {top} at the top"
        if name in FREE_OF_KERAS:
            assert top not in {"keras", *BACKENDS}, f"{name} needs NumPy only"


def test_private_names_are_our_own():
    """A private attribute that this package does not define is somebody else's."""

    def is_private(name):
        return name.startswith("_") and not name.startswith("__")

    defined, used = set(), {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                if isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                else:
                    used.setdefault(node.attr, set()).add(module)
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.isidentifier()
                and is_private(node.value)
            ):  # getattr(model, "_metrics") is the same thing
                used.setdefault(node.value, set()).add(module)
    defined |= {name.rpartition(".")[2] for name in PATHS} | NAMED_TUPLE
    foreign = {name: places for name, places in used.items() if name not in defined}
    assert set(foreign) <= FOREIGN_PRIVATE, foreign
    for name, places in foreign.items():
        assert len(places) == 1, f"{name} is used in {places}"


# Habits


@each_module
def test_no_print_and_no_assert(name):
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "breakpoint"}, f"line {node.lineno}"


CODE_LINES, POSITIONAL = 45, 6


def lines_of_code(path):
    """The numbers of the lines with code: no docstring, no comment, no blank line."""
    source = path.read_text("utf-8")
    beside = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in beside:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            lines -= set(range(first.lineno, first.end_lineno + 1))
    return lines


def functions(tree):
    """(function, whether it is a method) without constructors of public classes."""
    methods = {
        method: owner
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            owner = methods.get(node)
            is_public = owner is not None and not owner.name.startswith("_")
            if not (is_public and node.name == "__init__"):
                yield node, owner is not None


@each_module
def test_functions_are_short_and_take_few_positions(name):
    lines = lines_of_code(PATHS[name])
    for function, is_method in functions(TREES[name]):
        own = lines.intersection(range(function.lineno, function.end_lineno + 1))
        assert len(own) <= CODE_LINES, function.name
        named = [*function.args.posonlyargs, *function.args.args]
        assert len(named) - is_method <= POSITIONAL, function.name


def test_lines_of_code_are_counted_without_words(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Words."""\n\ndef f(a):\n    """More\n    words."""\n'
        "    # why\n    return (\n        a\n\n    )\n"
    )
    assert lines_of_code(path) == {3, 7, 8, 10}


def test_top_level_entries():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if listing.returncode == 0:
        entries = {line.split("/")[0] for line in listing.stdout.splitlines()}
    else:  # an unpacked archive
        made = {"build", "dist", "runs", "kerastrip.egg-info"}
        entries = {path.name for path in ROOT.iterdir()} - made
    assert {entry for entry in entries if not entry.startswith(".")} == TOP_LEVEL


# Import

IMPORT = """
import os, socket, sys
import keras
if keras.config.backend() == "tensorflow":
    import tensorflow

class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        raise RuntimeError("a socket was opened")

def refuse(*args, **kwargs):
    raise RuntimeError("a name was looked up")

socket.socket, socket.getaddrinfo = Refused, refuse
before = set(sys.modules)
for stream in (sys.stdout, sys.stderr):
    stream.flush()
    os.write(stream.fileno(), b"<kerastrip>")
import kerastrip
for stream in (sys.stdout, sys.stderr):
    stream.flush()
    os.write(stream.fileno(), b"</kerastrip>")
unwanted = {optional!r} & {{name.split(".")[0] for name in set(sys.modules) - before}}
sys.exit(f"imported: {{sorted(unwanted)}}" if unwanted else 0)
"""


def test_import_is_light_silent_and_offline():
    script = IMPORT.format(optional=OPTIONAL)
    done = run_script(script, env={"PYTHONWARNINGS": "always"})
    for stream in (done.stdout, done.stderr):
        assert re.findall("<kerastrip>(.*)</kerastrip>", stream, re.DOTALL) == [""]


# README and guides

GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))


def python_blocks(path):
    """[(heading, line, code)] of the python blocks of a Markdown file."""
    blocks: list[tuple] = []
    heading, block = "", None
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if block is None:
            if line.startswith("#"):
                heading = line.strip("# ")
            elif line.strip() == "```python":
                block = (number, [])
        elif line.strip() == "```":
            code = textwrap.dedent("\n".join(block[1]))
            blocks.append((heading, block[0], code))
            block = None
        else:
            block[1].append(line)
    return blocks


def documents():
    """(path, [(line, code)]): the sections of README.md, and each guide as a whole.

    A section of the README stands for itself, a guide is read from its beginning.
    """
    readme = ROOT / "README.md"
    sections: dict[tuple, list] = {}
    for path in (readme, *GUIDES):
        for heading, *block in python_blocks(path):
            part = heading if path == readme else path.stem
            sections.setdefault((path, part), []).append(block)
    return [
        pytest.param(path, blocks, id=part) for (path, part), blocks in sections.items()
    ]


def links_of(path):
    """[(text, target)] of the links of a Markdown file, targets without `#place`."""
    return re.findall(r"\[([^\]]*)\]\(([^)#]*)[^)]*\)", path.read_text("utf-8"))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *GUIDES], ids=lambda path: path.stem
)
def test_links_of_readme_and_guides_lead_somewhere(path):
    targets = [target for _, target in links_of(path)]
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_readme_leads_to_examples_guides_and_names():
    links = links_of(ROOT / "README.md")
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    guides = {f"examples/guides/{path.name}" for path in GUIDES}
    assert examples | guides <= {target for _, target in links}
    names = {name.strip("`"): target for name, target in links if name[:1] == "`"}
    assert names.keys() == set(kerastrip.__all__) - {"__version__"}
    for name, target in names.items():
        public = getattr(kerastrip, name)
        assert pathlib.Path(inspect.getfile(public)) == ROOT / target


def test_readme_and_guides_have_python_blocks():
    assert all(python_blocks(path) for path in (ROOT / "README.md", *GUIDES))


@pytest.fixture
def photos(tmp_path):
    """The folder of class folders, and the table of it, that README and guides speak of."""
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 40, 30, 3), np.uint8)
    table = ["path,identity,camera"]
    for number, of_class in enumerate(images):
        folder = tmp_path / "photos" / f"class {number}"
        folder.mkdir(parents=True)
        for name, image in enumerate(of_class):
            cv2.imwrite(str(folder / f"{name}.jpg"), image)
            table.append(f"photos/class {number}/{name}.jpg,{number},camera {name % 2}")
    (tmp_path / "table.csv").write_text("\n".join(table))


@pytest.mark.parametrize(("path", "blocks"), documents())
def test_blocks_of_readme_and_guides_run(path, blocks, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "document"}
    with contextlib.redirect_stdout(io.StringIO()):
        for line, code in blocks:
            # Blank lines in front, so that a traceback tells the line of the file.
            exec(compile("\n" * line + code, path.name, "exec"), namespace)
