import assert from "node:assert/strict";
import { createHash, generateKeyPairSync } from "node:crypto";
import { lstatSync, readdirSync, readFileSync, statSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { SettingError } from "../lib/settings.ts";
import { Failure } from "../lib/step.ts";
import { yamlIn } from "../lib/yaml.ts";
import { accessOf, merge, withAccess } from "../scripts/cluster/kubeconfig.ts";
import { fixture, IP, temporary } from "./helpers.ts";

/** /etc/rancher/k3s/k3s.yaml in the form of k3s v1.36.3, with keys made for this. */
const MODERN_YAML = fixture("k3s-yaml-v1.36.3.yaml");
const dataOf = (name: string) => new RegExp(`${name}: (\\S+)`).exec(MODERN_YAML)?.[1] as string;
const [CA, CERT, KEY] = ["certificate-authority-data", "client-certificate-data", "client-key-data"].map(
  dataOf,
) as [string, string, string];
const TOKEN = `K10${createHash("sha256").update(Buffer.from(CA, "base64")).digest("hex")}::server:x`;
const coded = (text: string) => Buffer.from(text).toString("base64");
const pem = (data: string) => Buffer.from(data, "base64").toString();
/** As v1.17.6 writes it. */
const OLD_YAML = MODERN_YAML.replace("users:", "preferences: {}\nusers:").replace(
  /client-cert[\s\S]*/,
  "password: 0123456789abcdef\n    username: admin\n",
);
const ACCESS = accessOf(MODERN_YAML, IP, TOKEN);
const NAME = `k3s-${IP}`;
const OURS = [
  `- cluster:\n    certificate-authority-data: ${CA}\n    server: https://${IP}:6443\n  name: ${NAME}\n`,
  `- context:\n    cluster: ${NAME}\n    user: ${NAME}\n  name: ${NAME}\n`,
  `- name: ${NAME}\n  user:\n    client-certificate-data: ${CERT}\n    client-key-data: ${KEY}\n`,
] as const;

/** A user's own: comments, odd names, an exec plugin, a block scalar whose text looks like entries. */
const OWN = `# my clusters
apiVersion: v1
clusters:
- cluster:
    server: https://work.example.com   # by VPN
  name: work
- name: "home"
  cluster:
    insecure-skip-tls-verify: true
    server: https://10.0.0.9:6443
contexts:
- context: {cluster: work, user: 'me', namespace: x}
  name: work
current-context: work
kind: Config
preferences: {}

users:
# signs in by browser
- name: me
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1
      args:
      - --audience=a
      command: login
      installHint: |
        users:
        - name: not-one
          name: twice
`;

describe("the content of k3s.yaml", () => {
  test("becomes the cluster at its public address, with a certificate on modern k3s", () => {
    assert.deepEqual(ACCESS, {
      name: NAME,
      cluster: { "certificate-authority-data": CA, server: `https://${IP}:6443` },
      user: { "client-certificate-data": CERT, "client-key-data": KEY },
    });
  });

  test("becomes a password on v1.17.6, and keeps another port", () => {
    const access = accessOf(OLD_YAML.replace(":6443", ":7443"), IP, TOKEN);
    assert.deepEqual(access.user, { username: "admin", password: "0123456789abcdef" });
    assert.equal(access.cluster.server, `https://${IP}:7443`);
  });

  test("keeps a password of digits as a string, which YAML would read as a number", () => {
    const access = accessOf(OLD_YAML.replace("0123456789abcdef", '"01234567890"'), IP, "");
    assert.deepEqual(access.user, { username: "admin", password: "01234567890" });
    assert.match(withAccess("", access, false), /^ {4}password: "01234567890"$/m);
  });

  const other = generateKeyPairSync("ec", { namedCurve: "P-256" })
    .privateKey.export({ type: "sec1", format: "pem" })
    .toString();
  for (const [name, text] of Object.entries({
    "is empty": "",
    "is not YAML": "<html>",
    "has no https address of the server": MODERN_YAML.replace("https://127.0.0.1:6443", "unix:/x"),
    "has a server over http": MODERN_YAML.replace("https:", "http:"),
    "has a user without a key": MODERN_YAML.replace(/ +client-key-data.*\n/, ""),
    "has a value that is not base64": MODERN_YAML.replace(CA, '"a b"'),
    ...Object.fromEntries(
      [CA, CERT, KEY].flatMap((data) =>
        [
          "abc",
          "true",
          "-",
          "null",
          "",
          `[${data}]`,
          `!!binary ${data}`,
          `*a`,
          `${data}=`,
          coded("x"),
          coded(pem(data).slice(0, 99)),
          coded(`${pem(data)}x`),
        ].map((bad) => [
          `has ${bad.slice(0, 20)}… of ${bad.length} in place of ${data.slice(70, 80)}`,
          MODERN_YAML.replace(data, bad),
        ]),
      ),
    ),
    "has an invalid certificate": MODERN_YAML.replace(
      CERT,
      coded("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    ),
    "has an invalid certificate after the CA": MODERN_YAML.replace(
      CA,
      coded(`${pem(CA)}-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n`),
    ),
    "has an invalid key": MODERN_YAML.replace(
      KEY,
      coded("-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n"),
    ),
    "has a key of another certificate": MODERN_YAML.replace(KEY, coded(other)),
    "has a key in place of a certificate": MODERN_YAML.replace(CERT, KEY),
    "has a duplicate key": `${MODERN_YAML}    client-key-data: ${KEY}\n`,
    "has a duplicate key in quotes": `${MODERN_YAML}    "client-key-data": x\n`,
    "has a duplicate server": MODERN_YAML.replace(
      "    server:",
      "    server: https://203.0.113.66:6443\n    server:",
    ),
    "is far too long": `${MODERN_YAML}${"# x\n".repeat(100_000)}`,
    "has a password that contains YAML": OLD_YAML.replace("0123456789abcdef", "'x'\nusers: []"),
  }))
    test(`is refused if it ${name}`, () =>
      assert.throws(
        () => accessOf(text, IP, ""),
        (error) => error instanceof Failure && /not as k3s writes it/.test(error.message),
      ));

  test("is refused if its CA is not the one in the token", () => {
    const token = TOKEN.replace(/^K10./, (head) => `K10${head.endsWith("0") ? "1" : "0"}`);
    assert.throws(() => accessOf(MODERN_YAML, IP, token), /not the one that K3S_TOKEN names/);
    assert.deepEqual(accessOf(MODERN_YAML, IP, ""), ACCESS, "no token is known here");
  });

  test("contributes nothing else that the box has added, such as a program to run, another user or another cluster", () => {
    const more = `${MODERN_YAML}    exec:\n      command: canary\n- name: other\n  user: &a {token: x}\nextra: *a\n`;
    assert.deepEqual(accessOf(more, IP, TOKEN), ACCESS);
    assert.doesNotMatch(withAccess("", accessOf(more, IP, TOKEN), true), /canary|other|exec|extra/);
  });
});

describe("a user's own entry", () => {
  const own = withAccess("", ACCESS, true);
  for (const [name, text] of Object.entries({
    "a cluster at another address": own.replace(
      `server: https://${IP}:`,
      "server: https://work.example.com:",
    ),
    "a context of another cluster": own.replace(`cluster: ${NAME}`, "cluster: work"),
    "a user without a cluster": own.replace(/- cluster:[\s\S]*?name: .*\n/, ""),
    "a cluster in flow style": own.replace(/- cluster:\n.*\n.*\n/, "- cluster: {server: https://x}\n"),
  }))
    test(`with this cluster's name is not overwritten: ${name}`, () =>
      assert.throws(
        () => withAccess(text, ACCESS, false),
        (error) =>
          error instanceof SettingError && error.message.includes(`has a ${NAME} that is not this cluster`),
      ));
});

describe("a kubeconfig", () => {
  test("that does not exist yet is created with this cluster, without a current context", () => {
    const text = `apiVersion: v1\nkind: Config\npreferences: {}\ncurrent-context: ""\nclusters:\n${OURS[0]}contexts:\n${OURS[1]}users:\n${OURS[2]}`;
    assert.equal(withAccess("", ACCESS, false), text);
    assert.equal(withAccess("", ACCESS, true), text.replace('""', NAME));
  });

  test("of the user keeps every byte, and gets three entries at the ends of its lists", () => {
    const text = withAccess(OWN, ACCESS, false);
    let rest = text;
    for (const entry of OURS) {
      assert.equal(rest.split(entry).length, 2, entry);
      rest = rest.replace(entry, "");
    }
    assert.equal(rest, OWN);
    assert.ok(text.includes(`server: https://10.0.0.9:6443\n${OURS[0]}contexts:`));
    assert.ok(text.includes(`  name: work\n${OURS[1]}current-context: work`));
    assert.ok(text.endsWith(`name: twice\n${OURS[2]}`));
  });

  test("gets a new current context only with --use, which changes nothing else", () => {
    const [before, after] = [withAccess(OWN, ACCESS, false), withAccess(OWN, ACCESS, true)];
    assert.match(before, /^current-context: work$/m);
    assert.equal(after, before.replace("current-context: work", `current-context: ${NAME}`));
    const without = OWN.replace("current-context: work\n", "");
    assert.match(withAccess(without, ACCESS, true), new RegExp(`^current-context: ${NAME}$`, "m"));
  });

  test("may have comments after its names", () => {
    const own = OWN.replace("  name: work\n", "  name: work # my own\n");
    assert.notEqual(own, OWN);
    assert.ok(withAccess(own, ACCESS, false).includes("  name: work # my own\n"));
  });

  test("is not changed by a second run", () => {
    for (const own of ["", OWN, MODERN_YAML, OLD_YAML]) {
      const once = withAccess(own, ACCESS, true);
      assert.equal(withAccess(once, ACCESS, true), once);
    }
  });

  test("gets new credentials in the existing entries after the server was reinstalled", () => {
    const once = withAccess(OWN, ACCESS, false);
    const anew = { ...ACCESS, user: { "client-certificate-data": "TkVX", "client-key-data": "TkVX" } };
    assert.equal(withAccess(once, anew, false), once.replace(CERT, "TkVX").replace(KEY, "TkVX"));
  });

  test("keeps what the user added to this cluster's entries", () => {
    const once = withAccess(OWN, ACCESS, false).replace(
      `    user: ${NAME}\n`,
      `    namespace: mine\n    user: ${NAME}\n`,
    );
    assert.equal(withAccess(once, ACCESS, false), once);
  });

  const shapes: Record<string, [own: string, expected: RegExp]> = {
    "with indented lists": [
      OWN.replace(
        /^clusters:\n[\s\S]*?(?=^contexts)/m,
        "clusters:\n  - cluster:\n      server: https://x\n    name: x\n",
      ),
      new RegExp(
        `^ {4}name: x\\n {2}- cluster:\\n {6}certificate-authority-data: \\S+\\n {6}server: \\S+\\n {4}name: ${NAME}\\ncontexts:`,
        "m",
      ),
    ],
    "with empty lists": [
      "apiVersion: v1\nkind: Config\nclusters: []\ncontexts: null\nusers: # none yet\n",
      /^clusters:\n- cluster:\n/m,
    ],
    "without a newline at its end": ["apiVersion: v1\nkind: Config", /^kind: Config\nclusters:\n/m],
    "that starts with a document marker": ["---\napiVersion: v1\nkind: Config\n", /^---\napiVersion: v1\n/],
  };
  for (const [name, [own, expected]] of Object.entries(shapes))
    test(`${name} gets this cluster's entries`, () => {
      const text = withAccess(own, ACCESS, false);
      assert.match(text, expected);
      assert.equal(withAccess(text, ACCESS, false), text);
    });

  const LISTED = "clusters: [{name: x, cluster: {server: https://y}}]\n";
  const flow = OWN.replace(/^clusters:\n[\s\S]*?(?=^contexts)/m, LISTED);
  const JSON_OWN = `{"apiVersion": "v1", "kind": "Config", "clusters": null, "users": [],
  "contexts": [{"name": "work", "context": {"cluster": "work"}}], "current-context": "work"}`;
  const styles: Record<string, string> = {
    "in JSON": JSON_OWN,
    "in JSON, on one line": '{"kind":"Config"}',
    "with a list in flow style": flow,
    "with a list in flow style over several lines": flow.replace("}}]", "}}, # its own\n  ]"),
    "with anchors": OWN.replace("- cluster:", "- &a cluster:").replace("kind: Config", "kind: &k Config"),
    "with aliases": OWN.replace("- name: me", "- &me\n  name: me")
      .replace("users:\n# ", "others: [*x]\nusers:\n# ")
      .replace("- cluster:", "- &x\n  cluster:"),
    "with merge keys": OWN.replace(
      "  cluster:\n    insecure",
      "  cluster:\n    <<: {tls-server-name: x}\n    insecure",
    ),
    "with tags": OWN.replace("name: me", "name: !!str me"),
    "with CRLF": OWN.replaceAll("\n", "\r\n"),
    "with a byte order mark": `\uFEFF${OWN}`,
    "with a byte order mark and CRLF": `\uFEFF${OWN.replaceAll("\n", "\r\n")}`,
    "with a name over several lines": OWN.replace("- name: me", "- name: >\n    me"),
    "with an escaped name": OWN.replace('"home"', '"ho\\u006de"'),
    "with a document end marker": `${OWN}...\n`,
    "with only comments": "# later",
    "with an empty document": "---\n",
    "indented as a whole": OWN.replaceAll(/^(?=.)/gm, "  "),
    "with an explicit key": OWN.replace("clusters:\n", "? clusters\n:\n"),
    "with a key that is a property of every object": `__proto__: {clusters: [], polluted: x}\nconstructor: x\n${OWN}`,
    "with a text that ends in blank lines": `${OWN}        more\n\n`,
  };
  const dataOf = (text: string) => yamlIn(text).data as Record<string, unknown[]> | null;
  for (const [name, own] of Object.entries(styles))
    test(`${name} gets this cluster's entries in its own style, and keeps its content and every byte`, () => {
      for (const use of [false, true]) {
        const text = withAccess(own, ACCESS, use);
        const [before, after] = [dataOf(own) ?? {}, dataOf(text) as Record<string, unknown[]>];
        for (const key of ["clusters", "contexts", "users"]) {
          const list = after[key] as { name: string }[];
          assert.deepEqual(
            list.filter((one) => one.name !== NAME),
            before[key] ?? [],
          );
          assert.equal(list.filter((one) => one.name === NAME).length, 1);
        }
        if (use) assert.equal(after["current-context"], NAME);
        const rest = ({
          clusters,
          contexts,
          users,
          "current-context": current,
          ...rest
        }: Record<string, unknown>) => rest;
        if (Object.keys(before).length) assert.deepEqual(rest(after), rest(before));
        let at = 0;
        for (const letter of use ? "" : own.replace(/\bnull\b/, ""))
          at = text.indexOf(letter, at) + 1 || assert.fail(own);
        if (own.includes("\r")) assert.doesNotMatch(text, /[^\r]\n/);
        else assert.doesNotMatch(text, /\r/);
        assert.equal(withAccess(text, ACCESS, use), text, "a second time");
        const anew = { ...ACCESS, user: { "client-certificate-data": "TkVX", "client-key-data": "TkVX" } };
        assert.equal(withAccess(text, anew, use), text.replace(CERT, "TkVX").replace(KEY, "TkVX"));
        assert.equal(({} as Record<string, unknown>).polluted, undefined);
      }
    });

  const bomb = Array.from({ length: 30 }, (_, i) => `x${i + 1}: &x${i + 1} [*x${i}, *x${i}, *x${i}]\n`).join(
    "",
  );
  const ours = withAccess(OWN, ACCESS, false);
  const bad: Record<string, string> = {
    "with an alias without an anchor": OWN.replace("user:\n    exec:", "user: *x\n    exec:"),
    "with aliases that expand exponentially": `${OWN}x0: &x0 [a, a, a]\n${bomb}`,
    "with a list that is an alias of another": OWN.replace("users:\n", "users: *x\nold:\n").replace(
      "clusters:\n",
      "clusters: &x\n",
    ),
    "whose lists come from a merge key": `x: &x\n  users:\n  - name: me\n<<: *x\n${OWN.replace("users:", "old:")}`,
    "with an alias of what would be replaced": `${ours.replace(/user: (k3s-.*)\n {2}name/, "user: &x $1\n  name").replace(CERT, `&y ${coded("old")}`)}z: [*x, *y]\n`,
    "whose brackets are not closed": OWN.replace("users:", "users: ["),
    "of only opening brackets": "[".repeat(100_000),
    "that is an empty mapping": "{}",
    "with a mapping in place of a list": OWN.replace(
      /^clusters:\n[\s\S]*?(?=^contexts)/m,
      "clusters: {name: work}\n",
    ),
    "with an empty entry": OWN.replace("users:\n", "users:\n- \n"),
    "with tabs": OWN.replace("    server: https://work", "\tserver: https://work"),
    "with the same list twice": `${OWN}users:\n- name: z\n  user: {}\n`,
    "with the same key twice in an entry": OWN.replace("    insecure", "    server: https://x\n    insecure"),
    "with two entries of the same name": OWN.replace('name: "home"', "name: work"),
    "with two entries of the same name, in two styles": OWN.replace('name: "home"', 'name: "w\\u006frk"'),
    "with an entry without a name": OWN.replace("  name: work\n- name", "- name"),
    "with two documents": `${OWN}---\nkind: Config\n`,
    "of another kind": OWN.replace("kind: Config", "kind: Pod"),
    "that is a plain string": "hello\n",
    "that ends within a block scalar, without its newline": `${OWN.replace(/users:[\s\S]*/, "")}users:\n- name: z\n  user:\n    token: |\n      abc`,
    "with a key without a value": "apiVersion: v1\nkind: Config\n? clusters\nusers: []\n",
    "with wrong indentation of a list": OWN.replace("  name: work\ncurrent", " name: work\ncurrent"),
  };
  for (const [name, own] of Object.entries(bad))
    test(`${name} is refused`, () => {
      assert.throws(
        () => withAccess(own, ACCESS, true),
        (error) => error instanceof SettingError && !error.message.includes("\n"),
      );
    });
});

describe("a kubeconfig's file", () => {
  const file = (text?: string, mode = 0o644) => {
    const path = join(temporary(), "config");
    if (text !== undefined) writeFileSync(path, text, { mode });
    return path;
  };
  const modeOf = (path: string) => (statSync(path).mode & 0o777).toString(8);

  test("is created with its folder, with mode 0600", () => {
    const path = join(temporary(), "new/.kube/config");
    assert.equal(merge(path, ACCESS, false), true);
    assert.equal(modeOf(path), "600");
    assert.deepEqual(readdirSync(join(path, "..")), ["config"]);
  });

  test("is copied before the first change, and only then", () => {
    const path = file(OWN);
    const backup = `${path}.before-k3s-across-clouds`;
    assert.equal(merge(path, ACCESS, false), true);
    assert.equal(readFileSync(backup, "utf8"), OWN);
    assert.deepEqual([modeOf(path), modeOf(backup)], ["600", "600"]);
    assert.equal(merge(path, ACCESS, false), false);
    assert.equal(merge(path, ACCESS, true), true);
    assert.equal(readFileSync(backup, "utf8"), OWN);
    assert.deepEqual(readdirSync(join(path, "..")).sort(), ["config", "config.before-k3s-across-clouds"]);
  });

  test("may be a symlink, which is kept", () => {
    const path = file(OWN);
    const link = join(temporary(), "link");
    symlinkSync(path, link);
    merge(link, ACCESS, false);
    assert.ok(lstatSync(link).isSymbolicLink());
    assert.match(readFileSync(path, "utf8"), new RegExp(NAME));
  });

  const refused: Record<string, (path: string) => void> = {
    "is locked by kubectl": (path) => writeFileSync(`${path}.lock`, ""),
    "cannot be edited": (path) => writeFileSync(path, "{}"),
    "is not UTF-8": (path) => writeFileSync(path, Buffer.from([0x61, 0x3a, 0x20, 0xff, 0x0a])),
  };
  for (const [name, spoil] of Object.entries(refused))
    test(`is refused, and not changed, if it ${name}`, () => {
      const path = file(OWN);
      spoil(path);
      const before = readFileSync(path);
      const files = readdirSync(join(path, ".."));
      assert.throws(
        () => merge(path, ACCESS, true),
        (error) => error instanceof SettingError && error.message.startsWith(path),
      );
      assert.deepEqual(readFileSync(path), before);
      assert.deepEqual(readdirSync(join(path, "..")), files);
    });

  test("is refused if its folder cannot be written", () => {
    const folder = join(temporary(), "file");
    writeFileSync(folder, "");
    assert.throws(() => merge(join(folder, "config"), ACCESS, false), SettingError);
  });
});
