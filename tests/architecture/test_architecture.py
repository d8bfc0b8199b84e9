"""Check the rules for the code: the direction of imports, where collectives are called, no pickle, limits of size.

Must not know what any module does. It reads the syntax tree, so a rule also holds for code that no test runs. Each rule
is a function that returns the violations in a file. `test_each_rule_catches` gives each rule a violation.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import tinytrain_dist

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "tinytrain_dist"

# From the lowest layer to the highest. A file imports only from its own package and from packages of lower layers.
# `programs` are the files that are started by name: train.py, agent.py and __main__.py.
LAYERS: list[set[str]] = [
    {"errors", "utils"},
    {"config", "data"},
    {"distributed", "model"},
    {"optim"},
    {"parallel"},
    {"metrics"},
    {"reliability"},
    {"checkpoint"},
    {"training"},
    {"launch"},
    {"cli"},
    {"programs"},
    {"scripts"},  # launch/*.py
]
HEIGHT = {package: height for height, layer in enumerate(LAYERS) for package in layer}
PROGRAMS = {"train", "agent", "__main__"}

FILE_LINES, FUNCTION_LINES, CLASS_LINES = 500, 60, 250
SHORT_FUNCTIONS = {"Trainer.fit": 40, "TrainStep.run": 40}

RANK_VARIABLES = set(
    """RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE NODE_RANK ROLE_RANK ROLE_WORLD_SIZE
    MASTER_ADDR MASTER_PORT SLURM_PROCID SLURM_LOCALID SLURM_NTASKS TORCHELASTIC_RUN_ID""".split()
)
RANKS_START_IN = Path("tinytrain_dist/launch/start.py")  # sets these variables for a rank that it starts itself
COLLECTIVES = re.compile(
    r"all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|scatter_object|gather_object|send_object|recv_object"
    r"|(^|\.)(_?reduce|gather|scatter|barrier|monitored_barrier|send|recv|isend|irecv|batch_isend_irecv|P2POp)$"
    r"|(^|\.)(new_group|new_subgroups|split_group|init_process_group|destroy_process_group|init_device_mesh)"
    r"|_functional_collectives"
)
# Modules in NAME_TYPES_OF_DISTRIBUTION may name these types: those of sharded tensors and of wrapped models.
TYPES_OF_DISTRIBUTION = re.compile(
    r"torch\.distributed\.(fsdp|tensor|device_mesh|algorithms)\b|torch\.distributed\.(GradBucket|ProcessGroup)$"
)
LAUNCHER = re.compile(r"torch\.distributed\.(run|elastic)\b")  # the launcher starts ranks, but is not a rank
NAME_TYPES_OF_DISTRIBUTION = {"parallel", "checkpoint", "optim", "training"}
# What a processor can compute is asked below distributed/, in the one file that is about it.
TORCH_INTERNALS = Path(PACKAGE, "distributed", "torch_internals.py")
TORCHRUN_INTERNALS = TORCH_INTERNALS.with_name("torchrun_internals.py")
PRIVATE_TORCH = {
    TORCH_INTERNALS,
    TORCHRUN_INTERNALS,
    Path(PACKAGE, "model", "matmul.py"),
    Path(PACKAGE, "model", "fp8.py"),
}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


@dataclasses.dataclass(frozen=True)
class File:
    """A Python file: its path in the checkout, its text, its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Its name in LAYERS."""
        if self.path.parts[0] != PACKAGE:
            return "scripts"
        if len(self.path.parts) > 2:
            return self.path.parts[1]
        return "programs" if self.path.stem in PROGRAMS else self.path.stem

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
    """Return (statement, local name, full dotted name) of everything that the file imports, in functions too."""
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
    """Return (node, full dotted name) of each import, and of each attribute chain that starts at an imported name."""
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
    """Return (node, qualified name, lines) of each function, nested ones included."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str, int]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{child.name}" if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, name, (child.end_lineno or 0) - child.lineno + 1
            inside = child.name + "." if isinstance(child, ast.ClassDef) else f"{name}." if name else ""
            yield from visit(child, prefix + inside if isinstance(child, ast.ClassDef) else inside or prefix)

    return visit(file.tree, "")


