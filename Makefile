# Works with make 3.81. Settings come from .env (ENV_FILE=… picks another), or as `make agent HOST=b1`.
# Not STEPS: that is a setting of `make upgrade`, given on make's command line.
SCRIPTS := download-k3s upgrade-kernel install-wireguard server agent annotate fix-metrics
LIVING := upgrade certs remove down token backup restore promote drill firewall device watch
# A switch is NAME=1 or NAME=yes on make's command line: an exported one must not have an effect by accident. DRY and
# PRINT only prevent changes, and also count from the environment.
given = $(if $(filter command,$(origin $1))$(filter DRY PRINT,$1),$($1))
switch = $(if $(call given,$1),$(if $(filter-out 1 yes,$(call given,$1)),$(error $1 is "$($1)": expected 1 or yes),$2))
# An unknown name (DRYRUN=1, SERVR=b1) would be ignored silently.
SETTINGS := $(shell command -v sed >/dev/null && sed -n 's/^\(\# \)\{0,1\}\([A-Z][A-Z0-9_]*\)=.*/\2/p' env.example 2>/dev/null)
KNOWN := $(SETTINGS) DRY PRINT REBOOT REMOVE FORCE TAKE_OVER YES USE JSON WATCH ENV_FILE KUBECONFIG CMD ONLY NO_COLOR TMPDIR CI NODE TS \
	RUN SHELL MAKE% K3S_LAB_%
