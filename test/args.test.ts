import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { lastOf, parseArgs, secretIn } from "../lib/args.ts";
import { configArgs } from "../lib/k3s/args.ts";
import { refusedIn } from "../lib/table.ts";
import { fixture } from "./helpers.ts";

describe("arguments", () => {
  const cases: [args: string, [flag: string, value: string | undefined][]][] = [
    ["", []],
    [
      "--a=1 --b 2 -c 3 -d=4",
      [
        ["a", "1"],
        ["b", "2"],
        ["c", "3"],
        ["d", "4"],
      ],
    ],
    [
      "--a\t1  \t--b=",
      [
        ["a", "1"],
        ["b", ""],
      ],
    ],
    [
      "--a --b --c",
      [
        ["a", undefined],
        ["b", undefined],
        ["c", undefined],
      ],
    ],
    [
      "--kubelet-arg --a=1 --b",
      [
        ["kubelet-arg", "--a=1"],
        ["a", "1"],
        ["b", undefined],
      ],
    ],
    ["--a=b=c,d=e", [["a", "b=c,d=e"]]],
    ["stray --a x stray", [["a", "x"]]],
  ];
  for (const [args, list] of cases)
    test(`are split as k3s splits them: ${JSON.stringify(args)}`, () =>
      assert.deepEqual(
        parseArgs(args).map(({ flag, value }) => [flag, value]),
        list,
      ));

  test("that are repeated have the value of the last one, under their long or short name", () => {
    const args = parseArgs("--node-name=a -d /x --data-dir /y --node-name b");
    assert.equal(lastOf(args, "node-name"), "b");
    assert.equal(lastOf(args, "data-dir", "d"), "/y");
    assert.equal(lastOf(args, "token"), undefined);
  });

  test("that contain a secret are recognized in every notation", () => {
    for (const args of [
      "--token=x",
      "--token x",
      "--token\tx",
      "-token x",
      "-t\tx",
      "--x y --t=z",
      "--Token=x",
      "--agent-token x",
      "--agent_token=x",
      "--cluster-secret=x",
      "--datastore-endpoint=mysql://u@h/k",
      "--vpn-auth=name=tailscale,joinKey=tskey-x",
      "--kubelet-arg=x=name=tailscale,joinKey=tskey-x",
      "--etcd-s3-access-key=A",
      "--etcd-s3-secret-key\tB",
      "--etcd-s3-session-token=C",
      "--etcd-s3-proxy=http://u:p@h:1",
      "--kube-apiserver-arg=etcd-servers=https://u:p@h",
      "--kubelet-arg=x=postgres://db/k3s?password=x",
      `--node-label=a=K10${"a".repeat(64)}::server:x`,
    ])
      assert.ok(secretIn(parseArgs(args)), args);
  });

  test("that name a file with a secret, or contain none, are not treated as secrets", () => {
    for (const args of [
      "--token-file=/root/token --agent-token-file x --vpn-auth-file=/x --datastore-keyfile=/x",
      "--secrets-encryption --etcd-s3-config-secret=name --private-registry=/x",
      "--kubelet-arg=anonymous-auth=false --kube-apiserver-arg=enable-bootstrap-token-auth=true",
      "--tls-san=t --node-label=token=no",
      "--kube-apiserver-arg=oidc-issuer-url=https://id.example.org/x",
    ])
      assert.equal(secretIn(parseArgs(args)), undefined, args);
  });
});

