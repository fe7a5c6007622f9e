import assert from "node:assert/strict";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { FRESH } from "../lib/k3s/nodes.ts";
import { notifyForm, watchIn, watchStep, watchText } from "../lib/k3s/watch.ts";
import {
  certificates,
  has,
  lacks,
  MODERN,
  node,
  prepared,
  programs,
  service,
  shell,
  temporary,
  unitsOf,
  wanted,
} from "./helpers.ts";

const START = Date.parse("2026-11-28T04:00:00Z") / 1000;
const DAY = 86_400;
const AWKS = ["mawk", "gawk", "busybox awk"].filter((awk) => has(awk.split(" ")[0] as string));

interface Peer {
  age?: number;
  received?: number;
}
/** What the box sees; a1 is the server, b1 another node, and nas one without a public address. */
interface World {
  api: boolean;
  nodes: { name: string; n: number; ip: string; external?: string; ready?: string; pressure?: string }[];
  peers: Record<string, Peer>;
  /** Addresses of kubelets that answer, and when their certificates end, as days from now. */
  kubelets: Record<string, number>;
  /** The server's own certificates end in so many days. */
  own: number;
  ca: number;
  disk: [size: number, used: number, left: number];
  memory: number;
  backup?: string;
}
const WELL: World = {
  api: true,
  nodes: [
    { name: "a1", n: 0, ip: "198.51.100.11" },
    { name: "b1", n: 1, ip: "198.51.101.11" },
    { name: "nas", n: 2, ip: "10.42.2.0", external: "" },
  ],
  peers: { b1: {}, nas: {} },
  kubelets: { "198.51.100.11": 300, "198.51.101.11": 300, "10.42.2.0": 300 },
  own: 300,
  ca: 3000,
  disk: [20_000_000, 8_000_000, 12_000_000],
  memory: 50,
};

