# Every target first makes sure that what it needs is installed (scripts/setup): nothing to do means no time lost.
.DEFAULT_GOAL := help
.PHONY: drawings pictures help run smoke build test test-guests test-rest soak soak-64 check format images setup setup-dev lock clean bench bench-boot bench-blk bench-net bench-guest bench-latency bench-scale bench-limits bench-tpm bench-dhcp bench-firewall bench-gpu bench-policy bench-sandbox
PYTHON := .venv/bin/python -P

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build  ## boot a Linux guest on our devices and take its console (Ctrl-] detaches)
	@.venv/bin/rayos run --rm --disk 64MiB

smoke: build  ## boot a guest, check every device from inside, print one JSON object
	@.venv/bin/rayos smoke

build: setup  ## compile the data path; without a C compiler it runs interpreted, and says so
	@$(PYTHON) -m rayos_devices.build || test $$? = 1

test: check build  ## the checks, then every test, those of the devices also interpreted; a skipped test fails
	@$(MAKE) --no-print-directory -j2 test-guests test-rest

# Two lanes of about the same length. In the first are the tests that share the names of one service's taps.
GUESTS := tests/hostile/test_processes.py
OWN := tests/integration/net tests/integration/tpm
# These have nothing to do with how a device's code runs.
NO_DEVICE := $(addprefix tests/hostile/test_,openapi.py record.py http_fuzz.py connections.py policy_callers.py audit_crash.py tokens.py)

test-guests:
	CI=true $(PYTHON) -m pytest $(GUESTS) tests/integration $(addprefix --ignore=,$(OWN))

test-rest:
	@said=$$(mktemp); status=0; { \
	CI=true $(PYTHON) -m pytest tests --ignore=tests/integration $(addprefix --ignore=,$(GUESTS)) || status=1; \
	CI=true $(PYTHON) -m pytest $(OWN) || status=1; \
	printf '\ninterpreted:\n'; \
	CI=true RAYOS_PURE=1 $(PYTHON) -m pytest tests/unit/devices tests/hostile tests/property/devices $(addprefix --ignore=,$(GUESTS) $(NO_DEVICE)) || status=1; \
	} >$$said 2>&1; cat $$said; rm $$said; exit $$status

soak: build  ## 1,000 kills of a worker under verified writes, 200 of each kind of process; 10^6 steps of grants, DHCP and DNS packets
	RAYOS_KILLS=1000 $(PYTHON) -m pytest -q -s tests/hostile/test_kill_durability.py -k "lost_in_kills or early"
	@RAYOS_SOAK_EXAMPLES=10000 RAYOS_SOAK_STEPS=100 $(PYTHON) -m pytest -q tests/property/policy/test_rights.py
	RAYOS_FUZZ_PACKETS=1000000 $(PYTHON) -m pytest -q tests/property/net/test_dhcp_fuzz.py tests/unit/net/test_dns_zone.py -k "raise"
	$(PYTHON) -m benchmarks.kills --kills 200

soak-64: setup-dev build  ## 64 real guests in 16 zones, a policy change, a killed daemon (10 GiB); the figures go into docs/performance.md
	$(PYTHON) -m benchmarks.soak

check: setup-dev  ## ruff, formatting, mypy --strict, the import rule
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	scripts/prose
	$(PYTHON) -m pytest -q tests/unit/test_imports.py

bench: bench-blk bench-net bench-latency bench-limits bench-gpu bench-scale bench-sandbox bench-firewall bench-policy bench-tpm bench-dhcp bench-boot  ## all below but the slow bench-guest

bench-boot: setup-dev build  ## boot time beside QEMU's own virtio devices
	RAYOS_BENCH_REPORT=1 $(PYTHON) -m benchmarks.boot

format: setup-dev  ## let ruff rewrite the sources
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

images: setup  ## build the guest's kernel and initramfs, find or fetch QEMU, say where they are
	@$(PYTHON) -m rayos_images

setup:  ## install what `make run` needs: Debian packages, .venv
	@scripts/setup

setup-dev:
	@scripts/setup --dev

lock: setup-dev  ## resolve the dependencies anew (scripts/lock --upgrade for newer ones)
	scripts/lock

clean:  ## remove the virtual environment and what tools and tests left in this folder
	rm -rf .venv devices/rayos_devices/_compiled .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist artifacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

bench-blk: setup-dev build  ## block against qemu-storage-daemon; the results go into docs/performance.md
	$(PYTHON) -m benchmarks.blk

bench-net: setup-dev build  ## frames against DPDK's vhost port
	$(PYTHON) -m benchmarks.net

bench-guest: setup-dev build  ## fio and TCP in a guest, our devices beside QEMU's own
	$(PYTHON) -m benchmarks.guest

bench-latency: setup-dev build  ## one request alone, kick to call
	$(PYTHON) -m benchmarks.latency

bench-scale: setup-dev build  ## 1, 8 and 64 workers: start, memory; eight disks at once
	$(PYTHON) -m benchmarks.scale

bench-limits: setup-dev build  ## what the checks cost, one by one and together; how exactly rates are kept
	$(PYTHON) -m benchmarks.limits
	$(PYTHON) -m benchmarks.rates
	.venv/bin/rayos optimize bench

bench-tpm: setup-dev  ## start, measure, key and quote of 64 TPMs
	$(PYTHON) -m benchmarks.tpm

bench-dhcp: setup-dev  ## our DHCP server beside Kea and dnsmasq; says which of them is not installed
	$(PYTHON) -m benchmarks.dhcp

bench-firewall: setup-dev  ## 16 to 2,048 rules, beside a linear scan and nftables
	$(PYTHON) -m benchmarks.firewall

bench-policy: setup-dev build  ## a policy change on its way to 64 workers
	$(PYTHON) -m benchmarks.policy

bench-gpu: setup-dev build  ## a 1920x1080 frame through the worker, beside a plain copy of its bytes
	$(PYTHON) -m benchmarks.gpu

bench-sandbox: setup-dev build  ## a worker with all layers of its sandbox, and with none
	$(PYTHON) -m benchmarks.sandbox

drawings:  ## make the SVG of each drawing (graphviz)
	for file in docs/drawings/*.dot; do dot -Tsvg $$file -o $${file%.dot}.svg; done

pictures: setup-dev build  ## make the README's pictures from real guests
	$(PYTHON) scripts/pictures
