# Works with make 3.81. Settings come from .env (ENV_FILE=… picks another), or as `make agent HOST=b1`.
# Not STEPS: that is a setting of `make upgrade`, given on make's command line.
SCRIPTS := download-k3s upgrade-kernel install-wireguard server agent annotate fix-metrics
LIVING := upgrade remove down token backup restore firewall
# A switch is NAME=1 or NAME=yes, on make's command line: one that was exported by accident must destroy nothing.
# DRY and PRINT hold back, and count from there too.
given = $(if $(filter command,$(origin $1))$(filter DRY PRINT,$1),$($1))
switch = $(if $(call given,$1),$(if $(filter-out 1 yes,$(call given,$1)),$(error $1 is "$($1)": expected 1 or yes),$2))
# A name that is none (DRYRUN=1, SERVR=b1) would be nothing, and what it was to hold back would be done.
SETTINGS := $(shell command -v sed >/dev/null && sed -n 's/^\(\# \)\{0,1\}\([A-Z][A-Z0-9_]*\)=.*/\2/p' env.example 2>/dev/null)
KNOWN := $(SETTINGS) DRY PRINT REBOOT FORCE TAKE_OVER YES USE JSON WATCH ENV_FILE KUBECONFIG CMD ONLY NO_COLOR TMPDIR CI NODE TS \
	RUN SHELL MAKE% K3S_LAB_%
