import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { foldersLook } from "../lib/k3s/packages.ts";
import { Refusal, type Step } from "../lib/step.ts";
import { downloadAhead, downloadK3s, hostOf } from "../scripts/download-k3s.ts";
import { type Facts, has, MODERN, OLD, prepared, programs, shell, temporary, wanted } from "./helpers.ts";

const HASH = "a".repeat(64);
const verbs = (over = {}, facts = {}) =>
  downloadK3s
    .plan(wanted(over), prepared(MODERN, facts))
    .map(({ why }) => why.replace(/ in place of.*/, " over it"));

describe("k3s", () => {
  const cases: [name: string, want: object, facts: object, changes: string[]][] = [
    ["of the requested version is not replaced", {}, {}, []],
    ["of another version is replaced", { K3S_VERSION: OLD }, {}, [`download k3s ${OLD} over it`]],
    [
      "that is missing is downloaded, and kubectl linked",
      {},
      { version: "", kubectl: "" },
      [`download k3s ${MODERN}`, "link kubectl to k3s"],
    ],
    [
      "that does not run, and has no version, is downloaded",
      {},
      { version: "\n" },
      [`download k3s ${MODERN}`],
    ],
    ["with the requested sha256 is not replaced", { K3S_SHA256: HASH }, { sha256: `${HASH}\n` }, []],
    [
      "with another sha256 than the requested one is replaced",
      { K3S_SHA256: HASH },
      { sha256: "b\n" },
      [`download k3s ${MODERN} over it`],
    ],
    [
      "from K3S_BIN is pushed",
      { K3S_BIN: "./k3s", K3S_SHA256: HASH },
      { version: "", sha256: "" },
      ["put ./k3s in place"],
    ],
    [
      "from K3S_BIN is not pushed again if it is already installed, whatever its version",
      { K3S_BIN: "./k3s", K3S_SHA256: HASH },
      { version: OLD, sha256: `${HASH}\n` },
      [],
    ],
    [
      "is downloaded once curl is installed, if that is missing",
      {},
      { curl: "", version: "" },
      ["install curl, which downloads and asks the server", `download k3s ${MODERN}`],
    ],
    ["without kubectl gets only the link", {}, { kubectl: "" }, ["link kubectl to k3s"]],
  ];
  for (const [name, want, facts, changes] of cases)
    test(name, () => assert.deepEqual(verbs(want, facts), changes));

  test("is pushed before the change that verifies it, and the look is repeated", () => {
    const [change] = downloadK3s.plan(
      wanted({ K3S_BIN: "./my k3s", K3S_SHA256: HASH }),
      prepared(MODERN, { sha256: "" }),
    );
    assert.equal(change?.push?.file, "./my k3s");
    assert.ok(change?.sh.includes(`part=${change.push?.path};`));
    assert.ok(change?.lookAgain);
  });

  const arches = {
    x86_64: "k3s sha256sum-amd64.txt",
    aarch64: "k3s-arm64 sha256sum-arm64.txt",
    armv7l: "k3s-armhf sha256sum-arm.txt",
  };
  for (const [arch, names] of Object.entries(arches))
    test(`for ${arch} is downloaded as ${names.replace(" ", ", verified with ")}`, () => {
      const sh =
        downloadK3s.plan(wanted(), prepared(MODERN, { version: "", arch: `${arch}\n` }))[0]?.sh ?? "";
      const [file, sums] = names.split(" ");
      assert.match(sh, new RegExp(`get "\\$from" ${file} `));
      assert.match(sh, new RegExp(`get "\\$1" ${sums} `));
    });

  test("is refused on other architectures, unless K3S_BIN is set", () => {
    const facts = prepared(MODERN, { version: "", arch: "riscv64\n" });
    assert.throws(
      () => downloadK3s.plan(wanted(), facts),
      (e: Error) => e instanceof Refusal && /riscv64.*K3S_BIN/.test(e.message),
    );
    assert.equal(downloadK3s.plan(wanted({ K3S_BIN: "./k3s", K3S_SHA256: HASH }), facts).length, 1);
  });
});