/** A box with the program, its webhook, and a clock that goes on by a minute each round. */
function watched({ awk = "awk", sh = "sh", form = "json", name = "a1" } = {}) {
  const folder = temporary();
  const at = (...path: string[]) => join(folder, ...path);
  const folders = [
    "run",
    "etc/k3s-watch",
    "etc/k3s-backup",
    "state",
    "net/flannel-wg",
    "backup",
    "rancher/server/tls",
  ];
  for (const path of folders) mkdirSync(at(path), { recursive: true });
  const bin = programs(at("bin"), {
    awk: `exec ${awk === "awk" ? "/usr/bin/awk" : awk} "$@"`,
    date: `if [ "$*" = +%s ]; then cat ${at("now")}; else exec /bin/date "$@"; fi`,
    wg: `cat ${at("dump")}`,
    df: `cat ${at("df")}`,
    systemctl: "echo inactive",
    // The API, the kubelets, or the webhook.
    curl: `case $* in
  *6443*) [ -e ${at("api")} ] || exit 7; cat ${at("api")}; printf '\\n200' ;;
  *lane*) while [ $# != 1 ]; do shift; done
    sed -n 's/^url = "https:..\\([0-9.]*\\):10250.*/\\1/p' "$1" | while read -r ip; do
      [ ! -e ${at("kubelet")}-$ip ] || cat ${at("kubelet")}-$ip >&2
    done ;;
  *)
    echo "$*" >>${at("argv")}
    [ ! -e ${at("down")} ] || exit "$(cat ${at("down")})"
    for word; do case $word in @*) { cat "\${word#@}"; echo; } >>${at("told")} ;; esac; done
    cat ${at("answer")} ;;
esac`,
  });
  writeFileSync(
    at("program"),
    watchText({ node: name, inside: false, pods: "10.42." })
      .replace(/PATH=\S+/, `PATH=${bin}`)
      .replaceAll("/run/k3s-watch", at("run"))
      .replaceAll("/etc/rancher/k3s-watch", at("etc/k3s-watch"))
      .replaceAll("/etc/rancher/k3s-backup", at("etc/k3s-backup"))
      .replaceAll("/var/lib/k3s-watch", at("state"))
      .replaceAll("/var/lib/k3s-backup", at("backup"))
      .replaceAll("/var/lib/rancher/k3s/", at("rancher/"))
      .replaceAll("/var/lib/rancher/k3s", at("rancher"))
      .replaceAll("/proc/meminfo", at("meminfo"))
      .replaceAll("/sys/class/net", at("net")),
  );
  if (form)
    writeFileSync(at("etc/k3s-watch/webhook"), `# form=${form}\nurl = "https://hook.example/SECRET"\n`);
  writeFileSync(at("answer"), '{"errcode":0,"ok":true}\n200');
  let now = START;
  const pem = (ends: number) => {
    const [, text] = certificates({ x: ends }).split(" ");
    return `-----BEGIN CERTIFICATE-----\n${(text ?? "").replace(/.{64}/g, "$&\n")}\n-----END CERTIFICATE-----\n`;
  };
  function put(world: World) {
    writeFileSync(at("now"), `${now}\n`);
    const item = ({ name, n, ip, external = ip, ready = "True", pressure }: World["nodes"][number]) => {
      const of = node({ name, n, ip, external });
      of.status.conditions = ["Memory", "Disk", "PID"]
        .map((type) => ({
          type: `${type}Pressure`,
          status: pressure === type ? "True" : "False",
          lastHeartbeatTime: "x",
        }))
        .concat({ type: "Ready", status: ready, lastHeartbeatTime: "x" });
      return { metadata: of.metadata, spec: of.spec, status: of.status };
    };
    const list = { kind: "NodeList", apiVersion: "v1", metadata: {}, items: world.nodes.map(item) };
    rmSync(at("api"), { force: true });
    if (world.api) writeFileSync(at("api"), JSON.stringify(list));
    const dump = world.nodes.flatMap(({ name, n }) => {
      const { age = 30, received = now } = world.peers[name] ?? {};
      return name === "a1" || !(name in world.peers)
        ? []
        : [
            `KEY${n}\t(none)\t1.2.3.4:51820\t10.42.${n}.0/24\t${age < 0 ? 0 : now - age}\t${received}\t9000000000\t25`,
          ];
    });
    writeFileSync(at("dump"), ["PRIVATE\tPUBLIC\t51820\toff", ...dump, ""].join("\n"));
    for (const file of readdirSync(folder)) if (file.startsWith("kubelet-")) rmSync(at(file));
    for (const [ip, days] of Object.entries(world.kubelets)) {
      const [, day, month, year, time] = new Date((now + days * DAY) * 1000).toUTCString().split(" ");
      writeFileSync(
        at(`kubelet-${ip}`),
        `*   Trying ${ip}:10250...\n*  expire date: ${month} ${day} ${time} ${year} GMT\n> GET /healthz HTTP/2\r\n> Host: ${ip}:10250\r\n< HTTP/2 401 \r\n`,
      );
    }
    const tls = (file: string) => at("rancher/server/tls", file);
    writeFileSync(tls("client-admin.crt"), pem(now + world.own * DAY) + pem(now + 4000 * DAY));
    writeFileSync(tls("client-admin.key"), "KEY");
    writeFileSync(tls("server-ca.crt"), pem(now + world.ca * DAY));
    const [size, used, left] = world.disk;
    writeFileSync(
      at("df"),
      `Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/vda1 ${size} ${used} ${left} 40% /\n/dev/vda1 ${size} ${used} ${left} 40% /\n`,
    );
    writeFileSync(at("meminfo"), `MemTotal: 2000000 kB\nMemAvailable: ${20_000 * world.memory} kB\n`);
    if (world.backup) writeFileSync(at("backup/state"), world.backup);
  }
  const read = (file: string) => (existsSync(at(file)) ? readFileSync(at(file), "utf8") : "");
  return {
    at,
    read,
    /** So many rounds; what the webhook was told meanwhile, a body a line. */
    rounds(many = 1, over: Partial<World> = {}) {
      const before = read("told").length;
      let said = "";
      for (let i = 0; i < many; i++, now += 60) {
        put({ ...WELL, ...over });
        const { status, stdout, stderr } = shell("", [...sh.split(" "), at("program")]);
        assert.equal(status, 0, stderr);
        assert.equal(stderr, "");
        said += stdout;
      }
      return { told: read("told").slice(before).trim().split("\n").filter(Boolean), said };
    },
    /** Its lines alone, from JSON. */
    lines(many = 1, over: Partial<World> = {}): string[] {
      return this.rounds(many, over).told.flatMap((body) => JSON.parse(body).lines);
    },
    pass(seconds: number) {
      now += seconds;
    },
    send: (file: string) => shell("", [...sh.split(" "), at("program"), "test", file]),
  };
}

