"""The walls: layers, imports, file lengths, and the public names."""

import ast
from pathlib import Path

import pytest

import tl_callbacks

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tl_callbacks").rglob("*.py"))
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}

# Ground, methods, roof: each layer imports what is below it only, and methods not each other but for `STANDS_ON`.
GROUND = {"errors", "events", "names", "tables", "groups", "parameters", "frozen", "discovery", "timm_layers"}
GROUND |= {"callbacks", "checkpoints", "dtensors", "fingerprints", "losses", "reading", "sharding"}
METHODS = {"layerwise", "unfreezing", "anchoring", "probing", "forgetting"}
# What was lost is read as what moved is: one forward pass over rows shared among ranks, the same features and probes.
STANDS_ON = {"forgetting": {"probing"}}
ROOF = {"preflight", "loss_scale", "recorder", "attach", "bundles", "strategies", "previewing", "ranks", "resuming"}
ROOF |= {"costs", "identity", "invocation"}


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Names of this package's modules that a file imports at its top level, `TYPE_CHECKING` blocks left out."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else str(node.module), node) for name in names]
    return [(name, node) for name, node in found if name.split(".")[0] == "tl_callbacks"]


def part(module: str) -> str:
    """The layer's member that a module belongs to: its first name below the package."""
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_layer() -> None:
    assert {part(module) for module in MODULES} - {""} == GROUND | METHODS | ROOF


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    here = part(module)
    for name, _ in imports(MODULES[module]):
        there = part(name)
        if not here or there == here:
            continue
        assert there, f"{module} imports the package itself"
        allowed = GROUND | STANDS_ON.get(here, set()) if here in GROUND | METHODS else GROUND | METHODS | ROOF
        assert there in allowed, f"{module} ({here}) imports {name}"


def test_no_import_cycles() -> None:
    graph = {module: {name for name, _ in imports(path)} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert len(done) == len(MODULES)


@pytest.mark.parametrize(
    "path", FILES + sorted((ROOT / "recipes").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_relative_imports_no_imports_in_functions_short_files(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    tree = ast.parse(text)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"
        if isinstance(node, ast.FunctionDef) and path.name != "compare.py":
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{node.name} imports inside"


def test_only_one_place_writes_requires_grad() -> None:
    writers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "requires_grad_"
    }
    assert writers == {"tl_callbacks.frozen.state"}


def test_public_names() -> None:
    assert tl_callbacks.__all__ == sorted(tl_callbacks.__all__, key=lambda n: (not n.isupper(), n.islower(), n))
    assert set(tl_callbacks.__all__) == {
        "STRATEGIES", "ForgettingMonitor", "GradualUnfreezing", "LanguageModelling", "LayerGroup",
        "LayerGroups", "LayerwiseOptimizer", "NoEffectWarning",
        "PreflightError", "PreflightWarning", "Recorder", "RepresentationProbes", "Strategy", "UnfreezePlan",
        "UnfreezeSchedule", "Retrieval", "SourceTask", "TaskMatrix",
        "WeightAnchoring", "WeightInterpolation", "adapt", "probe_model", "rank_models",
        "add_to_recipe", "at_fractions", "at_steps", "attach", "closest", "every", "group_layers", "ignores_item_count",
        "last_complete_checkpoint", "layerwise_optimizer", "per_epoch", "preview", "rates_from_drift",
        "schedule_from_probes", "slanted_triangular", "staged",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in tl_callbacks.__all__ if name != "STRATEGIES"])
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(tl_callbacks, name).__doc__ or ""), f"{name} has no example"
