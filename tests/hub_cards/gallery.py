"""Writes `hub_cards/gallery`: real runs of the demo, the facts without local paths, and their cards.

    python -m tests.hub_cards.gallery

takes the runs in `runs/demo` with the most labels and seed 0; without them it writes the cards of what is there again.
"""

import json
import shutil
from pathlib import Path

from hub_cards import read_facts, write_card
from hub_cards.paths import without_paths

ROOT = Path(__file__).parent.parent.parent
GALLERY = ROOT / "hub_cards" / "gallery"
RUNS = ROOT / "runs" / "demo"
FACTS = ("recipe.json", "trainer_state.json")


def take(runs: Path) -> None:
    """Copy the facts of the runs with the most labels."""
    for run in sorted(runs.glob("*-200-0")):
        folder = GALLERY / f"compare-{run.name.split('-')[0]}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in FACTS:
            facts = without_paths(json.loads((run / name).read_text()))
            (folder / name).write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    take(RUNS)
    for folder in sorted(path for path in GALLERY.iterdir() if path.is_dir()):
        (folder / "README.md").unlink(missing_ok=True)
        write_card(read_facts(folder), folder)
        print(folder.relative_to(ROOT))


if __name__ == "__main__":
    main()