const nodesBut = (name: string, over: Partial<World["nodes"][number]>) =>
  WELL.nodes.map((one) => (one.name === name ? { ...one, ...over } : one));
const without = <T>(all: Record<string, T>, name: string) =>
  Object.fromEntries(Object.entries(all).filter(([key]) => key !== name));

/** busybox brings both. */
const PAIRS = AWKS.map((awk) => ({ awk, sh: awk.startsWith("busybox") ? "busybox sh" : "sh" }));

for (const { awk, sh } of PAIRS)
  describe(`the watch, with ${awk} in ${sh}`, () => {
    test("tells nothing of a healthy cluster", () => {
      const { told, said } = watched({ awk, sh }).rounds(3);
      assert.deepEqual({ told, said }, { told: [], said: "" });
    });

    const problems: [name: string, over: Partial<World>, told: string][] = [
      [
        "a node that is off",
        {
          nodes: nodesBut("b1", { ready: "Unknown" }),
          peers: without(WELL.peers, "b1"),
          kubelets: without(WELL.kubelets, "198.51.101.11"),
        },
        "node b1 is not Ready: nothing is heard of its kubelet",
      ],
      [
        "a tunnel without a handshake",
        { peers: { ...WELL.peers, b1: { age: 600 } } },
        "WireGuard has had no handshake with b1 for 10 min: is 51820/udp open at both ends?",
      ],
      [
        "a tunnel that never was",
        { peers: { ...WELL.peers, b1: { age: -1 } } },
        "WireGuard has had no handshake with b1 yet: is 51820/udp open at both ends?",
      ],
      [
        "a node without a peer",
        { peers: without(WELL.peers, "b1") },
        "WireGuard has had no handshake with b1 yet: is 51820/udp open at both ends?",
      ],
      [
        "a tunnel to a home, of whose kubelet nothing is heard then",
        { peers: { ...WELL.peers, nas: { age: 300 } }, kubelets: without(WELL.kubelets, "10.42.2.0") },
        "WireGuard has had no handshake with nas for 5 min: is 51820/udp open at both ends?",
      ],
      [
        "a kubelet",
        { kubelets: without(WELL.kubelets, "198.51.101.11") },
        "the kubelet of b1 does not answer at 198.51.101.11:10250",
      ],
      [
        "a kubelet at home",
        { kubelets: without(WELL.kubelets, "10.42.2.0") },
        "the kubelet of nas does not answer at 10.42.2.0:10250",
      ],
      [
        "the disk of a node",
        { nodes: nodesBut("b1", { pressure: "Disk" }) },
        "node b1 is short of disk space (DiskPressure)",
      ],
      [
        "the memory of a node",
        { nodes: nodesBut("nas", { pressure: "Memory" }) },
        "node nas is short of memory (MemoryPressure)",
      ],
      [
        "the server's certificates",
        { own: 20.5 },
        "the certificates of a1 end on 2026-12-18, in 20 days: make certs",
      ],
      [
        "certificates that ended yesterday",
        { own: -1, api: false },
        "the certificates of a1 ended on 2026-11-27: make certs",
      ],
      [
        "a kubelet's certificate",
        { kubelets: { ...WELL.kubelets, "198.51.101.11": 20.5 } },
        "the certificates of b1 end on 2026-12-18, in 20 days: make certs",
      ],
      [
        "a kubelet's certificate that ended, and its node for that",
        {
          nodes: nodesBut("b1", { ready: "Unknown" }),
          kubelets: { ...WELL.kubelets, "198.51.101.11": -1 },
        },
        "the certificates of b1 ended on 2026-11-27: make certs",
      ],
      [
        "the CA",
        { ca: 10.5 },
        "the CA certificates of the cluster end on 2026-12-08, in 10 days, and no restart renews them",
      ],
      [
        "a disk that is full",
        { disk: [1e7, 97e5, 3e5] },
        "the disk of a1 is full: /var/lib/rancher 97 % in use, 293 MB left",
      ],
      [
        "a large disk with little left",
        { disk: [1e7, 96e5, 4e5] },
        "the disk of a1 is full: /var/lib/rancher 96 % in use, 391 MB left",
      ],
      ["memory", { memory: 3 }, "a1 has 3 % of its memory left"],
      ["the API", { api: false }, "the API on a1 does not answer: it refuses connections; k3s is inactive"],
      [
        "a backup that failed",
        { backup: `made=${START - DAY} name=x\nfailed=${START} the "bucket" is\tfull \u00fc\n` },
        'the backup failed at 2026-11-28T04:00:00Z: the "bucket" is full ??',
      ],
    ];
    for (const [name, over, told] of problems)
      test(`tells of ${name} once, after two rounds, and once when it is over, after two again`, () => {
        const it = watched({ awk, sh });
        assert.deepEqual(it.lines(2), []);
        assert.deepEqual(it.lines(1, over), []);
        assert.deepEqual(it.lines(1, over), [`PROBLEM: ${told}`]);
        assert.deepEqual(it.lines(3, over), []);
        assert.deepEqual(it.lines(1, { backup: `made=${START} name=x\n` }), []);
        const [over1, ...more] = it.lines(2);
        assert.match(over1 ?? "", /^RESOLVED after \d+ min: /);
        assert.deepEqual(more, []);
      });
  });

