# Each target sets up .venv when it is missing; PYTHON names the interpreter that makes it (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all check parity bench bench-adaptive bench-tradeoff bench-neighbours survey soak gallery wheel clean

demo: .venv/demo.done
	$(BIN)/python recipes/compare.py --output_dir runs/demo $(if $(QUICK),--num_seeds 1 --label_counts 50,)

test: .venv/timm.done
	$(BIN)/python -m pytest

test-all: .venv/timm.done .venv/deepspeed.done
	$(BIN)/python -m pytest -m "not gpu"

check: .venv/dev.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest tests/test_architecture.py

# The gallery's cards, from the runs of `make demo` if there are some, else from the gallery's own files.
gallery: .venv/dev.done
	$(BIN)/python -m tests.hub_cards.gallery

parity: .venv/dev.done
	$(BIN)/python -m tests.distributed

bench: .venv/dev.done
	$(BIN)/python -m tests.benchmarks

bench-adaptive: .venv/demo.done .venv/dev.done
	$(BIN)/python -m tests.benchmarks.adaptive

bench-tradeoff: .venv/demo.done .venv/dev.done
	$(BIN)/python -m tests.benchmarks.tradeoff

bench-neighbours: .venv/neighbours.done
	$(BIN)/python -m tests.benchmarks.neighbours

survey: .venv/timm.done
	$(BIN)/python -m tests.survey_architectures

soak: .venv/dev.done
	$(BIN)/python -m tests.soak

wheel: .venv/dev.done
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv dist build runs

# Beside the environment, not in it: see tests/timm_beside.py.
.venv/timm.done: .venv/dev.done
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --upgrade --target .venv/timm timm torchvision
	touch $@

# Beside it too: nothing of this project needs them. Their other requirements are in the environment.
.venv/neighbours.done: .venv/dev.done
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --upgrade --target .venv/neighbours \
		lightning pytorch-lightning lightning-utilities torchmetrics finetuning-scheduler
	touch $@

# Beside it too: see tests/deepspeed_beside.py. Nothing is compiled.
.venv/deepspeed.done: .venv/dev.done
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --upgrade \
		--target .venv/deepspeed deepspeed einops hjson msgpack py-cpuinfo
	touch $@

# torch first: where no CPU build is offered beside the default one, this is the download that takes time.
.venv/%.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@