# ---------------------------------------------------------------- rules: file -> violations


def has_a_layer(file: File) -> list[str]:
    if file.module in HEIGHT or file.path == Path(PACKAGE, "__init__.py"):
        return []
    return [f"{file.path} is in no layer; add it to LAYERS in {Path(__file__).name} where its imports allow"]


def imports_point_down(file: File) -> list[str]:
    if file.path == Path(PACKAGE, "__init__.py"):  # at run time it names all modules and imports none
        typing = {id(inner) for node in file.tree.body if is_type_checking(node) for inner in ast.walk(node)}
        found = [(node, full) for node, full in own_imports(file) if id(node) not in typing]
        return [f"{file.at(node)} imports {full}; add the name to _HOME" for node, full in found]
    problems = []
    for node, full in own_imports(file):
        target = module_of(full)
        if target is None or target == file.module:
            continue
        if HEIGHT.get(target, len(LAYERS)) >= HEIGHT.get(file.module, -1):
            problems.append(
                f"{file.at(node)}: {file.module} imports {target}, which is not below it; "
                "move what is shared down, or pass it in as an argument"
            )
    return problems


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own_imports(file: File) -> Iterator[tuple[ast.stmt, str]]:
    return ((node, full) for node, _, full in imported_names(file) if full.split(".")[0] in (PACKAGE, "launch"))


def module_of(full: str) -> str | None:
    """Return the module of this project that a dotted import name belongs to; None for the package itself."""
    root, *rest = full.split(".")
    if root == "launch":
        return "scripts"
    if not rest or (rest[0].startswith("__") and rest[0] != "__main__"):
        return None
    home = tinytrain_dist._HOME.get(rest[0], rest[0]).split(".")[0]
    return "programs" if home in PROGRAMS else home


def only_distributed_communicates(file: File) -> list[str]:
    """Only distributed/ creates groups and calls collectives; few other packages name types of torch.distributed."""
    if file.module == "distributed":
        return []
    problems = []
    for node, full in dotted_names(file):
        if not full.startswith("torch.distributed"):
            continue
        if file.module == "launch" and LAUNCHER.match(full):
            continue
        if COLLECTIVES.search(full.removeprefix("torch.distributed")):
            problems.append(f"{file.at(node)} uses {full}; give DistributedContext a method for it and call that")
        elif file.module not in NAME_TYPES_OF_DISTRIBUTION and not isinstance(node, ast.Attribute):
            problems.append(f"{file.at(node)} imports {full}; let distributed/ do it")
        elif not isinstance(node, ast.Attribute) and not allowed_type_import(node, full):
            problems.append(
                f"{file.at(node)} imports {full}; only its types are free, the rest belongs in distributed/"
            )
    return problems


def allowed_type_import(node: ast.AST, full: str) -> bool:
    bare = full == "torch.distributed" and isinstance(node, ast.Import | ast.ImportFrom)  # its use is checked as such
    return bare or bool(TYPES_OF_DISTRIBUTION.match(full))