describe("the watch", () => {
  test("tells nothing of what one round alone has seen", () => {
    const it = watched();
    for (let i = 0; i < 3; i++) {
      assert.deepEqual(it.lines(1, { api: false }), []);
      assert.deepEqual(it.lines(1), []);
    }
  });

  test("tells several problems of a round in one message", () => {
    const { told } = watched().rounds(3, { memory: 1, disk: [1e7, 1e7, 0] });
    assert.equal(told.length, 1);
    assert.equal(JSON.parse(told[0] as string).lines.length, 2);
  });

  test("reminds once a day of all that is wrong", () => {
    const it = watched();
    it.rounds(3, { memory: 1 });
    it.pass(DAY);
    assert.deepEqual(it.lines(2, { memory: 1 }), ["STILL, after 24 h: a1 has 1 % of its memory left"]);
    it.pass(DAY);
    assert.deepEqual(it.lines(3, { memory: 1 }), ["STILL, after 2 days: a1 has 1 % of its memory left"]);
  });

  test("does not take a node for well that it cannot see, since the API is silent", () => {
    const it = watched();
    const off = { nodes: nodesBut("b1", { ready: "False" }) };
    it.rounds(2, off);
    assert.deepEqual(
      it.lines(4, { ...off, api: false }).map((line) => line.slice(0, 16)),
      ["PROBLEM: the API"],
    );
    assert.deepEqual(
      it.lines(4, off).map((line) => /: the API/.test(line)),
      [true],
    );
    assert.deepEqual(it.lines(3), ["RESOLVED after 11 min: node b1 is not Ready"]);
  });

  test("tells of a node that was removed no more", () => {
    const it = watched();
    it.rounds(2, { nodes: nodesBut("b1", { ready: "False" }) });
    const left = WELL.nodes.filter(({ name }) => name !== "b1");
    assert.deepEqual(it.lines(4, { nodes: left }), ["RESOLVED after 3 min: node b1 is not Ready"]);
  });

  test("waits for the tunnel's handshake to be old before it speaks of a kubelet behind it", () => {
    const it = watched();
    it.rounds(2);
    const lost = (age: number) => ({
      peers: { ...WELL.peers, nas: { age, received: 5 } },
      kubelets: without(WELL.kubelets, "10.42.2.0"),
    });
    assert.deepEqual(it.lines(1, lost(60)), []);
    assert.deepEqual(it.lines(1, lost(120)), []);
    assert.deepEqual(it.lines(1, lost(180)), []);
    assert.match(
      it.lines(1, lost(240)).join(),
      /^PROBLEM: WireGuard has had no handshake with nas for 4 min/,
    );
    assert.match(it.lines(2).join(), /^RESOLVED/);
  });

  test("reports a backup that is older than two intervals", () => {
    const it = watched();
    writeFileSync(it.at("etc/k3s-backup/settings"), "every=21600\n");
    assert.deepEqual(it.lines(3, { backup: `made=${START - 12 * 3600} name=x\n` }), []);
    assert.match(
      it.lines(3, { backup: `made=${START - 14 * 3600} name=x\n` }).join(),
      /^PROBLEM: the last backup is of 2026-11-27T14:00:00Z, 14 h ago$/,
    );
  });

  test("says a line only where something has changed", () => {
    const { said } = watched().rounds(5, { memory: 1 });
    assert.equal(said, "<5>PROBLEM: a1 has 1 % of its memory left\n");
  });

  describe("when the webhook does not answer", () => {
    test("keeps each message and its order, loses none and sends none twice", () => {
      const it = watched();
      writeFileSync(it.at("down"), "7");
      const first = it.rounds(4, { memory: 1 });
      assert.equal(
        first.said.split("\n")[1],
        "<4>the webhook does not take a message: it refuses connections; it is kept, and tried each minute",
      );
      assert.deepEqual(first.told, []);
      assert.deepEqual(it.rounds(4), {
        told: [],
        said: "<5>RESOLVED after 4 min: a1 has 1 % of its memory left\n".replace("4 min", "5 min"),
      });
      rmSync(it.at("down"));
      const { told, said } = it.rounds(3);
      assert.deepEqual(
        told.map((body) => JSON.parse(body).event),
        ["problem", "resolved"],
      );
      assert.equal(said, "<5>the webhook takes messages again\n");
    });

    test("does not lose them by a restart of the box", () => {
      const it = watched();
      writeFileSync(it.at("down"), "28");
      it.rounds(3, { memory: 1 });
      rmSync(it.at("run"), { recursive: true });
      rmSync(it.at("down"));
      assert.equal(it.rounds(1, { memory: 1 }).told.length, 1);
      rmSync(it.at("run"), { recursive: true });
      assert.equal(it.rounds(2, { memory: 1 }).told.length, 0);
    });

    for (const [form, answer, cause] of [
      ["json", "no such hook\n404", "it answers with HTTP 404"],
      ["slack", "invalid_payload\n400", "it answers with HTTP 400"],
      [
        "dingtalk",
        '{"errcode":310000,"errmsg":"keywords not in content"}\n200',
        "it answers with errcode 310000",
      ],
      ["wecom", '{"errcode" : 93000, "errmsg":"invalid webhook url"}\n200', "it answers with errcode 93000"],
      ["wecom", "<html>\n200", "it answers with errcode none"],
      ["telegram", '{"ok":false}\n200', "its answer is not ok"],
    ] as const)
      test(`knows a refusal: ${form}, ${cause}`, () => {
        const it = watched({ form });
        writeFileSync(it.at("answer"), answer);
        const { status, stdout } = it.send(it.at("etc/k3s-watch/webhook"));
        assert.deepEqual(
          { status, stdout },
          { status: 1, stdout: `The webhook does not take a message: ${cause}\n` },
        );
        assert.match(it.rounds(2, { memory: 1 }).said, new RegExp(`does not take a message: ${cause}`));
      });
  });

  test("keeps the webhook's address out of arguments, messages, the journal and the state", () => {
    const it = watched();
    writeFileSync(it.at("down"), "60");
    const { said } = it.rounds(3, { memory: 1 });
    rmSync(it.at("down"));
    const all = [
      said,
      ...it.rounds(2, { memory: 1 }).told,
      ...["argv", "run/state", "run/k3s.prom", "state/state", "program"].map(it.read),
    ];
    for (const text of all) assert(text && !text.includes("SECRET"), text);
    const mode = (path: string) => shell(`stat -c %a ${it.at(path)}`).stdout.trim();
    assert.deepEqual(["run/state", "state/state", "state/k3s.prom"].map(mode), ["600", "600", "644"]);
  });

  test("goes on when its own disk takes nothing any more", () => {
    const it = watched();
    rmSync(it.at("state"), { recursive: true });
    writeFileSync(it.at("state"), "in the way");
    assert.equal(it.rounds(4, { memory: 1 }).told.length, 1);
  });
});

