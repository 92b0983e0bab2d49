"""The walls of `hub_cards`: no torch in what makes cards, network in a few files only, and no import of the plugin."""

import ast
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hub_cards
from hub_cards import render, write_card
from tests.hub_cards import runs

FOLDER = Path(hub_cards.__file__).parent
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}
# Loaded when first used: the only ones that may import torch.
LAZY = {"pulling.loading", "pulling.merge", "pulling.pull", "pulling.rows", "pulling.verify"}
LAZY |= {"registry.adapter_set", "registry.combining", "registry.heads", "registry.sharing"}
TORCH = {"torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "sklearn", "safetensors"}
NETWORK = {
    "publishing.bases",
    "publishing.publish",
    "publishing.remote",
    "pulling.snapshots",
    "registry.listing",
    "publishing.licensing",
}
NETWORK |= LAZY
OFFLINE_NAMES = {
    "EvalResult",
    "EvalResultEntry",
    "ModelCardData",
    "eval_result_entries_to_yaml",
    "ModelCard",
    "constants",
    "parse_eval_result_entries",
}


def imported(path: Path) -> set[tuple[str, str]]:
    """Modules, and names imported from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            found |= {(str(node.module), alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_what_it_may(name: str) -> None:
    path = FILES[name]
    assert len(path.read_text().splitlines()) <= 300
    for module, what in imported(path):
        package = module.split(".")[0]
        assert package != "tl_callbacks", "what passes between the packages are files"
        if name not in LAZY:
            assert package not in TORCH, f"{name} imports {module}"
            assert module.removeprefix("hub_cards.") not in LAZY or name == "__init__"
        if package == "huggingface_hub" and name not in NETWORK and "errors" not in module:
            assert what in OFFLINE_NAMES, f"{name} imports {what} of {module}"


def test_no_import_in_a_function_but_for_the_lazy_names() -> None:
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inner, f"{name}.{node.name} imports inside"


def test_there_is_no_cycle() -> None:
    graph = {
        name: {m.removeprefix("hub_cards.") for m, _ in imported(path) if m.startswith("hub_cards.")}
        | {
            f"{m}.{what}".removeprefix("hub_cards.")
            for m, what in imported(path)
            if f"{m}.{what}".removeprefix("hub_cards.") in FILES
        }
        for name, path in FILES.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) >= len(FILES)


def test_the_package_is_imported_without_torch() -> None:
    check = (
        "import sys, hub_cards, hub_cards.__main__; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=FOLDER.parent)
    assert found.stdout.strip() == "[]"


def test_making_a_card_opens_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a socket for {args}")

    facts = hub_cards.read_facts(runs.write(tmp_path, runs.recipe(comparison=runs.COMPARISON)))
    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="a socket for"):
        socket.create_connection(("127.0.0.1", 9))
    assert "jo/small-bert" in render(facts)
    write_card(facts, tmp_path)


@pytest.mark.parametrize("name", [name for name in hub_cards.__all__ if name[0] != "_"])
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(hub_cards, name).__doc__ or ""), f"{name} has no example"
