"""Owns the rules of the house: imports point down, one door to distribution, no pickle, a line budget.

Must not know what any module does: it reads the syntax tree, so a rule holds for code that no test runs. Each rule is
a function from a file to complaints, and `test_each_rule_catches` shows each of them a violation.
"""

import ast
import dataclasses
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import tinytrain_dist

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tinytrain_dist"

# From the ground up. A module imports from lower layers only; modules of one layer do not know each other.
LAYERS: list[set[str]] = [
    {"errors", "files"},
    {"config"},
    {"commandline", "layout", "huggingface", "tensorfiles", "stopping", "pulse", "network", "products"},
    {"optim", "losses", "schedule", "failure"},
    {"model", "watchdog"},  # its head computes the loss in chunks (losses), so that no rank holds all logits
    {"data", "board", "meeting"},
    {"distributed", "environment"},
    {"reduction", "replicas", "samples"},
    {"parallel"},
    {"checkpoint", "metrics", "estimate", "profiling"},
    {"saver", "preflight", "observer", "census"},
    {"engine"},
    {"trainer"},
    {"run", "agent"},
    {"tools"},  # the modules in tools/ may import each other
    {"cli", "launch"},
]
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}

# Three budgets: what trains (to be read in an afternoon), what watches over it (to be read when it says that something
# is wrong), and the tools, to which plan, doctor and status came.
LINES = {"core": 3500, "care": 1800, "tools": 3000}
CARE = set(
    "agent board census cli environment estimate failure metrics network observer preflight "
    "profiling pulse replicas run samples stopping watchdog".split()
)
FILE_LINES, FUNCTION_LINES = 500, 60
SHORT_FUNCTIONS = {"Trainer.fit": 40, "Engine.train_step": 40}

DOOR, PORCH = "distributed", "meeting"  # before it ranks find each other
RANK_VARIABLES = set(
    """RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE NODE_RANK ROLE_RANK ROLE_WORLD_SIZE
    MASTER_ADDR MASTER_PORT SLURM_PROCID SLURM_LOCALID SLURM_NTASKS TORCHELASTIC_RUN_ID""".split()
)
COLLECTIVES = re.compile(
    r"all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|scatter_object|gather_object|send_object|recv_object"
    r"|(^|\.)(_?reduce|gather|scatter|barrier|monitored_barrier|send|recv|isend|irecv|batch_isend_irecv|P2POp)$"
    r"|(^|\.)(new_group|new_subgroups|split_group|init_process_group|destroy_process_group|init_device_mesh)"
    r"|_functional_collectives"
)
# Sharded tensors have types, and wrappers are functions on a finished model: these modules may name them.
TYPES_OF_DISTRIBUTION = re.compile(
    r"torch\.distributed\.(fsdp|tensor|device_mesh|algorithms)\b|torch\.distributed\.(GradBucket|ProcessGroup)$"
)
LAUNCHER = re.compile(r"torch\.distributed\.(run|elastic)\b")  # what starts ranks is no rank
NAME_TYPES_OF_DISTRIBUTION = {"parallel", "checkpoint", "reduction", "optim", PORCH}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


@dataclasses.dataclass(frozen=True)
class File:
    """A Python file: its path from the checkout, its text, its tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Its name in LAYERS."""
        if self.path.parts[0] != PACKAGE:
            return self.path.parts[0]
        return "tools" if self.path.parts[1] == "tools" else self.path.stem

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