/**
 * A curl that serves files of a folder by host and path, with -C -, and statuses as curl's. A host with a file
 * `leads` redirects to the address in it.
 */
const CURL = `out=; from=0; end=
for word; do
  case $last in -o) out=$word ;; -w) end=$word ;; esac
  case $word in -C) from=1 ;; http*) url=$word ;; esac
  last=$word
done
echo "$url" >>"$WWW/log"
host=\${url#*://}; path=/\${host#*/}; host=\${host%%/*}
[ ! -f "$WWW/$host/leads" ] || url=$(cat "$WWW/$host/leads")$path
file=$(echo "\${url#*://}" | sed 's,^[^/]*@,,; s,:[0-9]*/,/,; s,[.]/,/,' | tr A-Z a-z)
file=$WWW/$(echo "$file" | sed 's,%2b,%2B,')
[ -z "$end" ] || trap 'printf "\\n%s\\n" "$url"' EXIT
[ -d "\${file%%/releases*}" ] || exit 7
[ -f "$file" ] || exit 22
[ -n "$out" ] || { cat "$file"; exit; }
[ "$from" = 0 ] || [ ! -f "$file.whole" ] || exit 33
if [ "$from" = 1 ]; then tail -c +$(($(wc -c <"$out") + 1)) "$file" >>"$out"; else cat "$file" >"$out"; fi
[ ! -f "$file.cut" ] || exit 18`;

describe("a host", () => {
  const one = (...bases: string[]) =>
    assert.equal(new Set(bases.map(hostOf)).size, 1, bases.map(hostOf).join());
  test("is the same with another port, another scheme or another notation of its name or address", () => {
    one("https://m/k3s", "https://m:1/k3s", "https://m./k3s", "http://M/other", "https://m.:8443/");
    one("https://192.0.2.1/", "https://0xc0000201/", "https://192.0.513/", "https://0300.0.2.1./");
    one(
      "https://192.0.2.1/",
      "https://[::ffff:192.0.2.1]/",
      "https://[::ffff:c000:201]:1/",
      "https://[::192.0.2.1]/",
    );
    one("https://[2001:db8::1]/", "https://[2001:DB8:0:0::1]:8443/");
  });
  test("is a different one with another name or address", () => {
    const bases = [
      "https://m/",
      "https://n.m/",
      "https://192.0.2.1/",
      "https://192.0.2.2/",
      "https://[2001:db8::1]/",
    ];
    assert.equal(new Set(bases.map(hostOf)).size, bases.length);
  });
  test("is the same one to a box, which has to read where a mirror led", () => {
    const text = downloadK3s.plan(
      wanted({ K3S_VERSION: OLD, K3S_MIRRORS: "https://m https://n" }),
      prepared(MODERN),
    )[0]?.sh;
    const [host] = /^host\(\) \{.*?lower:.*?^\}$/ms.exec(text ?? "") ?? [];
    const urls = [
      "https://m/k3s",
      "https://m:1/k3s",
      "http://M./other?https://x/",
      "https://a:b@M.:8443/@n//c",
      "https://m#n",
    ];
    for (const argv of [["dash"], ["bash"], ["busybox", "sh"]].filter(([name]) => has(name as string)))
      for (const url of [
        ...urls,
        "https://[2001:db8::1]/",
        "https://[2001:DB8::1]:8443/x",
        "https://192.0.2.1:/",
      ]) {
        const said = shell(
          `set -eu\n${host}\nhost "$(printf 'https://other/\\n%s\\n' '${url}')"; echo "$host"`,
          [...argv, "-s"],
        );
        assert.equal(said.stdout.trim(), hostOf(url), `${url} in ${argv}: ${said.stderr}`);
      }
  });
  test("does not verify its own files, at another port or in another notation either", () => {
    const sh = downloadK3s.plan(
      wanted({ K3S_VERSION: OLD, K3S_MIRRORS: "https://m:1/k3s https://m./k3s" }),
      prepared(MODERN),
    )[0]?.sh;
    assert.match(sh ?? "", /if try https:\/\/m:1\/k3s; .*\nif try https:\/\/m\.\/k3s; /);
  });
});