describe("what the webhook gets", () => {
  const odd = 'failed=1 a "b\\c" <d> & e\n';
  const text = 'PROBLEM: the backup failed at 1970-01-01T00:00:01Z: a "b\\c" <d> & e';
  const bodyOf = (form: string, awk = "awk") => {
    const it = watched({ form, awk });
    const { told } = it.rounds(2, { backup: odd });
    return { body: told.join("\n"), argv: it.read("argv") };
  };
  for (const awk of AWKS) {
    test(`is text and headers for ntfy, with ${awk}`, () => {
      const { body, argv } = bodyOf("ntfy", awk);
      assert.equal(body, text);
      assert.match(argv, /-H Title: k3s on a1 -H Priority: high -H Tags: warning /);
      assert.doesNotMatch(argv, /Content-Type/);
    });
    const forms: [string, unknown][] = [
      ["slack", { text: `k3s on a1: ${text.replace("<d> &", "&lt;d&gt; &amp;")}` }],
      ["dingtalk", { msgtype: "text", text: { content: `k3s on a1: ${text}` } }],
      ["wecom", { msgtype: "text", text: { content: `k3s on a1: ${text}` } }],
      ["telegram", { text: `k3s on a1: ${text}` }],
      [
        "json",
        {
          event: "problem",
          node: "a1",
          time: "2026-11-28T04:01:00Z",
          text: `k3s on a1: ${text}`,
          lines: [text],
        },
      ],
    ];
    for (const [form, expected] of forms)
      test(`is what ${form} takes, with ${awk}`, () => {
        const { body, argv } = bodyOf(form, awk);
        assert.deepEqual(JSON.parse(body), expected);
        assert.match(argv, /-H Content-Type: application\/json /);
      });
  }

  test("is no longer than WeCom takes, for any number of problems", () => {
    const many = Array.from({ length: 60 }, (_, n) => ({
      name: `node-with-a-long-name-${n}`,
      n: n + 3,
      ip: `203.0.113.${n + 1}`,
      ready: "False",
    }));
    const { told } = watched({ form: "wecom" }).rounds(2, { nodes: [...WELL.nodes, ...many] });
    const { content } = JSON.parse(told[0] as string).text;
    assert(content.length > 1500 && content.length < 2048, content.length);
    assert.match(content, /\n\.\.\. and \d+ more$/);
  });

  test("has the form of its host, or the one that is set", () => {
    const of = (NOTIFY_URL: string, NOTIFY_FORM = "") => notifyForm({ NOTIFY_URL, NOTIFY_FORM });
    assert.deepEqual(
      [
        of("https://hooks.slack.com/services/T/B/x"),
        of("https://oapi.dingtalk.com/robot/send?access_token=x"),
        of("https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=x"),
        of("https://api.telegram.org/bot1:x/sendMessage?chat_id=1"),
        of("https://ntfy.sh/x"),
        of("https://example.org/slack"),
        of("https://example.org/x", "slack"),
      ],
      ["slack", "dingtalk", "wecom", "telegram", "ntfy", "json", "slack"],
    );
  });
});