@cache
def files() -> list[File]:
    paths = [path for folder in (PACKAGE, "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found.append(File(path.relative_to(ROOT), text, ast.parse(text, str(path))))
    return found


def imported_names(file: File) -> Iterator[tuple[ast.stmt, str, str]]:
    """(statement, local name, full dotted name) of everything the file imports, wherever in the file."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.asname or alias.name.partition(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            package = file.path.with_suffix("").parts[: -node.level] if node.level else ()
            source = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, alias.asname or alias.name, f"{source}.{alias.name}"


def dotted_names(file: File) -> Iterator[tuple[ast.AST, str]]:
    """(node, full dotted name) of every import and of every attribute chain that starts at an imported name."""
    home: dict[str, str] = {}
    for statement, local, full in imported_names(file):
        aliased = isinstance(statement, ast.ImportFrom) or any(alias.asname == local for alias in statement.names)
        home[local] = full if aliased else local
        yield statement, full
    for node in ast.walk(file.tree):
        chain: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            chain.append(at.attr)
            at = at.value
        if chain and isinstance(at, ast.Name) and at.id in home:
            yield node, ".".join([home[at.id], *reversed(chain)])


def functions(file: File) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str, int]]:
    """(node, qualified name, lines) of every function, nested ones too."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str, int]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{child.name}" if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, name, (child.end_lineno or 0) - child.lineno + 1
            inside = child.name + "." if isinstance(child, ast.ClassDef) else f"{name}." if name else ""
            yield from visit(child, prefix + inside if isinstance(child, ast.ClassDef) else inside or prefix)

    return visit(file.tree, "")


# ---------------------------------------------------------------- rules: a file -> complaints


def has_a_layer(file: File) -> list[str]:
    if file.module in HEIGHT or file.path == Path(PACKAGE, "__init__.py"):
        return []
    return [f"{file.path} is in no layer; add it to LAYERS in {Path(__file__).name} where its imports allow"]


def imports_point_down(file: File) -> list[str]:
    if file.path == Path(PACKAGE, "__init__.py"):  # names all modules, imports none
        return [f"{file.at(node)} imports {full}; add the name to _HOME" for node, full in own_imports(file)]
    problems = []
    for node, full in own_imports(file):
        target = module_of(full)
        if target is None or (target == file.module == "tools"):
            continue
        if HEIGHT.get(target, len(LAYERS)) >= HEIGHT.get(file.module, -1):
            problems.append(
                f"{file.at(node)}: {file.module} imports {target}, which is not below it; "
                "move what is shared down, or pass it in as an argument"
            )
    return problems


def own_imports(file: File) -> Iterator[tuple[ast.stmt, str]]:
    return ((node, full) for node, _, full in imported_names(file) if full.split(".")[0] in (PACKAGE, "launch"))


def module_of(full: str) -> str | None:
    """Which module of ours a dotted import name belongs to; None for the package itself."""
    root, *rest = full.split(".")
    if root == "launch":
        return "launch"
    if not rest or rest[0].startswith("__"):
        return None
    return tinytrain_dist._HOME.get(rest[0], rest[0])


def goes_through_the_door(file: File) -> list[str]:
    """Only distributed.py creates groups and calls collectives; few others name types of torch.distributed."""
    if file.module == DOOR:
        return []
    problems = []
    for node, full in dotted_names(file):
        if not full.startswith("torch.distributed"):
            continue
        if file.module == "agent" and LAUNCHER.match(full):
            continue
        if COLLECTIVES.search(full.removeprefix("torch.distributed")):
            problems.append(f"{file.at(node)} uses {full}; give DistributedContext a method for it and call that")
        elif file.module not in NAME_TYPES_OF_DISTRIBUTION and not isinstance(node, ast.Attribute):
            problems.append(f"{file.at(node)} imports {full}; let {DOOR}.py do it")
        elif not isinstance(node, ast.Attribute) and not allowed_type_import(node, full):
            problems.append(f"{file.at(node)} imports {full}; only its types are free, the rest belongs in {DOOR}.py")
    return problems


def allowed_type_import(node: ast.AST, full: str) -> bool:
    bare = full == "torch.distributed" and isinstance(node, ast.Import | ast.ImportFrom)  # its use is checked as such
    return bare or bool(TYPES_OF_DISTRIBUTION.match(full))


def reads_no_rank(file: File) -> list[str]:
    if file.module in (DOOR, PORCH):
        return []
    return [
        f"{file.at(node)} names the variable {node.value}; take the number from DistributedContext ({DOOR}.py)"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in RANK_VARIABLES
    ]


def uses_no_pickle(file: File) -> list[str]:
    remedy = "use safetensors for tensors and JSON for the rest"
    problems = []
    for node, full in dotted_names(file):
        if full.split(".")[0] in PICKLERS or full in ("torch.load", "torch.save", "torch.distributed.checkpoint"):
            problems.append(f"{file.at(node)} uses {full}, which runs code from files; {remedy}")
    for node in ast.walk(file.tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            problems += [] if off else [f"{file.path}:{node.value.lineno} sets allow_pickle; {remedy}"]
    return problems


def says_what_it_owns(file: File) -> list[str]:
    text = ast.get_docstring(file.tree) or ""
    if len(re.findall(r"[.!?](?=\s|$)", text)) >= 2:
        return []
    return [f"{file.path} must open with a docstring of two sentences: what it owns, and what it must not know"]


def fits_its_budget(file: File) -> list[str]:
    lines = len(file.text.splitlines())
    problems = [f"{file.path} has {lines} lines of {FILE_LINES}; split it by concern"] if lines > FILE_LINES else []
    for node, name, length in functions(file):
        limit = SHORT_FUNCTIONS.get(name, FUNCTION_LINES)
        if length > limit:
            problems.append(
                f"{file.at(node)}: {name} has {length} lines of {limit}; give a part of it a name of its own"
            )
    return problems


RULES: list[Callable[[File], list[str]]] = [
    has_a_layer,
    imports_point_down,
    goes_through_the_door,
    reads_no_rank,
    uses_no_pickle,
    says_what_it_owns,
    fits_its_budget,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file(rule: Callable[[File], list[str]]) -> None:
    problems = dict.fromkeys(problem for file in files() for problem in rule(file))  # once, in order
    assert not problems, "\n" + "\n".join(problems)


LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
VIOLATIONS: list[tuple[Callable[[File], list[str]], str, str]] = [
    (has_a_layer, "tinytrain_dist/utils.py", ""),
    (imports_point_down, "tinytrain_dist/config.py", "from tinytrain_dist.model import TransformerLM"),
    (imports_point_down, "tinytrain_dist/config.py", "from tinytrain_dist import TransformerLM"),
    (imports_point_down, "tinytrain_dist/losses.py", "from .model import RMSNorm"),
    (imports_point_down, "tinytrain_dist/optim.py", "def f():\n    import tinytrain_dist.losses"),
    (imports_point_down, "tinytrain_dist/trainer.py", "from tinytrain_dist.tools.plan import plan"),
    (imports_point_down, "tinytrain_dist/tools/plan.py", "from tinytrain_dist import cli"),
    (imports_point_down, "tinytrain_dist/tools/plan.py", "import launch.train"),
    (imports_point_down, "tinytrain_dist/__init__.py", "from tinytrain_dist.config import TrainingConfig"),
    (goes_through_the_door, "tinytrain_dist/trainer.py", "import torch\ntorch.distributed.all_reduce(x)"),
    (goes_through_the_door, "tinytrain_dist/parallel.py", "import torch.distributed as dist\ndist.barrier()"),
    (goes_through_the_door, "tinytrain_dist/parallel.py", "from torch import distributed as d\nd.all_gather_object(x)"),
    (goes_through_the_door, "tinytrain_dist/reduction.py", "from torch.distributed import all_to_all_single as a"),
    (goes_through_the_door, "tinytrain_dist/parallel.py", "from torch.distributed.device_mesh import init_device_mesh"),
    (goes_through_the_door, "tinytrain_dist/checkpoint.py", "from torch.distributed import checkpoint"),
    (goes_through_the_door, "tinytrain_dist/trainer.py", "from torch.distributed.tensor import DTensor"),
    (goes_through_the_door, "launch/train.py", "import torch.distributed as dist\ndist.init_process_group()"),
    (reads_no_rank, "tinytrain_dist/metrics.py", "import os\nos.environ.get('LOCAL_RANK')"),
    (reads_no_rank, "launch/train.py", "from os import environ as e\n'RANK' in e"),
    (uses_no_pickle, "tinytrain_dist/checkpoint.py", "import pickle"),
    (uses_no_pickle, "tinytrain_dist/checkpoint.py", "import torch\ntorch.load(path)"),
    (uses_no_pickle, "tinytrain_dist/checkpoint.py", "from torch import save as keep"),
    (uses_no_pickle, "tinytrain_dist/data.py", "import numpy as np\nnp.load(path, allow_pickle=True)"),
    (says_what_it_owns, "tinytrain_dist/data.py", '"""Owns only one sentence."""'),
    (says_what_it_owns, "tinytrain_dist/data.py", "# Owns much. Knows nothing."),
    (fits_its_budget, "tinytrain_dist/data.py", "x = 1\n" * (FILE_LINES + 1)),
    (fits_its_budget, "tinytrain_dist/data.py", LONG),
    (fits_its_budget, "tinytrain_dist/trainer.py", "class Trainer:\n    def fit(self):\n" + "        x = 1\n" * 40),
]


def file_of(path: str, text: str) -> File:
    return File(Path(path), text, ast.parse(text))


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS)
def test_each_rule_catches(rule: Callable[[File], list[str]], path: str, text: str) -> None:
    assert rule(file_of(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tinytrain_dist/distributed.py", "import os\nimport torch.distributed as d\nd.barrier()\nos.environ['RANK']"),
        ("tinytrain_dist/parallel.py", "from torch.distributed.fsdp import fully_shard"),
        ("tinytrain_dist/reduction.py", "import torch.distributed as dist\ndef hook(bucket: dist.GradBucket): ..."),
        ("tinytrain_dist/trainer.py", "from tinytrain_dist import checkpoint, TrainingConfig\ncontext.all_reduce(x)"),
        ("tinytrain_dist/tools/plan.py", "from tinytrain_dist.cli.doctor import check\nfrom . import status"),
        ("launch/train.py", "from tinytrain_dist.trainer import Trainer\nimport tinytrain_dist"),
        ("tinytrain_dist/data.py", "import numpy as np\nnp.load(path, allow_pickle=False)"),
        ("tinytrain_dist/trainer.py", "class Trainer:\n    def evaluate(self):\n" + "        x = 1\n" * 50),
    ],
)
def test_no_rule_forbids_what_the_design_allows(path: str, text: str) -> None:
    rules = [rule for rule in RULES if rule is not says_what_it_owns]
    assert [problem for rule in rules for problem in rule(file_of(path, text))] == []


# ---------------------------------------------------------------- rules about the whole


def code_lines(file: File) -> int:
    """Lines that hold code: the budget is for concepts, and must not be met by leaving out what explains them."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        if token.type not in layout:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def test_code_lines_leave_out_what_explains() -> None:
    text = (
        '"""Doc\nstring."""\n\n# comment\nx = (1 +\n     2)  # sum\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
    )
    assert code_lines(file_of("tinytrain_dist/data.py", text)) == 5


@pytest.mark.parametrize("part", LINES)
def test_the_package_fits_its_budget(part: str) -> None:
    lines = {}
    for file in files():
        where = "care" if file.module in CARE else file.module if file.module in ("tools", "launch") else "core"
        if where == part:
            lines[str(file.path)] = code_lines(file)
    assert len(lines) > 5, "the package has moved; count where it is now"
    listing = "\n".join(f"{count:6} {path}" for path, count in sorted(lines.items(), key=lambda item: -item[1]))
    assert sum(lines.values()) <= LINES[part], (
        f"the {part} has {sum(lines.values())} lines of code of {LINES[part]}. The budget is for concepts, not for "
        f"characters: drop or merge a concept, do not squeeze lines.\n{listing}"
    )


@pytest.mark.parametrize("module", ["tinytrain_dist", "tinytrain_dist.config", "tinytrain_dist.layout"])
def test_a_login_node_can_check_a_run_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.strip() == "", (
        f"import {module} also imports {finished.stdout.strip()}: import it inside the function that needs it, "
        "because a login node checks a run in a tenth of a second"
    )


def test_every_attribute_of_the_configuration_is_a_field() -> None:
    from tinytrain_dist.config.schema import TrainingConfig

    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    for name, value in vars(TrainingConfig).items():
        described = inspect.isroutine(value) or isinstance(value, property | type) or hasattr(value, "__get__")
        assert name in fields or name.startswith("__") or described, (
            f"TrainingConfig.{name} has no annotation, so it is no field and cannot be set: write `{name}: type = ...`"
        )
    assert TrainingConfig.__dataclass_params__.frozen, "TrainingConfig must be frozen: nobody writes to a configuration"  # type: ignore[attr-defined]


def test_public_names_are_importable_and_documented() -> None:
    assert sorted(tinytrain_dist.__all__) == sorted(dir(tinytrain_dist)), "__dir__ must return __all__"
    for name in tinytrain_dist.__all__:
        home = tinytrain_dist._HOME[name]
        assert home in HEIGHT, f"_HOME says that {name} lives in {home}, which is no module in LAYERS"
        if not (ROOT / PACKAGE / f"{home}.py").exists():
            continue
        module = importlib.import_module(f"{PACKAGE}.{home}")
        assert hasattr(module, name), f"{name} is public but {home}.py has no such name; define it or take it off _HOME"
        value = getattr(tinytrain_dist, name)
        assert value.__module__ == module.__name__, f"{name} is defined in {value.__module__}, _HOME says {home}"
        assert value.__doc__, f"{name} is public and has no docstring; say what it does"
    with pytest.raises(AttributeError, match="no_such_name"):
        tinytrain_dist.no_such_name  # noqa: B018