def reads_no_rank(file: File) -> list[str]:
    if file.module == "distributed" or file.path == RANKS_START_IN:
        return []
    return [
        f"{file.at(node)} names the variable {node.value}; take the number from DistributedContext"
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


def has_a_summary(file: File) -> list[str]:
    text = (ast.get_docstring(file.tree) or "").partition("\n\n")[0]
    if file.path.name == "__init__.py" or (text.endswith(".") and len(text) < 300):
        return []
    return [f"{file.path} must open with a docstring whose first paragraph is one summary sentence"]


def fits_its_budget(file: File) -> list[str]:
    lines = len(file.text.splitlines())
    problems = [f"{file.path} has {lines} lines of {FILE_LINES}; split it by concern"] if lines > FILE_LINES else []
    for node, name, length in functions(file):
        limit = SHORT_FUNCTIONS.get(name, FUNCTION_LINES)
        if length > limit:
            problems.append(
                f"{file.at(node)}: {name} has {length} lines of {limit}; give a part of it a name of its own"
            )
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > CLASS_LINES:
            problems.append(f"{file.at(node)}: {node.name} has {length} lines of {CLASS_LINES}; give it parts")
    return problems


def uses_no_mock_library(file: File) -> list[str]:
    """The package uses no mock library, because a mock makes code do something else than it says."""
    used = [(node, full) for node, full in dotted_names(file) if full.startswith("unittest")]
    return [f"{file.at(node)} imports {full}; pass what changes as an argument" for node, full in used]


def private_torch_is_in_one_file(file: File) -> list[str]:
    """Names of torch that begin with an underscore may change in any version; torch's own optimizers use _foreach."""
    if file.path in PRIVATE_TORCH:
        return []
    return [
        f"{file.at(node)} uses {full}; give it a function in distributed/torch_internals.py, with its versions"
        for node, full in dotted_names(file)
        if full.startswith("torch.") and re.search(r"\._(?!_|foreach_)", full)
    ]


def asks_no_version_of_torch(file: File) -> list[str]:
    """What differs between versions of torch is in one file. Records and messages may contain the version."""
    if file.path == TORCH_INTERNALS:
        return []
    versions = {id(node) for node, full in dotted_names(file) if full in ("torch.__version__", "torch.torch_version")}
    of_torch = {id(node) for node, full in dotted_names(file) if full.startswith("torch.")}
    homes = {local for _, local, full in imported_names(file) if full.partition(".")[0] == "torch"}
    asking: list[ast.AST] = []
    for node in ast.walk(file.tree):
        match node:
            case (
                ast.Call(func=ast.Name(id="hasattr"), args=[asked, _])
                | ast.Call(func=ast.Name(id="getattr"), args=[asked, _, _])
            ):
                asking += [asked] if id(asked) in of_torch or getattr(asked, "id", None) in homes else []
            case ast.Compare() | ast.Attribute() | ast.Subscript() | ast.Call():
                asking += [part for part in ast.iter_child_nodes(node) if id(part) in versions]
            case ast.Import() | ast.ImportFrom():
                asking += [node] if id(node) in versions else []
    return [f"{file.at(node)} asks what this torch has; give it a function in {TORCH_INTERNALS}" for node in asking]


def names_the_owner_of_temporary_folders(file: File) -> list[str]:
    """A folder that is not named after its process stays forever if the process is killed."""
    calls = {id(node.func): node for node in ast.walk(file.tree) if isinstance(node, ast.Call)}
    return [
        f"{file.at(node)} makes a temporary folder without an owner; use scratch_folder of utils/stale_files.py"
        for node, full in dotted_names(file)
        if full in ("tempfile.TemporaryDirectory", "tempfile.mkdtemp")
        and (id(node) not in calls or "owner()" not in ast.unparse(calls[id(node)]))
    ]


RULES: list[Callable[[File], list[str]]] = [
    has_a_layer,
    imports_point_down,
    only_distributed_communicates,
    reads_no_rank,
    uses_no_pickle,
    has_a_summary,
    fits_its_budget,
    uses_no_mock_library,
    private_torch_is_in_one_file,
    asks_no_version_of_torch,
    names_the_owner_of_temporary_folders,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file(rule: Callable[[File], list[str]]) -> None:
    problems = dict.fromkeys(problem for file in files() for problem in rule(file))  # once, in order
    assert not problems, "\n" + "\n".join(problems)


LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
COMMUNICATES = only_distributed_communicates
VIOLATIONS: list[tuple[Callable[[File], list[str]], str, str]] = [
    (has_a_layer, "tinytrain_dist/helpers/x.py", ""),
    (has_a_layer, "tinytrain_dist/helpers.py", ""),
    (imports_point_down, "tinytrain_dist/config/schema.py", "from tinytrain_dist.model import transformer"),
    (imports_point_down, "tinytrain_dist/config/schema.py", "from tinytrain_dist import TransformerLM"),
    (imports_point_down, "tinytrain_dist/config/schema.py", "from ..model import transformer"),
    (imports_point_down, "tinytrain_dist/data/batches.py", "from tinytrain_dist.distributed import context"),
    (imports_point_down, "tinytrain_dist/model/loss.py", "def f():\n    import tinytrain_dist.optim.adamw"),
    (imports_point_down, "tinytrain_dist/training/trainer.py", "from tinytrain_dist.cli.plan import main"),
    (imports_point_down, "tinytrain_dist/launch/rank_program.py", "import tinytrain_dist.train"),
    (imports_point_down, "tinytrain_dist/cli/plan.py", "import launch.train"),
    (imports_point_down, "tinytrain_dist/__init__.py", "from tinytrain_dist.config.schema import TrainingConfig"),
    (COMMUNICATES, "tinytrain_dist/training/trainer.py", "import torch\ntorch.distributed.all_reduce(x)"),
    (COMMUNICATES, "tinytrain_dist/parallel/x.py", "import torch.distributed as dist\ndist.barrier()"),
    (COMMUNICATES, "tinytrain_dist/parallel/x.py", "from torch import distributed as d\nd.all_gather_object(x)"),
    (COMMUNICATES, "tinytrain_dist/parallel/x.py", "from torch.distributed import all_to_all_single as a"),
    (COMMUNICATES, "tinytrain_dist/parallel/x.py", "from torch.distributed.device_mesh import init_device_mesh"),
    (COMMUNICATES, "tinytrain_dist/checkpoint/x.py", "from torch.distributed import checkpoint"),
    (COMMUNICATES, "tinytrain_dist/metrics/x.py", "from torch.distributed.tensor import DTensor"),
    (COMMUNICATES, "launch/train.py", "import torch.distributed as dist\ndist.init_process_group()"),
    (reads_no_rank, "tinytrain_dist/metrics/run_log.py", "import os\nos.environ.get('LOCAL_RANK')"),
    (reads_no_rank, "launch/train.py", "from os import environ as e\n'RANK' in e"),
    (uses_no_pickle, "tinytrain_dist/checkpoint/state_collection.py", "import pickle"),
    (uses_no_pickle, "tinytrain_dist/checkpoint/state_collection.py", "import torch\ntorch.load(path)"),
    (uses_no_pickle, "tinytrain_dist/checkpoint/state_collection.py", "from torch import save as keep"),
    (uses_no_pickle, "tinytrain_dist/data/batches.py", "import numpy as np\nnp.load(path, allow_pickle=True)"),
    (has_a_summary, "tinytrain_dist/data/batches.py", '"""No full stop"""'),
    (has_a_summary, "tinytrain_dist/data/batches.py", "# Draw batches."),
    (fits_its_budget, "tinytrain_dist/data/batches.py", "x = 1\n" * (FILE_LINES + 1)),
    (fits_its_budget, "tinytrain_dist/data/batches.py", LONG),
    (fits_its_budget, "tinytrain_dist/data/batches.py", "class C:\n" + "    x = 1\n" * CLASS_LINES),
    (
        fits_its_budget,
        "tinytrain_dist/training/trainer.py",
        "class Trainer:\n    def fit(self):\n" + "        x = 1\n" * 40,
    ),
    (uses_no_mock_library, "tinytrain_dist/training/memory_estimate.py", "from unittest import mock"),
    (private_torch_is_in_one_file, "tinytrain_dist/parallel/compile.py", "def f():\n    import torch._dynamo as d"),
    (private_torch_is_in_one_file, "tinytrain_dist/model/loss.py", "import torch\ntorch.cuda.memory._dump_snapshot(p)"),
    (private_torch_is_in_one_file, "tinytrain_dist/launch/x.py", "from torch.api import C\nC._close = None"),
    (asks_no_version_of_torch, "tinytrain_dist/model/x.py", "import torch\nif torch.__version__ >= '2.13': f()"),
    (asks_no_version_of_torch, "tinytrain_dist/model/x.py", "import torch as t\nparts = t.__version__.split('.')"),
    (asks_no_version_of_torch, "tinytrain_dist/model/x.py", "from torch import __version__\nf(Version(__version__))"),
    (asks_no_version_of_torch, "tinytrain_dist/model/x.py", "import torch\nif hasattr(torch, 'set_timeout'): f()"),
    (asks_no_version_of_torch, "tinytrain_dist/model/x.py", "from torch import cuda as c\nf = getattr(c.m, 'g', None)"),
    (names_the_owner_of_temporary_folders, "tinytrain_dist/cli/x.py", "import tempfile\ntempfile.mkdtemp(prefix='a')"),
]


def file_of(path: str, text: str) -> File:
    return File(Path(path), text, ast.parse(text))


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS)
def test_each_rule_catches(rule: Callable[[File], list[str]], path: str, text: str) -> None:
    assert rule(file_of(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "tinytrain_dist/distributed/context.py",
            "import os\nimport torch.distributed as d\nd.barrier()\nos.environ['RANK']",
        ),
        ("tinytrain_dist/parallel/wrappers.py", "from torch.distributed.fsdp import fully_shard"),
        ("tinytrain_dist/parallel/x.py", "import torch.distributed as dist\ndef hook(bucket: dist.GradBucket): ..."),
        ("tinytrain_dist/training/trainer.py", "from tinytrain_dist import TrainingConfig\ncontext.all_reduce(x)"),
        ("tinytrain_dist/cli/plan.py", "from tinytrain_dist.cli.doctor import check\nfrom . import status"),
        ("launch/train.py", "from tinytrain_dist.train import main\nimport tinytrain_dist"),
        ("tinytrain_dist/data/batches.py", "import numpy as np\nnp.load(path, allow_pickle=False)"),
        ("tinytrain_dist/optim/adamw.py", "import torch\ntorch._foreach_mul_(tensors, 2.0)"),
        ("tinytrain_dist/optim/adamw.py", "import torch\nrecord = {'torch': torch.__version__}\ngetattr(torch, name)"),
        ("tinytrain_dist/optim/adamw.py", "import torch\nsay(f'torch {torch.__version__}')"),
        ("tinytrain_dist/training/trainer.py", "class Trainer:\n    def evaluate(self):\n" + "        x = 1\n" * 50),
    ],
)
def test_no_rule_forbids_what_the_design_allows(path: str, text: str) -> None:
    rules = [rule for rule in RULES if rule is not has_a_summary]
    assert [problem for rule in rules for problem in rule(file_of(path, text))] == []


# ---------------------------------------------------------------- rules about the whole package


@pytest.mark.parametrize(
    "module", ["tinytrain_dist", "tinytrain_dist.config.loading", "tinytrain_dist.distributed.batch_plan"]
)
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
        module = importlib.import_module(f"{PACKAGE}.{home}")
        assert hasattr(module, name), f"{name} is public but {home}.py has no such name; define it or take it off _HOME"
        value = getattr(tinytrain_dist, name)
        assert value.__module__ == module.__name__, f"{name} is defined in {value.__module__}, _HOME says {home}"
        assert value.__doc__, f"{name} is public and has no docstring; say what it does"
    with pytest.raises(AttributeError, match="no_such_name"):
        tinytrain_dist.no_such_name  # noqa: B018