/** The text format of Prometheus, strictly: HELP and TYPE before the samples of a metric, which stand together. */
function metricsIn(text: string) {
  const samples: Record<string, string> = {};
  const types: Record<string, string> = {};
  let current = "";
  assert(text.endsWith("\n"));
  for (const row of text.trimEnd().split("\n")) {
    const help = /^# HELP ([a-z0-9_]+) (\S.*\.)$/.exec(row);
    const type = /^# TYPE ([a-z0-9_]+) (gauge|counter)$/.exec(row);
    if (help) {
      current = help[1] as string;
      assert(!(current in types), `${current} twice`);
      continue;
    }
    if (type) {
      assert.equal(type[1], current);
      types[current] = type[2] as string;
      assert.equal(type[2] === "counter", current.endsWith("_total"), current);
      continue;
    }
    const [, name = "", labels = ""] =
      /^([a-z0-9_]+)(\{[a-z]+="[^"\\\n]*"(?:,[a-z]+="[^"\\\n]*")*\})? -?\d+(\.\d+)?$/.exec(row) ?? [];
    assert.equal(name, current, row);
    assert(name in types, row);
    assert(!(name + labels in samples), row);
    samples[name + labels] = row.split(" ").at(-1) as string;
  }
  return samples;
}

describe("the metrics", () => {
  for (const awk of AWKS)
    test(`are in Prometheus's text format, with ${awk}`, () => {
      const it = watched({ awk });
      it.rounds(3, {
        memory: 1,
        nodes: nodesBut("b1", { ready: "False" }),
        backup: `made=${START} name=x\n`,
      });
      const now = metricsIn(it.read("state/k3s.prom"));
      assert.equal(it.read("run/k3s.prom"), it.read("state/k3s.prom"));
      const expected = {
        k3s_watch_last_round_timestamp_seconds: `${START + 120}`,
        k3s_watch_api_up: "1",
        'k3s_watch_node_ready{node="a1"}': "1",
        'k3s_watch_node_ready{node="b1"}': "0",
        'k3s_watch_node_pressure{node="nas",of="disk"}': "0",
        'k3s_watch_kubelet_up{node="b1"}': "1",
        'k3s_watch_handshake_timestamp_seconds{node="nas"}': `${START + 90}`,
        'k3s_watch_tunnel_transmit_bytes_total{node="b1"}': "9000000000",
        'k3s_watch_certificate_end_timestamp_seconds{node="b1"}': `${START + 120 + 300 * DAY}`,
        'k3s_watch_certificate_end_timestamp_seconds{node="a1"}': `${START + 120 + 300 * DAY}`,
        k3s_watch_ca_end_timestamp_seconds: `${START + 120 + 3000 * DAY}`,
        'k3s_watch_disk_available_bytes{path="/var/lib/rancher"}': "12288000000",
        k3s_watch_memory_available_bytes: "20480000",
        k3s_watch_backup_timestamp_seconds: `${START}`,
        k3s_watch_problems: "2",
        'k3s_watch_problem{what="node b1"}': "1",
      };
      assert.deepEqual(Object.fromEntries(Object.keys(expected).map((key) => [key, now[key]])), expected);
      it.rounds(1, { api: false });
      assert.equal(metricsIn(it.read("state/k3s.prom")).k3s_watch_api_up, "0");
    });

  test("are written without a webhook too", () => {
    const it = watched({ form: "" });
    const { said } = it.rounds(3, { memory: 1 });
    assert.equal(said, "<5>PROBLEM: a1 has 1 % of its memory left (no NOTIFY_URL)\n");
    assert.equal(metricsIn(it.read("state/k3s.prom")).k3s_watch_problems, "1");
  });

  test("are answered to those inside the cluster alone", () => {
    const it = watched();
    it.rounds(1);
    // A stranger's request is not read to its end.
    const ask = (REQUEST: string, from: string) =>
      shell('printf %s "$REQUEST" | sh "$PROGRAM" answer now', ["sh", "-s"], {
        REQUEST,
        PROGRAM: it.at("program"),
        REMOTE_ADDR: from,
      }).stdout;
    const answer = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "10.42.1.7");
    const [head = "", body] = answer.split("\r\n\r\n");
    assert.match(head, /^HTTP\/1\.1 200 OK\r\nContent-Type: text\/plain; version=0\.0\.4\r\n/);
    assert.match(head, new RegExp(`Content-Length: ${Buffer.byteLength(body ?? "")}\r\n`));
    assert.equal(body, it.read("run/k3s.prom"));
    assert.equal(ask("GET /metrics HTTP/1.1\r\n\r\n", "192.168.0.13"), "");
    assert.match(
      ask("GET /../../etc/shadow HTTP/1.1\r\n\r\n", "10.42.0.1"),
      /^HTTP\/1\.1 404 [\s\S]*\r\n\r\n$/,
    );
  });

  test("are those of the dashboard", { skip: lacks("sh") }, () => {
    const it = watched();
    it.rounds(3, { memory: 1, backup: `made=${START} name=x\n` });
    const names = new Set(
      Object.keys(metricsIn(it.read("state/k3s.prom"))).map((key) => key.replace(/\{.*/, "")),
    );
    const text = readFileSync(join(import.meta.dirname, "../scripts/cluster/grafana.json"), "utf8");
    const board = JSON.parse(text);
    assert(board.panels.length > 5 && board.title && board.schemaVersion);
    const used = [...text.matchAll(/\bk3s_watch_[a-z_]+/g)].map(([name]) => name);
    assert(used.length > 10);
    for (const name of used) assert(names.has(name), name);
    assert.equal(FRESH, 180);
  });
});