describe("k3s's config file", () => {
  for (const [name, text] of Object.entries({
    "a block mapping": "debug: true\ntoken: x",
    "a flow mapping": "{debug: true, token: x}",
    "a flow mapping of several lines": "{\n  debug: true,\n  token:\n    x\n}",
    "a quoted key": "'token': x",
    "a quoted key with escapes": '"\\x74oken": x',
    "an explicit key": "? token\n: x",
    "a key with a tag": "!!str token: x",
    "a key with an anchor": "&a token: x",
    "a merge key": "a: &a {token: x}\n<<: *a",
    "merge keys in a list": "<<: [{token: x}, {b: y}]",
    "a key with a plus sign": "token+: x",
    "a key with a list": "token:\n- x",
    "a file with a byte order mark": "\ufefftoken: x",
    "a file with a directive": "%YAML 1.1\n---\ntoken: x",
  }))
    test(`is parsed as YAML, and the key is found in ${name}`, () =>
      assert.equal(lastOf(configArgs(text), "token"), "x"));

  test("becomes a flag for each value of a list, and for each value that is not a string", () =>
    assert.deepEqual(configArgs("kubelet-arg: [a=b, c=d]\ndebug: yes\np:\nq: {r: 1}"), [
      { flag: "kubelet-arg", value: "a=b" },
      { flag: "kubelet-arg", value: "c=d" },
      { flag: "debug", value: "true" },
      { flag: "p", value: "" },
      { flag: "q", value: '{"r":1}' },
    ]));

  test("has no keys in comments, multi-line strings and nested mappings", () => {
    assert.deepEqual(configArgs("# token: x\n"), []);
    assert.deepEqual(configArgs(""), []);
    assert.deepEqual(
      configArgs("p: |\n  token: x\nq:\n  token: x").map(({ flag }) => flag),
      ["p", "q"],
    );
  });

  for (const [name, text, right] of [
    ["several documents", "a: 1\n---\ntoken: x", /several documents/],
    ["a list", "- token: x", /no mapping/],
    ["a plain string", "token", /no mapping/],
    ["a mapping with a duplicate key", "a: 1\na: 2", /unique at line 2/],
    ["an incomplete flow mapping", "{token: x", /line 1/],
    ["an alias without an anchor", "a: *x", /alias/],
    [
      "a chain of aliases that expands too far",
      `a: &a [x,x,x,x,x,x,x,x,x]\n${"bcdefgh".replace(/./g, (c) => `${c}: &${c} [${`*${String.fromCharCode(c.charCodeAt(0) - 1)},`.repeat(9)}]\n`)}`,
      /alias/,
    ],
  ] as const)
    test(`is refused with an error of one line if it is ${name}`, () =>
      assert.throws(
        () => configArgs(text),
        (error: Error) => right.test(error.message) && !error.message.includes("\n"),
      ));
});

