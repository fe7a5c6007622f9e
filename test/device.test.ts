import assert from "node:assert/strict";
import { chmodSync, mkdirSync, readFileSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import jsQR from "jsqr";
import { Unwritten } from "../lib/files.ts";
import {
  admits,
  bringsBack,
  type Device,
  devicesIn,
  ENTRY_FOLDER,
  entryIn,
  entryKeyOf,
  entryLook,
  type Form,
  peersText,
  seenBy,
  shutsOut,
  ENTRY_UNIT as UNIT,
} from "../lib/k3s/devices.ts";
import { ENTRY_PROGRAM as PROGRAM } from "../lib/k3s/firewall/traffic.ts";
import type { Box } from "../lib/script.ts";
import { type Origins, SettingError, type Settings, settle } from "../lib/settings.ts";
import { Refusal } from "../lib/step.ts";
import {
  advice,
  apart,
  configOf,
  deviceFor,
  type EntryPeer,
  entriesOf,
  keep,
  newPrivateKey,
  ownIn,
  publicKeyOf,
  qrOf,
  textsIn,
} from "../scripts/cluster/device.ts";
import { rowOf } from "../scripts/cluster/devices.ts";
import {
  entryFacts,
  type Facts,
  fileOf,
  IPTABLES_RULES,
  deviceKey as key,
  look,
  MODERN,
  NETWORKS,
  NFT_RULES,
  NOW,
  prepared,
  program,
  programs,
  shell,
  temporary,
  wanted,
  written,
} from "./helpers.ts";

const PHONE: Device = { name: "phone", ip: "10.44.0.2", key: key("P"), form: "phone" };
const LIMITED: Device = { name: "tv", ip: "10.44.0.3", key: key("T"), form: "linux", only: "services" };
const ATTIC: Device = {
  name: "attic",
  ip: "10.44.0.4",
  key: key("R"),
  form: "router",
  lan: "192.168.1.0/24",
};

/** A box of a running cluster without devices. */
const node = (over: Facts = {}): Facts => ({ ...prepared(MODERN), ...NETWORKS, ...over });
/** An entry that has these devices, as a change has left it. */
const entry = (devices: Device[], over: Facts = {}): Facts => node({ ...entryFacts(devices), ...over });
const whys = (changes: readonly { why: string }[]) => changes.map(({ why }) => why);

describe("an entry", () => {
  test("is set up with its first device, and a second run has nothing to do", () => {
    assert.deepEqual(whys(admits(PHONE).plan(wanted(), node())), ["let in device phone: 10.44.0.2"]);
    assert.deepEqual(admits(PHONE).plan(wanted(), entry([PHONE])), []);
  });

  test("says whether it lets a device in, changes what it may reach, or only repairs the interface", () => {
    const limited = { ...PHONE, only: "services" as const };
    assert.deepEqual(whys(admits(limited).plan(wanted(), entry([PHONE]))), [
      "change device phone: 10.44.0.2, services alone",
    ]);
    assert.deepEqual(whys(admits(PHONE).plan(wanted(), entry([limited]))), [
      "change device phone: 10.44.0.2",
    ]);
  });

  test("keeps its other devices when one is added or taken away", () => {
    const [added] = admits(LIMITED).plan(wanted(), entry([PHONE]));
    assert.equal(added?.why, "let in device tv: 10.44.0.3, services alone");
    assert.match(added?.sh ?? "", /systemctl reload k3s-devices/);
    const [gone] = shutsOut("phone").plan(wanted(), entry([PHONE, LIMITED]));
    assert.equal(gone?.why, "remove device phone");
    assert(gone?.sh.includes(peersText([LIMITED])) && !gone.sh.includes(PHONE.key));
    assert.deepEqual(shutsOut("sofa").plan(wanted(), entry([PHONE])), []);
    const silent = { "api-service": "", "pod-network": "" };
    assert.deepEqual(shutsOut("phone").plan(wanted(), entry([PHONE, LIMITED], silent)), [gone]);
  });

  test("goes with its last device: unit, program, key and rule", () => {
    const [gone] = shutsOut("phone").plan(wanted(), entry([PHONE]));
    assert.equal(gone?.why, "remove device phone, and k3s-devices, which has no other");
    for (const path of ["/etc/systemd/system/k3s-devices.service", "/etc/rancher/k3s-devices"])
      assert(gone?.sh.includes(path));
  });

  for (const [what, over] of [
    ["its interface is gone", { "entry-state": "active\nenabled\n", "entry-dump": "" }],
    ["its unit is stopped", { "entry-state": `inactive\nenabled\n${key("E")}\n51822\n` }],
    ["its unit does not start at boot", { "entry-state": `active\ndisabled\n${key("E")}\n51822\n` }],
    ["its interface has another key", { "entry-state": `active\nenabled\n${key("X")}\n51822\n` }],
    ["its interface lacks a peer", { "entry-dump": "" }],
    ["its interface is at another port", { "entry-state": `active\nenabled\n${key("E")}\n51999\n` }],
    ["its rules are gone", { "entry-rules": "" }],
    ["its program was changed", { entry: "#!/bin/sh\n# Written by k3s-across-clouds.\n" }],
  ] as const)
    test(`is repaired by the next run if ${what}`, () =>
      assert.deepEqual(whys(admits(PHONE).plan(wanted(), entry([PHONE], over))), [
        "repair the interface of device phone",
      ]));

  test("is not written over by a run that has not seen what another one wrote meanwhile", () => {
    const [change] = admits(LIMITED).plan(wanted(), entry([PHONE]));
    const folder = temporary();
    writeFileSync(join(folder, "peers"), peersText([PHONE, ATTIC]));
    const { status, stdout } = shell(`set -eu\n${change?.sh.replaceAll("/etc/rancher/k3s-devices", folder)}`);
    assert.deepEqual(
      [status, stdout],
      [1, "Another run has changed the devices meanwhile: run this again\n"],
    );
  });

  test("gives no second device an address that another run has just given away", () =>
    assert.throws(
      () => admits({ ...LIMITED, ip: PHONE.ip }).plan(wanted(), entry([PHONE])),
      (error) => error instanceof Refusal && /phone got 10\.44\.0\.2 by another run/.test(error.message),
    ));

  test("lets in no device with its own key", () =>
    assert.throws(
      () => admits({ ...LIMITED, key: key("E") }).plan(wanted(), entry([PHONE])),
      (error) => error instanceof Refusal && /PUBLIC_KEY is the entry's own/.test(error.message),
    ));

  test("gets a new key where its own is damaged", () => {
    const [change] = admits(PHONE).plan(wanted(), entry([PHONE], { "entry-key": "" }));
    const folder = temporary();
    writeFileSync(join(folder, "peers"), peersText([PHONE]));
    writeFileSync(join(folder, "key"), "half a k");
    const PATH = programs(`${folder}/bin`, {
      wg: `case $1 in genkey) echo new ;; *) exec grep -qx new ;; esac`,
      systemctl: "",
    });
    const script = [ENTRY_FOLDER, PROGRAM, UNIT].reduce(
      (text, path, i) => text.replaceAll(path, i ? join(folder, `${i}`) : folder),
      change?.sh ?? "",
    );
    const run = () => shell(`set -eu\n${script}`, ["sh", "-s"], { PATH });
    const { status, stderr } = run();
    assert.deepEqual([status, readFileSync(join(folder, "key"), "utf8")], [0, "new\n"], stderr);
  });

  for (const server of [
    "10.43.0.10; canary",
    "10.43.0.10\nPostUp = canary",
    "10.43.0.10/$(canary)",
    "9.9.9.9",
  ])
    test(`is refused if it says that CoreDNS is at ${JSON.stringify(server)}`, () =>
      assert.throws(
        () => admits(PHONE).plan(wanted(), entry([PHONE], { "dns-service": server })),
        (error) => error instanceof Refusal && /CoreDNS's service is /.test(error.message),
      ));

  test("has no key but one that can stand in a configuration", () => {
    const hostile = `${key("E")}\n[Interface]\nPostUp = canary`;
    assert.equal(entryKeyOf({ "entry-key": hostile }), undefined);
    assert.equal(entryKeyOf({ "entry-key": `${key("E")}\n` }), key("E"));
    const facts = entry([PHONE], {
      "entry-key": hostile,
      "entry-state": `active\nenabled\n${hostile}\n51822\n`,
    });
    assert.notDeepEqual(admits(PHONE).plan(wanted(), facts), []);
  });

  test("names no device in words that no run has written", () => {
    const good = peersText([ATTIC]);
    for (const [from, to] of [
      ["attic", "$(canary)"],
      ["attic", "attic\u001b[2J"],
      ["attic", "a".repeat(13)],
      ["router", "fridge"],
      ["192.168.1.0/24", "192.168.1.0/24;canary"],
      ["192.168.1.0/24", "$(canary)/24"],
      [ATTIC.key, "canary"],
      [ATTIC.ip, `${ATTIC.ip}\nPostUp = canary`],
    ] as const)
      assert.deepEqual(devicesIn(good.replace(from, to)), [], to);
  });

  test("takes no time, whatever it says that its devices are", () => {
    const many = Array.from({ length: 10_000 }, (_, i) => ({ ...PHONE, name: `d${i}` }));
    const dump = many.map((_, i) => `${i}\t\t\t10.44.0.2/32`).join("\n");
    const facts = entry(many, { "entry-dump": dump });
    // CPU time: other tests run beside this one.
    const began = process.cpuUsage();
    assert.deepEqual(devicesIn(`# phone ${"b".repeat(500_000)}\n[Peer]\n`), []);
    entryIn(facts);
    const { user } = process.cpuUsage(began);
    assert(user < 2e6, `${user / 1e3} ms`);
  });

  for (const [what, facts, expected] of [
    ["no k3s runs on it", { "pod-network": "" }, /No k3s node runs on this box/],
    ["the cluster's API is silent", { "api-service": "" }, /API does not answer here/],
    [
      "pods have another network than the settings say",
      { "pod-network": "10.50.0.0/16\n" },
      /--cluster-cidr/,
    ],
    [
      "services have another network than the settings say",
      { "api-service": "10.99.0.1\n" },
      /--service-cidr/,
    ],
    [
      "it has an address in the devices' network",
      { addresses: "2: eth0    inet 10.44.0.7/16 brd 10.44.255.255" },
      /10\.44\.0\.7 \(eth0\), within DEVICE_CIDR/,
    ],
  ] as [string, Facts, RegExp][])
    test(`is refused, and nothing is changed, if ${what}`, () =>
      assert.throws(
        () => admits(PHONE).plan(wanted(), node(facts)),
        (error) => error instanceof Refusal && expected.test(error.message),
      ));

  test("is refused where somebody else's unit has its name", () =>
    assert.throws(
      () => admits(PHONE).plan(wanted(), node({ entry: "[Unit]\nDescription=Another\n" })),
      /was not written by this project/,
    ));

  test("comes back with its devices on a box that has them from a backup", () => {
    assert.deepEqual(whys(bringsBack.plan(wanted(), node({ "peers-file": peersText([PHONE, LIMITED]) }))), [
      "let devices in again: phone, tv",
    ]);
    assert.deepEqual(bringsBack.plan(wanted(), entry([PHONE])), []);
    assert.deepEqual(bringsBack.plan(wanted(), node({ "pod-network": "" })), []);
  });

  test("takes in the lost server's devices, if it has its own, and keeps its key and theirs", () => {
    const brought = peersText([PHONE, LIMITED]);
    const [change] = bringsBack.plan(wanted(), { ...entry([PHONE]), brought });
    assert.equal(change?.why, `let devices in again: ${LIMITED.name}`);
    assert.match(change?.sh ?? "", /rm -rf \/var\/lib\/rancher\/k3s\/server\/devices/);
    assert.deepEqual(bringsBack.plan(wanted(), { ...entry([PHONE, LIMITED]), brought }), []);
  });

  test("is refused another network while devices have addresses of the old one", () =>
    assert.throws(
      () => admits(LIMITED).plan(wanted({ DEVICE_CIDR: "10.99.0.0/24" }), entry([PHONE])),
      /Device phone has 10\.44\.0\.2, outside of DEVICE_CIDR/,
    ));

  test("has its devices in a file that wg reads and this project reads back", () => {
    const all = [PHONE, LIMITED, ATTIC];
    assert.deepEqual(devicesIn(peersText(all)), all);
    assert.match(peersText([PHONE]), /^\[Peer\]\nPublicKey = \S+\nAllowedIPs = 10\.44\.0\.2\/32$/m);
  });

  /** What its program passes to nft, iptables-restore and wg with these devices. */
  function started(devices: Device[], tool: "nft" | "iptables") {
    const folder = temporary();
    const text = written(admits(devices[0] as Device).plan(wanted(), node())[0]?.sh ?? "", PROGRAM);
    writeFileSync(join(folder, "peers"), peersText(devices));
    writeFileSync(join(folder, "key"), `${key("S")}\n`);
    const notes = `cat >${folder}/rules`;
    const PATH = programs(`${folder}/bin`, {
      ip: `echo "ip $*" >>${folder}/asked`,
      wg: `echo "wg $*" >>${folder}/asked; cat >${folder}/wg.conf`,
      ...(tool === "nft"
        ? { nft: `[ "$1" = -f ] && ${notes}` }
        : { "iptables-restore": notes, iptables: "exit 0" }),
    });
    const script = text
      .replaceAll("/etc/rancher/k3s-devices", folder)
      .replaceAll("command -v nft", tool === "nft" ? "true" : "false");
    const { status, stderr } = shell(script, ["sh", "-s", "start"], { PATH });
    assert.equal(status, 0, stderr);
    return ["rules", "asked", "wg.conf"].map((name) => readFileSync(join(folder, name), "utf8")) as [
      string,
      string,
      string,
    ];
  }

  test("passes packets of devices to pods, services and each other alone, and those of ONLY=services to services alone", () => {
    const [nft, asked, conf] = started([PHONE, LIMITED], "nft");
    assert.deepEqual(nft.match(/(?<=\t\t).*(accept|drop)$/gm), [
      'iifname != "k3s-devices" accept',
      "ip daddr 10.43.0.0/16 accept",
      "ip saddr 10.44.0.3/32 drop",
      "ip daddr { 10.42.0.0/16, 10.44.0.0/24 } accept",
      "drop",
    ]);
    assert.match(nft, /hook prerouting priority -300/);
    const [named] = started([{ ...PHONE, name: "services" }], "nft");
    assert.doesNotMatch(named, /saddr/);
    const [iptables] = started([PHONE, LIMITED], "iptables");
    assert.deepEqual(iptables.match(/^-A .*$/gm), [
      "-A K3S-DEVICES -d 10.43.0.0/16 -j ACCEPT",
      "-A K3S-DEVICES -s 10.44.0.3/32 -j DROP",
      "-A K3S-DEVICES -d 10.42.0.0/16 -j ACCEPT",
      "-A K3S-DEVICES -d 10.44.0.0/24 -j ACCEPT",
      "-A K3S-DEVICES -j DROP",
    ]);
    assert(
      asked.endsWith("ip addr replace 10.44.0.1/24 dev k3s-devices\nip link set k3s-devices mtu 1280 up\n"),
    );
    assert.match(conf, /^\[Interface\]\nListenPort = 51822\nPrivateKey = S{42}A=\n# phone phone\n\[Peer\]\n/);
    assert(!asked.includes(key("S")));
  });

  test("is seen whole by the look that its program leaves, with nft as with iptables, and any rule that is gone is missed", () => {
    const folder = temporary();
    const text = written(admits(LIMITED).plan(wanted(), node())[0]?.sh ?? "", PROGRAM);
    writeFileSync(join(folder, "peers"), peersText([LIMITED]));
    writeFileSync(join(folder, "key"), `${key("S")}\n`);
    writeFileSync(join(folder, "program"), text);
    const dump = [LIMITED.key, "(none)", "(none)", `${LIMITED.ip}/32`, 0, 0, 0, "25"].join("\t");
    /** What the look finds where this is what nft or iptables lists. */
    const seen = (tool: "nft" | "iptables", rules: string) => {
      const PATH = programs(`${folder}/${tool}`, {
        wg: `case $* in pubkey) cat >/dev/null; echo ${key("E")} ;; *dump) printf '%s\\n' secret '${dump}' ;; *port) echo 51822 ;; *) echo ${key("E")} ;; esac`,
        // In no order of ours.
        systemctl: "echo UnitFileState=enabled; echo ActiveState=active",
        [tool]: `cat <<'RULES'\n${rules}\nRULES`,
      });
      const there = entryLook.map((part) =>
        part
          .replaceAll("/etc/rancher/k3s-devices", folder)
          .replaceAll(PROGRAM, `${folder}/program`)
          .replaceAll("command -v nft", tool === "nft" ? "true" : "false"),
      );
      const facts = look([{ look: () => there }], wanted(), { PATH });
      assert.doesNotMatch(JSON.stringify(facts), /secret/);
      return entryIn(facts);
    };
    for (const [tool, rules] of [
      ["nft", NFT_RULES([LIMITED])],
      ["iptables", IPTABLES_RULES([LIMITED])],
    ] as const) {
      const { port, network, devices, fault } = seen(tool, rules) ?? {};
      assert.deepEqual(
        [port, network, devices?.map(({ name }) => name), fault],
        ["51822", "10.44.0.0/24", ["tv"], undefined],
      );
      for (const gone of rules.split("\n").filter((line) => /drop$|-j (DROP|K3S-DEVICES)$/i.test(line)))
        assert.match(
          seen(tool, rules.replace(`${gone}\n`, ""))?.fault?.cause ?? "",
          /^the rules that keep its devices/,
          gone,
        );
    }
  });

  test("that is none is looked at without a single program", () => {
    const { status, stdout, stderr } = shell(
      `fact() { echo "$1"; }\n${entryLook.join("\n")}`,
      ["/bin/sh", "-s"],
      { PATH: "/nowhere" },
    );
    assert.deepEqual([status, stdout, stderr], [0, "", ""]);
  });

  test("lists its devices with the last handshake and the traffic of each", () => {
    const rows = seenBy(entry([PHONE, LIMITED])).map((seen) => rowOf("a1", NOW, seen).join(" | "));
    assert.deepEqual(rows, [
      "phone | 10.44.0.2 | a1 | 12 s ago | 1.5 kB | 2.0 MB | phone",
      "tv | 10.44.0.3 | a1 | never | 1.5 kB | 2.0 MB | linux, services alone",
    ]);
  });
});

describe("a device", () => {
  const origins = (...given: string[]) =>
    Object.fromEntries(
      ["FOR", "ONLY", "LAN"].map((name) => [name, given.includes(name) ? `variable ${name}` : "default"]),
    ) as Origins;
  const decided = (
    over: Partial<Settings>,
    known: Device[],
    mine: { key: string; ip?: string },
    given: string[] = [],
  ) => deviceFor(wanted({ NAME: "phone", ...over }), origins(...given), known, mine);

  test("gets the first free address, and keeps it", () => {
    assert.equal(decided({}, [], { key: key("N") }).ip, "10.44.0.2");
    assert.equal(decided({ NAME: "new" }, [PHONE, ATTIC], { key: key("N") }).ip, "10.44.0.3");
    assert.equal(decided({}, [], { key: key("N"), ip: "10.44.0.9" }).ip, "10.44.0.9");
    assert.equal(
      decided({}, [{ ...LIMITED, ip: "10.44.0.9" }], { key: key("N"), ip: "10.44.0.9" }).ip,
      "10.44.0.2",
    );
    assert.equal(decided({}, [PHONE], { key: PHONE.key, ip: "10.44.0.7" }).ip, "10.44.0.2");
  });

  test("is refused if no address is left", () =>
    assert.throws(
      () => decided({ NAME: "new", DEVICE_CIDR: "10.44.0.0/30" }, [PHONE], { key: key("N") }),
      /DEVICE_CIDR 10\.44\.0\.0\/30 has no address left/,
    ));

  test("keeps what is not given again, and changes what is", () => {
    const held = { ...ATTIC, only: "services" as const };
    const same = { NAME: "attic" };
    assert.deepEqual(decided(same, [held], { key: held.key }), held);
    const lifted = decided({ ...same, FOR: "linux", ONLY: "" }, [held], { key: held.key }, ["FOR", "ONLY"]);
    assert.deepEqual([lifted.form, lifted.only, lifted.lan], ["linux", undefined, "192.168.1.0/24"]);
  });

  test("is not replaced by another one of its name, nor by one with its key", () => {
    assert.throws(
      () => decided({}, [PHONE], { key: key("N") }),
      /its configuration is not on this machine: .*REMOVE=1/,
    );
    assert.throws(
      () => decided({ PUBLIC_KEY: key("N") }, [PHONE], { key: key("N") }),
      /Device phone has another key.*REMOVE=1/,
    );
    assert.throws(
      () => decided({ NAME: "new" }, [PHONE], { key: PHONE.key }),
      /Device phone has that key already/,
    );
  });

  test("is what it is where it has its key, and as limited as any of its entries says", () => {
    const stale = { ...PHONE, key: key("O"), ip: "10.44.0.9" };
    const limited = { ...PHONE, only: "services" as const };
    assert.deepEqual(decided({}, [stale, PHONE], { key: PHONE.key }), PHONE);
    for (const known of [
      [PHONE, limited],
      [limited, PHONE],
    ])
      assert.deepEqual(decided({}, known, { key: PHONE.key }), limited);
    assert.deepEqual(decided({ ONLY: "" }, [PHONE, limited], { key: PHONE.key }, ["ONLY"]), PHONE);
  });

  test("gets a key as WireGuard makes it", () => {
    // What `wg genkey` and `wg pubkey` gave.
    assert.equal(
      publicKeyOf("4C6kZl5bGJqM8oF13Rels6jLBRSraPvX5rpofXjEs1E="),
      "X1NQVR+Q+Bta7uSVBhGeRST9mEH1ez0t/Id+Kw3u/Q4=",
    );
    const one = newPrivateKey();
    assert.match(one, /^[A-Za-z0-9+/]{43}=$/);
    assert.notEqual(one, newPrivateKey());
    assert.match(publicKeyOf(one), /^[A-Za-z0-9+/]{43}=$/);
  });
});

const ACCESS: EntryPeer = {
  endpoint: "198.51.100.11:51822",
  key: key("E"),
  networks: ["10.42.0.0/16", "10.43.0.0/16", "10.44.0.0/24"],
  names: { server: "10.43.0.10", domain: "cluster.local" },
};

describe("a configuration", () => {
  const SECRET = newPrivateKey();
  const of = (form: Form, access = ACCESS) =>
    configOf({ ...PHONE, form, ...(form === "router" ? { lan: "192.168.1.0/24" } : {}) }, access, SECRET);

  test("of a phone is what every WireGuard app reads, with CoreDNS for names", () =>
    assert.equal(
      of("phone"),
      `[Interface]
PrivateKey = ${SECRET}
Address = 10.44.0.2/32
DNS = 10.43.0.10
MTU = 1280

[Peer]
PublicKey = ${ACCESS.key}
Endpoint = 198.51.100.11:51822
AllowedIPs = 10.42.0.0/16, 10.43.0.0/16, 10.44.0.0/24
PersistentKeepalive = 25
`,
    ));

  test("of macOS and Windows has no line that the apps refuse, and says how names are found", () => {
    for (const form of ["macos", "windows"] as const) {
      const lines = of(form)
        .split("\n")
        .filter((line) => line && !/^[#[]/.test(line));
      assert.deepEqual(
        lines.map((line) => line.split(" = ")[0]),
        ["PrivateKey", "Address", "MTU", "PublicKey", "Endpoint", "AllowedIPs", "PersistentKeepalive"],
      );
    }
    assert.match(of("macos"), /^# .*nameserver 10\.43\.0\.10.*\/etc\/resolver\/cluster\.local$/m);
    assert.match(of("windows"), /^# .*-Namespace '\.cluster\.local' -NameServers '10\.43\.0\.10'$/m);
  });

  test("of Linux has split DNS by systemd-resolved, and comes up without it", () => {
    const [, hook = ""] = /^PostUp = (.*)$/m.exec(of("linux")) ?? [];
    const asked = temporary();
    const run = (resolvectl: string) =>
      shell(hook.replaceAll("%i", "laptop"), ["bash", "-s"], {
        PATH: programs(join(asked, "bin"), { resolvectl }),
      });
    assert.equal(run(`echo "$*" >>${asked}/asked`).status, 0);
    assert.equal(
      readFileSync(join(asked, "asked"), "utf8"),
      "dns laptop 10.43.0.10\ndomain laptop ~cluster.local\n",
    );
    const without = run("exit 1");
    assert.deepEqual([without.status, /systemd-resolved does not run/.test(without.stdout)], [0, true]);
  });

  test("of a router carries its LAN by masquerade, takes back all rules, and says how names and routes go", () => {
    const text = of("router");
    const rules = (hook: string) =>
      [...(new RegExp(`^${hook} = (.*)$`, "m").exec(text)?.[1] ?? "").matchAll(/iptables ([^;]*)/g)].map(
        ([, rule = ""]) => rule.replace(/-[ID] /, "").trim(),
      );
    assert.deepEqual(rules("PostUp"), rules("PostDown"));
    assert(rules("PostUp").includes("-t nat POSTROUTING -s 192.168.1.0/24 -o %i -j MASQUERADE"));
    assert.match(text, /^# {3}server=\/cluster\.local\/10\.43\.0\.10$/m);
    assert.match(text, /^# {3}ip route add 10\.43\.0\.0\/16 via THIS-BOX$/m);
  });

  test("has no word of names if the cluster has no CoreDNS", () => {
    for (const form of ["phone", "linux", "macos", "windows"] as const) {
      const { names: _, ...nameless } = ACCESS;
      assert.doesNotMatch(of(form, nameless), /DNS|resolv|cluster\.local/);
      assert.deepEqual(advice({ ...PHONE, form }, nameless), []);
    }
  });

  test("is read back for the device's own key and address, and what is none is not", () => {
    assert.deepEqual(ownIn(of("linux")), { privateKey: SECRET, ip: "10.44.0.2" });
    assert.equal(ownIn(of("linux").replace(SECRET, "THE-DEVICE'S-OWN")), undefined);
  });

  test("as a QR code on the terminal is the file, to the letter", () => {
    const text = of("phone");
    for (const coloured of [false, true]) {
      const lines = qrOf(text, coloured)
        // biome-ignore lint/suspicious/noControlCharactersInRegex: the colours
        .replace(/\x1b\[[\d;]*m/g, "")
        .split("\n");
      assert(lines.every((line) => line.length === lines[0]?.length && line.length <= 80));
      // Each character is two modules, one above the other; light is what the terminal's foreground draws.
      const light = lines.flatMap((line) => [
        [...line].map((c) => c === "█" || c === "▀"),
        [...line].map((c) => c === "█" || c === "▄"),
      ]);
      const scale = 4;
      const [width, height] = [(lines[0] as string).length * scale, light.length * scale];
      const pixels = new Uint8ClampedArray(width * height * 4);
      for (let y = 0; y < height; y++)
        for (let x = 0; x < width; x++) {
          const shade = light[Math.floor(y / scale)]?.[Math.floor(x / scale)] ? 255 : 0;
          pixels.set([shade, shade, shade, 255], (y * width + x) * 4);
        }
      assert.equal(jsQR.default(pixels, width, height)?.data, text);
    }
  });
});

/** Runs the script; an ssh runs the commands here, with each box's files of devices and of flannel in a folder. */
async function run(args: string[], folder = temporary(), servers = "a1=198.51.100.11") {
  const ssh = `case $1 in -G) echo "hostname 198.51.100.11"; exit ;; esac
while [ "$1" != -- ]; do [ "$1" = -O ] && exit; shift; done
sed -u "s|/etc/rancher/k3s-devices|${folder}/$2|g; s|/run/flannel|${folder}/none|g" | sh -c "$3"`;
  const PATH = programs(join(folder, "bin"), { ssh, id: "echo 0" });
  const [server, agents = ""] = servers.split(/ (.*)/);
  writeFileSync(join(folder, ".env"), `SERVER=${server}\nAGENTS="${agents}"\n`);
  return await program([fileOf("device"), ...args], { PATH, ENV_FILE: join(folder, ".env") });
}

test("a device keeps its entries until the new ones let it in", async () => {
  const folder = temporary();
  mkdirSync(join(folder, "a1"));
  writeFileSync(join(folder, "a1", "peers"), peersText([PHONE]));
  const args = ["--name", "phone", "--public-key", PHONE.key, "--via", "b1", "--dry-run"];
  const { stdout, stderr } = await run(args, folder, "a1=198.51.100.11 b1=198.51.101.11");
  assert.match(stderr, /^b1 +FAILED .*No k3s node runs on this box/m);
  assert.doesNotMatch(stdout, /remove device/);
});

describe("the files of a device", () => {
  test("are read if they are files, and else refused in one line", () => {
    const folder = join(temporary(), "devices");
    assert.deepEqual(textsIn(folder, "tv"), []);
    mkdirSync(folder);
    writeFileSync(join(folder, "tv.conf"), "text");
    writeFileSync(join(folder, "tv-x.conf"), "of another");
    assert.deepEqual(
      textsIn(folder, "tv").map(({ text }) => text),
      ["text"],
    );
    mkdirSync(join(folder, "tv-2.conf"));
    symlinkSync("/nowhere", join(folder, "sofa.conf"));
    assert.equal(shell(`mkfifo ${folder}/pipe.conf`).status, 0);
    for (const [name, expected] of [
      ["tv", /tv-2\.conf cannot be read: it is a folder/],
      ["sofa", /sofa\.conf cannot be read: it is a link that leads nowhere/],
      ["pipe", /pipe\.conf cannot be read: it is a pipe/],
    ] as const)
      assert.throws(
        () => textsIn(folder, name),
        (error) => error instanceof SettingError && expected.test(error.message),
      );
    assert.throws(() => textsIn(join(folder, "tv.conf"), "tv"), SettingError);
  });

  test("come first: without them no box lets the device in", async () => {
    const folder = temporary();
    symlinkSync("/nowhere/at-all", join(folder, "devices"));
    const { status, stderr } = await run(["--name", "tv"], folder);
    assert.equal(status, 1);
    assert.match(stderr, /tv\.conf could not be written/);
    assert.equal(stderr.match(/FAILED/g)?.length, 1, stderr);
  });

  test("are for their owner alone, also where nothing else is to be written", () => {
    const file = join(temporary(), "devices", "tv.conf");
    const mode = () => (statSync(file).mode & 0o777).toString(8);
    assert.deepEqual([keep(file, "text"), keep(file, "text"), mode()], [false, true, "600"]);
    chmodSync(file, 0o644);
    assert.deepEqual([keep(file, "text"), mode()], [false, "600"]);
    assert.throws(() => keep(join(file, "below.conf"), "text"), Unwritten);
  });
});

describe("settings of devices", () => {
  const settled = (env: Record<string, string>) => settle({}, env, join(temporary(), "none"));
  const wrong = (env: Record<string, string>, expected: RegExp) =>
    assert.throws(
      () => {
        const { settings, origins } = settled(env);
        apart(settings, origins);
      },
      (error) => error instanceof SettingError && expected.test(error.message),
    );

  test("that are wrong are refused in one line, with what would be right", () => {
    wrong({ PUBLIC_KEY: "abc" }, /PUBLIC_KEY is "abc" \(variable PUBLIC_KEY\): expected .*wg pubkey/);
    wrong(
      { DEVICE_PORT: "51820" },
      /DEVICE_PORT is "51820".*that k3s does not use \(6443, 10250, 51820, 51821\)/,
    );
    for (const DEVICE_CIDR of [
      "10.44.0.0",
      "10.44.0.1/24",
      "10.44.0.0/024",
      "10.44.0.0/8",
      "10.44.0.0/31",
      "fd00::/64",
      "10.44.300.0/24",
      "169.254.169.0/24",
      "8.8.8.0/24",
    ])
      wrong({ DEVICE_CIDR }, /DEVICE_CIDR is .*expected a private IPv4 network of 8 to 65536 addresses/);
    const make = (name: string, value: string) => ({ [name]: value, MAKEFLAGS: ` -- ${name}=${value}` });
    wrong(make("NAME", "My-Phone"), /NAME is "My-Phone".*1 to 12 lower-case letters/);
    wrong(make("NAME", "tv-2"), /without a number at its end/);
    wrong(make("FOR", "fridge"), /FOR is "fridge".*phone, linux, macos, windows or router/);
    wrong(make("ONLY", "pods"), /ONLY is "pods".*services, or nothing/);
    wrong(make("LAN", "192.168.1.7/24"), /LAN is "192\.168\.1\.7\/24".*192\.168\.1\.0\/24/);
  });

  test("that collide with the cluster's networks are refused", () => {
    wrong(
      { DEVICE_CIDR: "10.42.8.0/24" },
      /DEVICE_CIDR is 10\.42\.8\.0\/24.*apart from 10\.42\.0\.0\/16, which the cluster has/,
    );
    wrong(
      { DEVICE_CIDR: "10.99.0.0/24", SERVER_ARGS: "--service-cidr=10.99.0.0/16" },
      /apart from 10\.99\.0\.0\/16/,
    );
    const lan = (LAN: string) => ({ LAN, MAKEFLAGS: ` -- LAN=${LAN}` });
    wrong(lan("10.43.0.0/16"), /LAN is 10\.43\.0\.0\/16 .*give the home's LAN another one/);
    wrong(lan("10.44.0.0/16"), /apart from 10\.44\.0\.0\/24, which devices has/);
    const { settings, origins } = settled(lan("192.168.1.0/24"));
    apart(settings, origins);
  });

  test("that other programs use too are read from the environment only if they were given to make", () => {
    const { settings } = settled({ NAME: "WSL-HOST", FOR: "x", LAN: "y", VIA: "-", ONLY: "annotate" });
    assert.deepEqual(
      [settings.NAME, settings.FOR, settings.LAN, settings.VIA, settings.ONLY],
      ["", "phone", "", "", ""],
    );
  });

  test("name as entries boxes of the cluster with a public address; without, a device keeps those that it has", () => {
    const cluster = ["a1=198.51.100.11", "root@b1=198.51.101.11", "nas=nat"].map((word) => {
      const [host = "", ip = ""] = word.split("=");
      return { host, ip, word, name: host.replace("root@", "") };
    }) as unknown as Box[];
    const names = (VIA: string, ...has: string[]) =>
      entriesOf(
        cluster,
        wanted({ VIA }),
        { VIA: "variable VIA" },
        cluster.filter(({ name }) => has.includes(name)),
      ).map(({ name }) => name);
    assert.deepEqual([names(""), names("", "b1"), names("", "b1", "a1")], [["a1"], ["b1"], ["a1", "b1"]]);
    assert.deepEqual([names("b1 a1 root@b1", "a1"), names("b1", "a1")], [["a1", "b1"], ["b1"]]);
    assert.throws(() => names("c1"), /VIA names c1 \(variable VIA\): expected some of a1, b1, nas/);
    assert.throws(() => names("nas"), /VIA names nas .*expected a box with a public address/);
  });
});