$(foreach name,$(if $(SETTINGS),$(filter-out $(KNOWN),$(.VARIABLES))),$(if $(filter command,$(origin $(name))),$(error \
	$(name) (make's command line): expected a setting of env.example, or DRY, PRINT, REBOOT, FORCE, TAKE_OVER, YES, USE, JSON, WATCH)))
FLAGS = $(call switch,DRY,--dry-run) $(call switch,PRINT,--print) $(call switch,REBOOT,--reboot)

# A node that strips types by itself, else node with tsx, else Deno.
NODE := $(shell command -v node;)
STRIPS := $(if $(NODE),$(shell node -p 'process.features.typescript || ""'))
RUN = node $(if $(STRIPS),--disable-warning=ExperimentalWarning,--import tsx)
TS = $(if $(NODE),$(RUN),deno run -A)
# What Node 22 and later have compiled: a script starts in a third of the time.
export NODE_COMPILE_CACHE ?= $(CURDIR)/node_modules/.compiled
MODULES = $(if $(NODE),node_modules/.package-lock.json)
# With those that only who works on the project needs.
DEV = node_modules/fast-check

help: ## this list
	@awk -F ':.*## ' '/^## / { printf "\n%s\n", substr($$0, 4) } /^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## The seven steps, in their order
download-k3s: ## 1  a verified k3s binary
upgrade-kernel: ## 2  a kernel with WireGuard, on CentOS 7
install-wireguard: ## 3  WireGuard's tools, tested
server: ## 4  k3s server on SERVER or HOST, with steps 1 to 3 and 6
agent: ## 5  k3s agent on HOST, with steps 1 to 3 and 6
annotate: ## 6  every peer at its public address
fix-metrics: ## 7  kubectl top answers for every node
up: ## all of them, on SERVER and all AGENTS (make -j up does the same)

## The life of a cluster
check: ## the whole cluster, and what is wrong with it (JSON=1, WATCH=1)
status: ## the cluster in ten lines, by one trip to the server
kubeconfig: ## merge the cluster's kubeconfig into yours; USE=1 makes it the current one
firewall: ## open k3s's ports to the nodes only (all boxes, or HOST)
upgrade: ## K3S_VERSION on all boxes, one at a time, drained (STEPS="v1.35.4+k3s1 …": what to pass through)
token: ## replace the join token; nodes keep running
backup: ## the server's datastore, token and manifests, to a file here (BACKUP=…)
restore: ## a server from BACKUP=… on a fresh box, HOST; agents follow
remove: ## boxes leave the cluster: HOST, drained and uninstalled (FORCE=1: also one that is gone)
down: ## remove k3s from SERVER and all AGENTS, after asking (YES=1: at once)

download: download-k3s
kernel: upgrade-kernel
wireguard: install-wireguard
metrics: fix-metrics

server agent up upgrade remove down restore: FLAGS += $(call switch,FORCE,--force)
server agent up: FLAGS += $(call switch,TAKE_OVER,--take-over)
down: FLAGS += $(call switch,YES,--yes)
$(SCRIPTS) up: $(MODULES)
	@$(TS) scripts/$@.ts $(FLAGS)
$(LIVING): $(MODULES)
	@$(TS) scripts/cluster/$@.ts $(FLAGS)

check: $(MODULES)
	@$(TS) scripts/cluster/check.ts $(call switch,JSON,--json) $(call switch,WATCH,--watch)
status: $(MODULES)
	@$(TS) scripts/cluster/status.ts
kubeconfig: $(MODULES)
	@$(TS) scripts/cluster/kubeconfig.ts $(FLAGS) $(call switch,USE,--use)

## Rehearsal
rehearse: $(MODULES) ## a cluster of two clouds inside this Linux machine (root)
	@$(TS) test/lab/rehearse.ts up
rehearse-kernel: $(MODULES) ## a CentOS 7 stand-in gets another kernel, restarts and joins, in QEMU (root)
	@$(TS) test/lab/rehearse.ts kernel
in-rehearsal: $(MODULES) ## CMD='make agent HOST=b2', as the rehearsal's operator
	@$(TS) test/lab/rehearse.ts run "$$CMD"
# As it was typed: make would take a $ in it for its own.
override CMD := $(value CMD)
export CMD
rehearse-down: $(MODULES) ## its boxes, networks and processes go; built images stay cached
	@$(TS) test/lab/rehearse.ts down

## Development
# Those of ONLY, or all.
UNITS := $(patsubst test/%.test.ts,%,$(sort $(wildcard test/*.test.ts)))
unknown = $(if $(filter-out $(UNITS),$(ONLY)),$(error ONLY is "$(ONLY)": expected some of $(UNITS)))
test: $(DEV) ## unit tests; no root, no network (ONLY="annotate sh": of these files alone)
	@$(unknown)$(RUN) --test --test-concurrency=4 $(patsubst %,test/%.test.ts,$(or $(ONLY),$(UNITS)))
test-lab: $(MODULES) ## the lab's suite (root): real boxes, NAT and WireGuard
	@$(RUN) --test --test-concurrency=1 test/lab/*.test.ts
faults: $(MODULES) ## every fault at every change on a box, and 30 boxes (root, an hour; ONLY="agent token": of some)
	@ALL=1 $(RUN) --test --test-concurrency=1 test/lab/cuts.test.ts $(if $(ONLY),,test/lab/kernel-cuts.test.ts test/lab/load.test.ts)
bench: $(MODULES) ## times and costs beside the floor and the article by hand, in slow labs (root); test/bench/bench.ts
	@$(RUN) test/bench/bench.ts
pictures: $(MODULES) ## README's pictures, from a real run of make -j up and make check in a lab (root)
	@$(RUN) test/pictures.ts
# This project's own scripts; those that boxes get are checked by test/shellcheck.test.ts.
SHELL_FILES := .ci/run .ci/hooks/pre-push test/lab/inside.sh
lint: $(DEV) ## types, format, lint, and shellcheck
	@npm run --silent check
	@if command -v shellcheck >/dev/null; then shellcheck $(SHELL_FILES); \
	else echo 'shellcheck is not installed: not checked: $(SHELL_FILES)' >&2; [ "$$CI" != true ]; fi
format: $(DEV) ## format in place, and what lint can mend
	@npm run --silent format
hooks: ## before each git push: make lint test
	@git config core.hooksPath .ci/hooks

node_modules/.package-lock.json: package-lock.json
	npm ci --omit=dev --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@
$(DEV): package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

.PHONY: help up $(SCRIPTS) $(LIVING) check status kubeconfig download kernel wireguard metrics rehearse rehearse-kernel in-rehearsal rehearse-down test test-lab faults bench pictures lint format hooks