describe("a folder that cannot be written", () => {
  const refused = (step: Step, facts: Facts, want = {}) =>
    assert.throws(
      () => step.plan(wanted(want), prepared(MODERN, { readonly: "/usr/local/bin\n", ...facts })),
      (e: Error) =>
        e instanceof Refusal && /\/usr\/local\/bin cannot be written.*Nothing was installed/.test(e.message),
    );

  test("is reported before anything is downloaded, pushed or linked there", () => {
    refused(downloadK3s, { version: "" });
    refused(downloadK3s, { version: "", curl: "" });
    refused(downloadK3s, { version: `${OLD}\n` });
    refused(downloadK3s, { kubectl: "" });
    refused(downloadK3s, { sha256: "b\n" }, { K3S_BIN: "./k3s", K3S_SHA256: HASH });
    refused(downloadAhead, { version: `${OLD}\n` });
  });

  test("does not matter if everything is already installed", () =>
    assert.deepEqual(downloadK3s.plan(wanted(), prepared(MODERN, { readonly: "/usr/local/bin\n" })), []));

  test("is detected by its mode, or by that of its parent if it does not exist", () => {
    const root = temporary();
    for (const folder of ["usr/local/bin", "etc/systemd", "var/lib"])
      mkdirSync(join(root, folder), { recursive: true });
    // root may write everywhere except on a read-only file system: an unprivileged user tests the modes.
    chmodSync(root, 0o755);
    const readonly = (locked: string) => {
      for (const folder of ["usr/local/bin", "etc/systemd", "var/lib"])
        chmodSync(join(root, folder), folder === locked ? 0o555 : 0o777);
      const script = `fact() { :; }\n${foldersLook.replaceAll(" /", ` ${root}/`)}`;
      const argv =
        process.getuid?.() === 0 ? ["setpriv", "--reuid=65534", "--clear-groups", "sh", "-s"] : ["sh", "-s"];
      return shell(script, argv).stdout.replaceAll(root, "");
    };
    assert.equal(readonly(""), "");
    assert.equal(readonly("usr/local/bin"), "/usr/local/bin\n");
    assert.equal(readonly("etc/systemd"), "/etc/systemd/system\n");
    assert.equal(readonly("var/lib"), "/var/lib/rancher\n");
  });
});

