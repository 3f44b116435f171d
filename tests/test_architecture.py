"""The rules that keep the code base readable, read from the sources themselves."""

import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "rise_jax").rglob("*.py"), ROOT / "main.py"])
PYTHON = sorted(
    {
        *SOURCES,
        *(path for folder in ("configs", "launch", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    }
)

# From the bottom up; a module may import from its own layer and those below. A folder stands for what is not named.
LAYERS = (
    ("axes", "trees", "version", "processes", "utf8", "padding", "writing"),
    (
        "models.layers",
        "models.attention",
        "models.ring",
        "models.splash",
        "models.remat",
        "flow",
        "optim",
        "sharding",
        "checkpoint",
        "report",
        "profiling",
        "throughput",
        "settings",
        "tensor_folder",
        "tensorboard",
        "video",
        "sheets",
        "workdir",
    ),
    ("models", "data"),
    (
        "unipc",
        "sampler",
        "text",
        "rephrase",
        "weights",
        "weights_files",
        "placement",
        "weights_wan",
        "weights_wan_vae",
        "weights_t5",
        "published",
        "llm_families",
        "llm_gguf",
        "llm_ropes",
        "gguf_tokenizer",
        "language",
        "condition_kinds",
        "conditions",
        "data.loader",
        "data.open",
    ),
    ("metrics", "pixel_rules"),
    (
        "build",
        "step",
        "run_config",
        "runs",
        "origin",
        "validate",
        "exported",
        "export_card",
        "known_sizes",
        "outline",
        "flops",
        "memory",
    ),
    ("pipeline", "rise_jax"),
    ("loop",),
    ("train", "generate", "evaluate", "export", "plan"),
    ("main",),
)
MAX_LINES = 300
LONGER = {}  # path: why it is one concept all the same
READS_CONFIG = {
    "main",
    "train",
    "loop",
    "generate",
    "evaluate",
    "export",
    "plan",
    "outline",
    "pipeline",
    "exported",
    "build",
    "published",
    "run_config",
    "runs",
    "origin",
    "validate",
}


def module_name(path):
    """'data.loader' for rise_jax/data/loader.py; 'rise_jax' for the package itself."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name.removeprefix("rise_jax.")


MODULES = {module_name(path): path for path in SOURCES}
TREES = {path: ast.parse(path.read_text()) for path in PYTHON}


def imports(tree):
    """Every dotted name a file imports, also inside functions: 'a.b' for import a.b, 'a.b.c' for from a.b import c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name):
    """The modules of this package that a module imports."""
    for dotted in imports(TREES[MODULES[name]]):
        if dotted.split(".")[0] == "rise_jax":
            target = dotted.removeprefix("rise_jax.")
            yield target if target in MODULES else target.rpartition(".")[0] or "rise_jax"


def layer(name):
    for candidate in (name, name.split(".")[0]):
        for height, row in enumerate(LAYERS):
            if candidate in row:
                return height
    raise AssertionError(f"{name} has no place in LAYERS")


def test_imports_go_down_only():
    upward = [
        f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)})"
        for name in MODULES
        for target in own_imports(name)
        if layer(target) > layer(name)
    ]
    assert not upward


def test_no_import_cycles():
    graphlib.TopologicalSorter({name: set(own_imports(name)) for name in MODULES}).prepare()


def test_every_layer_entry_exists():
    packages = {name.split(".")[0] for name in MODULES}
    assert not [name for row in LAYERS for name in row if name not in MODULES and name not in packages]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_private_is_taken_from_elsewhere(path):
    private = [name for name in imports(TREES[path]) if re.search(r"(^|\.)_(?!_)", name)]
    modules = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(TREES[path]):
        if (
            isinstance(node, ast.Attribute)
            and re.match(r"_(?!_)", node.attr)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and (node.value.id, node.attr) != ("os", "_exit")  # documented, and without another name
        ):
            private.append(f"{node.value.id}.{node.attr}")
    assert not private


def test_frameworks_stay_where_they_belong():
    flax = {name for name, path in MODULES.items() if any(x.split(".")[0] == "flax" for x in imports(TREES[path]))}
    allowed = {name for name in MODULES if name.startswith("models.")} | {"build", "step"}
    assert flax <= allowed
    assert {x for x in imports(TREES[MODULES["step"]]) if x.startswith("flax")} <= {"flax.struct"}
    for name, path in MODULES.items():
        roots = {x.split(".")[0] for x in imports(TREES[path])}
        assert not roots & {"torch", "tensorflow", "diffusers", "chex", "clu"}, name
        assert name in READS_CONFIG or "ml_collections" not in roots, f"the config object stops above {name}"


def test_file_names_say_a_concept_and_files_stay_short():
    assert not [path for path in PYTHON if path.stem in ("util", "utils", "common", "helper", "helpers", "misc")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: count for name, count in lengths.items() if count > MAX_LINES and name not in LONGER} == {}
    assert not [name for name in LONGER if lengths.get(name, 0) <= MAX_LINES], "an exception no longer needed"


def test_nothing_points_outside_the_repository():
    outside = re.compile("/" + r"work/|\.\./" + "shared")
    texts = [*PYTHON, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "requirements.txt"]
    assert not [str(path.relative_to(ROOT)) for path in texts if path.exists() and outside.search(path.read_text())]


# ---- configs ----

SIZES = ("model.llm", "model.adapter", "model.dit")  # one row of presets.py each, passed on as keyword arguments


def config_keys(stage):
    config = importlib.import_module(f"configs.{stage}").get_config()
    keys = {f"{group}.{key}" for group, values in config.items() for key in values}
    return keys - set(SIZES)


def reads(tree, group, key):
    """Whether a file reads config.group.key: as an attribute, as config.group[...] with the key's name in the file, or
    as part of **config.group."""
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == key and is_group(node.value, group):
            return True
        if isinstance(node, ast.Subscript) and is_group(node.value, group) and key in texts:
            return True
        if isinstance(node, ast.keyword) and node.arg is None and is_group(node.value, group):
            return True
    return False


def is_group(node, group):
    return (isinstance(node, ast.Attribute) and node.attr == group) or (isinstance(node, ast.Name) and node.id == group)


def test_configs_are_small():
    for stage in ("stage0", "stage1", "stage2"):
        keys = config_keys(stage)
        assert len(keys) <= 60
        assert {key.split(".")[0] for key in keys} == {"run", "data", "model", "optim", "mesh", "sample"}
    assert config_keys("stage0") == config_keys("stage1") == config_keys("stage2")


@pytest.mark.parametrize("name", sorted(config_keys("stage1")))
def test_every_config_key_is_read(name):
    group, key = name.split(".")
    readers = [module for module in READS_CONFIG - {"validate"} if reads(TREES[MODULES[module]], group, key)]
    assert readers, f"{name} is a dead key: nothing but validate reads it"