$(foreach name,$(if $(SETTINGS),$(filter-out $(KNOWN),$(.VARIABLES))),$(if $(filter command,$(origin $(name))),$(error \
	$(name) (make's command line): expected a setting of env.example, or DRY, PRINT, REBOOT, REMOVE, FORCE, TAKE_OVER, YES, USE, JSON, WATCH)))
FLAGS = $(call switch,DRY,--dry-run) $(call switch,JSON,--json) $(call switch,PRINT,--print) $(call switch,REBOOT,--reboot)

# A Node.js that strips types, else Node.js with tsx, else Deno.
NODE := $(shell command -v node;)
STRIPS := $(if $(NODE),$(shell case $$(node --version) in (v1*|v20.*|v21.*) ;; (*) node -p 'process.features.typescript || ""' ;; esac))
RUN = node $(if $(STRIPS),--disable-warning=ExperimentalWarning,--import tsx)
TS = $(if $(NODE),$(RUN),deno run -A)
# The compile cache of Node.js 22 and later: a script starts in a third of the time.
export NODE_COMPILE_CACHE ?= $(CURDIR)/node_modules/.compiled
MODULES = $(if $(NODE),node_modules/.package-lock.json)
# Including packages that only developers need.
DEV = node_modules/fast-check

help: ## show this list
	@awk -F ':.*## ' '/^## / { printf "\n%s\n", substr($$0, 4) } /^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## The seven steps, in their order
download-k3s: ## 1  install a verified k3s binary
upgrade-kernel: ## 2  install a kernel with WireGuard, on CentOS 7
install-wireguard: ## 3  install and test wireguard-tools
server: ## 4  set up the k3s server on SERVER or HOST, including steps 1 to 3 and 6
agent: ## 5  set up a k3s agent on HOST, including steps 1 to 3 and 6
annotate: ## 6  make peers use each other's public addresses
fix-metrics: ## 7  make kubectl top list every node
up: ## all seven on SERVER and all AGENTS (make -j up does the same)
plan: ## show what make up would do (JSON=1: as JSON, as DRY=1 JSON=1 does for any command)

## Operating a cluster
check: ## examine the whole cluster and diagnose problems (JSON=1, WATCH=1)
status: ## show a summary of ten lines, from one connection to the server
kubeconfig: ## merge the cluster's kubeconfig into yours (USE=1: make it the current context)
firewall: ## open k3s's ports to the nodes only, on all boxes or HOST
upgrade: ## upgrade all nodes to K3S_VERSION, one at a time (STEPS="v1.35.4+k3s1 …": intermediate releases)
certs: ## renew k3s's certificates that end within 90 days, one node at a time
watch: ## look after the cluster each minute, and tell NOTIFY_URL what goes wrong (REMOVE=1)
token: ## replace the token for joining; nodes keep running
backup: ## copy the server's datastore, token and manifests to a file here (BACKUP=…; BACKUP_EVERY=…: and by itself)
restore: ## restore a server from BACKUP=… on HOST, a box without k3s, and move the agents
drill: ## prove the newest backup or BACKUP=…: start k3s on it alone, on this Linux machine or HOST=… (root)
promote: ## make HOST the server in place of one that is lost, from the newest backup; all follow (FORCE=1: it still answers)
remove: ## drain the boxes in HOST and uninstall k3s (FORCE=1: also a box that is gone)
down: ## remove k3s from SERVER and all AGENTS, after confirmation (YES=1: without)
device: ## give device NAME=… access to pods, services and names (FOR=…, VIA=…, ONLY=services; REMOVE=1)
devices: ## list the devices with access

download: download-k3s
kernel: upgrade-kernel
wireguard: install-wireguard
metrics: fix-metrics

server agent up plan upgrade remove down restore promote: FLAGS += $(call switch,FORCE,--force)
server agent up plan: FLAGS += $(call switch,TAKE_OVER,--take-over)
down: FLAGS += $(call switch,YES,--yes)
device watch: FLAGS += $(call switch,REMOVE,--remove)
$(SCRIPTS) up: $(MODULES)
	@$(TS) scripts/$@.ts $(FLAGS)
plan: $(MODULES)
	@$(TS) scripts/up.ts $(filter-out --dry-run,$(FLAGS)) --dry-run
$(LIVING): $(MODULES)
	@$(TS) scripts/cluster/$@.ts $(FLAGS)

check: $(MODULES)
	@$(TS) scripts/cluster/check.ts $(call switch,JSON,--json) $(call switch,WATCH,--watch)
status devices: $(MODULES)
	@$(TS) scripts/cluster/$@.ts
kubeconfig: $(MODULES)
	@$(TS) scripts/cluster/kubeconfig.ts $(FLAGS) $(call switch,USE,--use)

## Rehearsal
rehearse: $(MODULES) ## create a cluster in two simulated clouds and a home on this Linux machine (root)
	@$(TS) test/lab/rehearse.ts up
rehearse-kernel: $(MODULES) ## give a simulated CentOS 7 in QEMU a new kernel, reboot it, and join it (root)
	@$(TS) test/lab/rehearse.ts kernel
in-rehearsal: $(MODULES) ## run CMD='make agent HOST=b2' on the rehearsal's operator machine
	@$(TS) test/lab/rehearse.ts run "$$CMD"
# As typed: make would expand a $ in it.
override CMD := $(value CMD)
export CMD
rehearse-down: $(MODULES) ## remove its boxes, networks and processes; images stay cached
	@$(TS) test/lab/rehearse.ts down

## Development
# The files in ONLY, or all.
UNITS := $(patsubst test/%.test.ts,%,$(sort $(wildcard test/*.test.ts)))
unknown = $(if $(filter-out $(UNITS),$(ONLY)),$(error ONLY is "$(ONLY)": expected some of $(UNITS)))
test: $(DEV) ## run the unit tests; no root, no network (ONLY="annotate sh": only these files)
	@$(unknown)unset ONLY; $(RUN) --test --test-concurrency=4 $(patsubst %,test/%.test.ts,$(or $(ONLY),$(UNITS)))
test-lab: $(MODULES) ## run the lab's tests, with real ssh, NAT and WireGuard (root)
	@$(RUN) test/lab/run.ts
faults: $(MODULES) ## inject every fault at every change, and test 30 boxes (root, over an hour; ONLY="agent token": only these)
	@ALL=1 $(RUN) --test --test-concurrency=1 test/lab/cuts.test.ts $(if $(ONLY),,test/lab/kernel-cuts.test.ts test/lab/load.test.ts)
bench: $(MODULES) ## measure times and resources in labs with a slow network (root); see test/bench/README.md
	@$(RUN) test/bench/bench.ts
pictures: $(MODULES) ## make the README's pictures from make -j up and make check in a lab (root)
	@$(RUN) test/pictures.ts
# The project's shell scripts; code that is sent to boxes is checked by test/shellcheck.test.ts.
SHELL_FILES := .ci/run .ci/hooks/pre-push test/lab/inside.sh
lint: $(DEV) ## check types, format, lint and shellcheck
	@npm run --silent check
	@if command -v shellcheck >/dev/null; then shellcheck $(SHELL_FILES); \
	else echo 'shellcheck is not installed: not checked: $(SHELL_FILES)' >&2; [ "$$CI" != true ]; fi
format: $(DEV) ## format the code, and apply automatic fixes
	@npm run --silent format
hooks: ## install a git hook that runs make lint test before each push
	@git config core.hooksPath .ci/hooks

node_modules/.package-lock.json: package-lock.json
	npm ci --omit=dev --ignore-scripts --no-audit --no-fund --loglevel=error >&2
	@touch $@
$(DEV): package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

.PHONY: help up plan $(SCRIPTS) $(LIVING) check status kubeconfig devices download kernel wireguard metrics rehearse rehearse-kernel in-rehearsal rehearse-down test test-lab faults bench pictures lint format hooks