describe("the download", () => {
  const GOOD = `#!/bin/sh\necho "k3s version ${OLD} (bd7fb4b0)"\n`;
  /** It prints the right version. */
  const FORGED = `${GOOD}# forged\n`;
  const hash = (text: string) => createHash("sha256").update(text).digest("hex");
  const A = "https://a.example/releases";
  const B = "https://b.example/releases";
  const C = "https://c.example/releases";
  const release = "v1.17.6%2Bk3s1";

  /** Runs the change with hosts that serve these files, in place of an older binary. */
  function download(
    hosts: Record<string, Record<string, string>>,
    { mirrors = `${A} ${B}`, sha256 = "", part = "", ahead = "", by = "" } = {},
  ) {
    const root = temporary();
    for (const [host, files] of Object.entries(hosts)) {
      mkdirSync(join(root, "www", host), { recursive: true });
      for (const [path, text] of Object.entries(files)) {
        const file = join(root, "www", host, path === "leads" ? "" : "releases", path);
        mkdirSync(join(file, ".."), { recursive: true });
        writeFileSync(file, text);
      }
    }
    mkdirSync(join(root, "bin"));
    writeFileSync(join(root, "bin/k3s"), "the old one", { mode: 0o755 });
    const name = `bin/.k3s-${OLD}${by && `-${by}`}.part`;
    if (part) writeFileSync(join(root, name), part);
    if (ahead) writeFileSync(join(root, `${name}.good`), `${ahead}\n`);
    const want = wanted({ K3S_VERSION: OLD, K3S_MIRRORS: mirrors, K3S_SHA256: sha256 });
    const [change] = downloadK3s.plan(want, prepared(MODERN));
    const script = `say() { :; }; set -eu\n${change?.sh.replaceAll("/usr/local/bin", `${root}/bin`)}`;
    const { status, stdout } = shell(script, ["sh", "-s"], {
      PATH: programs(`${root}/programs`, { curl: CURL }),
      WWW: `${root}/www`,
    });
    const log = join(root, "www/log");
    return {
      status,
      stdout,
      k3s: readFileSync(join(root, "bin/k3s"), "utf8"),
      rest: readdirSync(join(root, "bin")).filter((name) => name !== "k3s"),
      asked: existsSync(log) ? readFileSync(log, "utf8") : "",
    };
  }
  const good = { [`${release}/k3s`]: GOOD, [`${release}/sha256sum-amd64.txt`]: `${hash(GOOD)}  k3s\n` };
  const leads = (to: string) => ({ leads: to });
  const sums = { [`${release}/sha256sum-amd64.txt`]: good[`${release}/sha256sum-amd64.txt`] as string };

  test("takes the binary from the first mirror and its checksum from another", () => {
    const { status, k3s, rest, asked } = download({ "a.example": good, "b.example": good });
    assert.deepEqual({ status, k3s, rest }, { status: 0, k3s: GOOD, rest: [] });
    assert.deepEqual(asked.trim().split("\n"), [
      `${B}/${release}/sha256sum-amd64.txt`,
      `${A}/${release}/k3s`,
    ]);
  });

  const passed: [
    name: string,
    hosts: Parameters<typeof download>[0],
    options?: Parameters<typeof download>[1],
  ][] = [
    ["tries the next mirror if one does not have the release", { "a.example": sums, "b.example": good }],
    [
      "supports mirrors that name a release with - for +",
      {
        "a.example": { "v1.17.6-k3s1/k3s": GOOD },
        "b.example": { "v1.17.6-k3s1/sha256sum-amd64.txt": `${hash(GOOD)}  k3s\n` },
      },
    ],
    [
      "needs no second mirror if K3S_SHA256 is set",
      { "a.example": { [`${release}/k3s`]: GOOD } },
      { mirrors: A, sha256: hash(GOOD) },
    ],
    [
      "resumes an earlier one that was interrupted",
      { "a.example": good, "b.example": good },
      { part: GOOD.slice(0, 20) },
    ],
    [
      "restarts if the file that an earlier one left is not a part of the binary",
      { "a.example": good, "b.example": good },
      { part: "rubbish" },
    ],
    [
      "restarts if the mirror cannot resume",
      { "a.example": { ...good, [`${release}/k3s.whole`]: "" }, "b.example": sums },
      { part: GOOD.slice(0, 20) },
    ],
    ["contacts no mirror for a binary that was downloaded ahead", {}, { part: GOOD, ahead: hash(GOOD) }],
    [
      "contacts no mirror for a binary that was downloaded ahead with the same K3S_SHA256",
      {},
      { part: GOOD, ahead: hash(GOOD), sha256: hash(GOOD), by: hash(GOOD) },
    ],
    [
      "does not use, and deletes, a binary that was verified with another K3S_SHA256",
      { "a.example": good },
      { part: FORGED, ahead: hash(FORGED), sha256: hash(GOOD), by: hash(FORGED), mirrors: A },
    ],
    [
      "does not use a binary that was verified with the mirrors' checksum if K3S_SHA256 differs",
      { "a.example": good },
      { part: FORGED, ahead: hash(FORGED), sha256: hash(GOOD), mirrors: A },
    ],
    [
      "does not use a binary that was verified with a K3S_SHA256 that is no longer set",
      { "a.example": good, "b.example": good },
      { part: FORGED, ahead: hash(FORGED), by: hash(FORGED) },
    ],
    [
      "restarts if a binary that was downloaded ahead is corrupt",
      { "a.example": good, "b.example": good },
      { part: "rubbish", ahead: hash(GOOD) },
    ],
    [
      "resumes at the next mirror if one is interrupted",
      {
        "a.example": { ...good, [`${release}/k3s`]: GOOD.slice(0, 30), [`${release}/k3s.cut`]: "" },
        "b.example": good,
      },
    ],
    [
      "tries the next mirror if one sends a wrong file",
      { "a.example": { ...good, [`${release}/k3s`]: "<html>" }, "b.example": good },
    ],
    [
      "takes the checksum from a third host if the first mirror redirects to the second",
      { "a.example": leads("https://b.example"), "b.example": good, "c.example": sums },
      { mirrors: `${A} ${B} ${C}` },
    ],
    [
      "accepts a checksum from the second mirror if both redirect to different hosts",
      {
        "a.example": leads("https://c.example"),
        "b.example": leads("https://d.example"),
        "c.example": good,
        "d.example": good,
      },
    ],
  ];
  for (const [name, hosts, options] of passed)
    test(name, () => {
      const { status, k3s, rest, stdout } = download(hosts, options);
      assert.deepEqual({ status, k3s, rest }, { status: 0, k3s: GOOD, rest: [] }, stdout);
    });

  const failed: [
    name: string,
    hosts: Parameters<typeof download>[0],
    options: Parameters<typeof download>[1],
    said: RegExp,
  ][] = [
    ["no mirror answers", {}, {}, /No mirror gave a good binary/],
    [
      "the checksum is only available from the same host",
      { "a.example": good },
      { mirrors: `${A} ${A}/more` },
      /no other host gave its checksum.*K3S_SHA256/,
    ],
    ...["https://c.example", "https://C.example.:8443", "http://u@c.example:1"].map(
      (to): (typeof failed)[number] => [
        `two mirrors redirect to one host, ${to}`,
        { "a.example": leads("https://c.example"), "b.example": leads(to), "c.example": good },
        {},
        /a\.example\/releases leads to c\.example, and no other host gave its checksum.*K3S_SHA256/,
      ],
    ),
    [
      "a mirror interrupts its download and provides a checksum for its own part",
      {
        "a.example": {
          [`${release}/k3s`]: FORGED.slice(0, -1),
          [`${release}/k3s.cut`]: "",
          [`${release}/sha256sum-amd64.txt`]: `${hash(FORGED)}  k3s\n`,
        },
        "b.example": { ...sums, [`${release}/k3s`]: `${GOOD}${"\n".repeat(FORGED.length - GOOD.length)}` },
      },
      {},
      /b\.example.*: sha256 is/,
    ],
    [
      "the binary is corrupt",
      { "a.example": { ...good, [`${release}/k3s`]: "rubbish" }, "b.example": sums },
      {},
      new RegExp(`sha256 is ${hash("rubbish")}, expected ${hash(GOOD)}`),
    ],
    [
      "the binary does not match K3S_SHA256",
      { "a.example": good, "b.example": good },
      { sha256: HASH },
      new RegExp(`sha256 is ${hash(GOOD)}, expected ${HASH}`),
    ],
    [
      "the binary is of another version",
      { "a.example": { [`${release}/k3s`]: GOOD.replace(OLD, MODERN) }, "b.example": {} },
      { sha256: hash(GOOD.replace(OLD, MODERN)) },
      /the new binary says: k3s version v1\.36/,
    ],
    [
      "the binary does not run here",
      { "a.example": { [`${release}/k3s`]: "#!/bin/sh\nexit 1\n" }, "b.example": {} },
      { sha256: hash("#!/bin/sh\nexit 1\n") },
      /does not run here/,
    ],
  ];
  for (const [name, hosts, options, said] of failed)
    test(`keeps the old binary, and prints the reason, if ${name}`, () => {
      const { status, k3s, stdout } = download(hosts, options);
      assert.notEqual(status, 0);
      assert.equal(k3s, "the old one");
      assert.match(stdout, said);
    });
});