describe("make watch on a box", () => {
  const facts = {
    ...prepared(MODERN),
    processes: unitsOf(service(START)),
    subnet: "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\n",
  };
  const want = wanted({ NOTIFY_URL: "https://hooks.slack.com/services/SECRET" });

  test("sends a test message of the form that the host takes, and shows no address", () => {
    const [change, ...more] = watchStep.plan(want, facts);
    assert.deepEqual(more, []);
    assert.match(change?.why ?? "", /; send a test message \(slack\)$/);
    assert.deepEqual(change?.secrets, ["NOTIFY_URL"]);
    assert(!JSON.stringify(change).includes("SECRET"));
  });

  test("refuses a box without a k3s server, and a program of somebody else", () => {
    assert.throws(() => watchStep.plan(want, { ...facts, processes: unitsOf() }), /No k3s server runs/);
    assert.throws(
      () => watchStep.plan(want, { ...facts, watch: "#!/bin/sh\nfoo\n" }),
      /not written by this project/,
    );
  });

  test("has nothing to remove where nothing is", () =>
    assert.deepEqual(watchStep.plan({ ...want, allowed: new Set(["remove"]) }, facts), []));

  test("is a note of check where NOTIFY_URL is set and nothing watches, and no number ends check", () => {
    assert.match(watchIn(want, facts)?.note ?? "", /nothing watches: make watch$/);
    assert.equal(watchIn(wanted(), facts), undefined);
    const units = ["timer", "metrics.socket"].map(
      (of) => `Id=k3s-watch${of === "timer" ? "." : "-"}${of}\nActiveState=active\nUnitFileState=enabled`,
    );
    const odd = {
      ...facts,
      watch: "x",
      "watch-units": units.join("\n\n"),
      "watch-last": `round ${Math.floor(Number(prepared(MODERN).now))}\nwebhook 99999999999999999\tx`,
    };
    assert.equal(watchIn(want, odd)?.fault, undefined);
    const since = { ...odd, "watch-last": odd["watch-last"].replace(/webhook \d+/, `webhook ${START}`) };
    assert.equal(
      watchIn(want, since)?.fault,
      "its watch cannot tell the webhook since 2026-11-28 04:00 UTC: x; its messages wait",
    );
  });
});