describe("flags that this project sets or depends on", () => {
  const refused: [args: string, why: RegExp][] = [
    ["--flannel-external-ip=false", /WireGuard/],
    ["--help", /print that, and end/],
    ["-h", /print that/],
    ["--version", /print that/],
    ["--data-dir=false", /\/var\/lib\/rancher\/k3s/],
    ["--node-ip=false", /PUBLIC_IP/],
    ["--data-dir=/data", /looked for in \/var\/lib\/rancher\/k3s, which may be a link or a mount/],
    ["-d /data", /\/var\/lib\/rancher\/k3s/],
    ["--https-listen-port=443", /at its own ports/],
    ["--https-listen-port 443", /at its own ports/],
    ["--bind-address=192.0.2.1", /of every address/],
    ["--advertise-port=1 --x", /ports/],
    ["--supervisor-port=9345", /ports/],
    ["--write-kubeconfig /root/config", /make kubeconfig/],
    ["-o=/root/config", /make kubeconfig/],
    ["--flannel-backend=vxlan", /WireGuard/],
    ["--flannel-backend=none", /WireGuard/],
    ["--no-flannel", /WireGuard/],
    ["--flannel-conf=/x", /WireGuard/],
    ["--vpn-auth-file=/x", /WireGuard/],
    ["--node-ip=10.0.0.1", /PUBLIC_IP/],
    ["-i\t10.0.0.1", /PUBLIC_IP/],
    ["--node-external-ip=1.2.3.4", /PUBLIC_IP/],
    ["--advertise-address=10.0.0.1", /PUBLIC_IP/],
    ["--kubelet-arg=node-ip=10.0.0.1", /PUBLIC_IP/],
    ["--with-node-id", /--node-name/],
    ["--with-node-id=true", /--node-name/],
    ["--kubelet-arg=hostname-override=x", /--node-name/],
    ["--kubelet-arg=root-dir=/data", /\/var\/lib\/kubelet/],
    ["--kubelet-arg=port=1", /ports/],
    ["--kube-apiserver-arg=secure-port=443", /ports/],
    ["--agent-token=x", /K3S_TOKEN/],
    ["--vpn-auth=x", /WireGuard/],
    ["--kube-proxy-arg=proxy-mode=ipvs", /PROXY_MODE/],
    ["--config=/x", /K3S_CONFIG/],
    ["-c /x", /K3S_CONFIG/],
    ["--private-registry=/x", /REGISTRY_MIRRORS/],
    ["--docker", /containerd/],
    ["--container-runtime-endpoint=/run/x.sock", /containerd/],
    ["--rootless", /root/],
    ["--log=/x", /journal/],
    ["-l /x", /journal/],
    ["--disable-agent", /a whole one here, and a node/],
    ["--disable-cloud-controller", /a whole one/],
    ["--agent-token-file=/x", /K3S_TOKEN/],
    ["--service-node-port-range=30000-60000", /own ports are not for services: 6443, 10250, 51820, 51821/],
    ["--service-node-port-range 1-65535", /own ports/],
    ["--service-node-port-range=51820", /own ports/],
    ["--service-node-port-range=51821-51900", /own ports/],
    ["--service-node-port-range=10000+250", /own ports/],
    ["--service-node-port-range=6000-6443", /own ports/],
    ["--kube-apiserver-arg=service-node-port-range=1-2", /--service-node-port-range has it/],
    ["--kube-apiserver-arg=service-cluster-ip-range=10.9.0.0/16", /--service-cidr/],
    ["--kube-controller-manager-arg=cluster-cidr=10.9.0.0/16", /--cluster-cidr/],
    ["--kube-proxy-arg cluster-cidr=10.9.0.0/16", /--cluster-cidr/],
    ["--lb-server-port=6443", /its own is 6444/],
    ["--lb-server-port 10250", /its own is 6444/],
    ["--kube-proxy-arg=config=/root/proxy.yaml", /give each of it/],
  ];
  for (const [args, why] of refused)
    test(`are refused with an explanation: ${JSON.stringify(args)}`, () =>
      assert.match(refusedIn("server", parseArgs(args))?.[1] ?? "", why));

  test("are accepted if their value is false", () =>
    assert.equal(
      refusedIn("server", parseArgs("--disable-agent=false --docker=false --with-node-id=false")),
      undefined,
    ));

  test("are the only ones that are refused", () => {
    const server =
      "--disable=traefik --tls-san=x --node-name=a --cluster-cidr=10.1.0.0/16 --service-cidr=10.2.0.0/16 --cluster-domain=k.local --kubelet-arg=max-pods=50 --kubelet-arg=fail-cgroupv1=false --kube-proxy-arg=metrics-bind-address=0.0.0.0 --write-kubeconfig-mode=640 --snapshotter=native --egress-selector-mode=pod --disable-network-policy --flannel-iface=eth1 --selinux --debug -v=4 --prefer-bundled-bin --resolv-conf=/x --secrets-encryption --token-file=/root/token --node-label=a=b --alsologtostderr --vmodule=a=1 --service-node-port-range=30000-32767 --service-node-port-range=51822+100 --lb-server-port=6444 --kube-scheduler-arg=config=/x --kubelet-arg=config=/root/kubelet.yaml --kubelet-arg=config-dir=/root";
    assert.equal(refusedIn("server", parseArgs(server)), undefined);
    const agent =
      "--node-name=a --kubelet-arg=max-pods=50 --snapshotter=native --selinux --debug --lb-server-port=6446";
    assert.equal(refusedIn("agent", parseArgs(agent)), undefined);
  });

  test("are refused on agents together with the flags that k3s's help lists only for servers", () => {
    const flags = (command: string) =>
      ["v1.17.6", "v1.36.3"].flatMap((version) =>
        [...fixture(`k3s-${command}-help-${version}.txt`).matchAll(/^ {3}-.*?(?: {2}|$)/gm)].flatMap(
          ([line]) =>
            [...line.replace(/\[.*/, "").matchAll(/(?:^| )--?([\w-]+)/g)].map(([, name]) => name as string),
        ),
      );
    const agents = new Set(flags("agent"));
    assert.ok(agents.size > 40 && agents.has("node-ip") && agents.has("i"), [...agents].join());
    const only = flags("server").filter((flag) => !agents.has(flag));
    assert.ok(only.length > 60 && only.includes("write-kubeconfig-mode"), only.join());
    for (const flag of only) assert.ok(refusedIn("agent", [{ flag, value: "x" }]), flag);
    for (const flag of agents)
      assert.doesNotMatch(refusedIn("agent", [{ flag, value: "x" }])?.[1] ?? "", /only servers/, flag);
  });
});
