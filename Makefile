# Every target does its own set-up, and a second run skips what is done. `make help` lists them.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo demo-compare demo-private demo-analytic evidence test test-web proofs chaos mutants model fuzz bench offline docs check proto clean distclean

PY := .venv/bin/python
# The set-up is done when this file exists. Its name follows from what the set-up depends on.
READY := .venv/.ready-$(shell { pwd; cat constraints.txt pyproject.toml scripts/setup.sh; } | sha256sum | cut -c1-16)

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 20

demo: $(READY) ## one coordinator and five sites fine-tune one model together
	$(PY) -m demo.run

demo-compare: $(READY) ## the same, and beside it the model trained on all data pooled
	$(PY) -m demo.run --pooled

demo-private: $(READY) ## the same with differential privacy (epsilon 8), beside training without, and an audit of the ledgers
	$(PY) -m demo.private

demo-analytic: $(READY) ## a head from sums of statistics, which is that of the pooled articles whatever the split
	$(PY) -m demo.analytic

evidence: $(READY) ## one round against many, on real data (hours; goes on where it stopped; ARGS="--list" shows what)
	$(PY) -m evidence.run $(ARGS)

# As many workers as cores, up to four: each takes whole files of tests, in the order of tests/turns.py. Their libraries get
# one thread each, or all of them would wait for one another.
WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(READY) ## run the tests (ARGS="-k shamir" chooses some)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) --durations=25 $(ARGS)

test-web: $(READY) ## the status pages in a real browser (needs chromium and chromedriver); makes their pictures
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { echo "expected chromium and chromedriver, found none; on Debian: apt install chromium chromium-driver" >&2; exit 1; }
	$(PY) -m pytest tests/web/check_coordinator.py tests/web/check_site.py $(ARGS)

proofs: $(READY) ## all dropout patterns of up to six members (about half an hour)
	$(PY) -m tests.proofs

chaos: $(READY) ## several hundred rounds of real processes, with everything going wrong (about half an hour)
	$(PY) -m tests.chaos.run $(ARGS)

mutants: $(READY) ## disable every refusal in turn; each time a named test must fail (long)
	$(PY) -m tests.mutants

model: $(READY) ## check the bounded model of the round with spin, and the rules of the ring by enumeration
	$(PY) -m model.run
	$(PY) -m model.ring

SECONDS := 60
fuzz: $(READY) ## fuzz the parsers with atheris (SECONDS=600 in all, PARSERS="plan roster" chooses some)
	scripts/fuzz.sh $(SECONDS) $(PARSERS)

bench: $(READY) ## measure against OpenSSL, a raw socket, Flower and CKKS (some 20 minutes; ARGS="--only growth" for one)
	scripts/peers.sh
	$(PY) -m bench.run $(ARGS)

offline: ## collect every package in a folder, and install from it without a network (EXTRAS=participant for a site)
	PYTHON=$${PYTHON:-python3} scripts/offline.sh $(EXTRAS)

docs: $(READY) ## build the documentation as a site in build/site, strictly, with its reference pages from the code
	$(PY) -m scripts.commands
	$(PY) -m scripts.reference
	scripts/docs.sh

check: $(READY) ## formatting, lint, types, and whether the generated code is fresh
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	scripts/proto.sh --check

proto: $(READY) ## generate privacy/wire from proto/*.proto
	scripts/proto.sh

clean: ## remove what was built; the environments stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf .venv .venv-proto .venv-fuzz .venv-peers .venv-docs

$(READY):
	@scripts/setup.sh $@
