/** When the certificates of a box's k3s end. They last a year, a CA ten, and k3s renews them only when it starts. */
import { X509Certificate } from "node:crypto";
import { sh } from "../sh.ts";
import { type Facts, prints } from "../step.ts";
import type { Generation } from "./unit.ts";

const DATA = "/var/lib/rancher/k3s";

/** The certificate of 6443, with its key: a copy of the secret k3s-serving. */
export const DYNAMIC = `${DATA}/server/tls/dynamic-cert.json`;

/**
 * Those that k3s uses, both generations (pkg/daemons/control/deps, pkg/agent/config). Others may be left over from an
 * earlier release, and are never renewed: client-cloud-controller, and on a server client-kube-proxy.
 */
export const CERTIFICATE_FILES = [
  ...["client-ca", "server-ca", "request-header-ca"],
  ...["client-admin", "client-auth-proxy", "client-controller", "client-k3s-cloud-controller"],
  ...["client-kube-apiserver", "client-scheduler", "client-supervisor", "serving-kube-apiserver"],
]
  .map((name) => `server/tls/${name}.crt`)
  .concat(
    ["client-kubelet", "serving-kubelet", "client-kube-proxy", "client-k3s-controller"].map(
      (name) => `agent/${name}.crt`,
    ),
  );

/** The first certificate of each file, as base64 on a line: a box may have no openssl. */
export const certificatesLook = prints("certificates")(sh`certificates() (
  cd ${DATA} 2>/dev/null || return
  set --
  for f in ${CERTIFICATE_FILES}; do [ ! -s "$f" ] || set -- "$@" "$f"; done
  [ $# = 0 ] || awk '
    FNR == 1 { n = 0 }
    /^-----BEGIN/ { n++ }
    n == 1 && /^-----BEGIN/ { printf "%s ", FILENAME }
    n == 1 && !/^-----/ { printf "%s", $0 }
    n == 1 && /^-----END/ { print ""; n++ }' "$@"
  sed -n 's/.*"tls\.crt": *"\([A-Za-z0-9+/=]*\)".*/dynamic-cert.json \1/p' ${DYNAMIC} 2>/dev/null
)
fact certificates; certificates`);

export interface Certificate {
  /** Below /var/lib/rancher/k3s; dynamic-cert.json: that of 6443. */
  file: string;
  /** In seconds since 1970. */
  ends: number;
}

/** The certificates in the fact, without the CAs; and those. */
export function certificatesIn(facts: Facts<"certificates">): { own: Certificate[]; cas: Certificate[] } {
  const all = (facts.certificates ?? "").split("\n").flatMap((row) => {
    const [file = "", text = ""] = row.trim().split(" ");
    const ends = endOf(file.endsWith(".json") ? text : pem(text));
    return ends ? [{ file, ends }] : [];
  });
  const isCa = ({ file }: Certificate) => file.endsWith("-ca.crt");
  return { own: all.filter((one) => !isCa(one)), cas: all.filter(isCa) };
}

const pem = (text: string) =>
  Buffer.from(`-----BEGIN CERTIFICATE-----\n${text}\n-----END CERTIFICATE-----\n`).toString("base64");

/** By text: all boxes have the same CAs, and each part of a diagnosis asks anew. */
const known = new Map<string, number | undefined>();

/** The end of the first certificate in base64 of PEM, in seconds since 1970; undefined for anything else. */
export function endOf(text: string): number | undefined {
  if (known.has(text)) return known.get(text);
  let ends: number | undefined;
  try {
    ends = Date.parse(new X509Certificate(Buffer.from(text, "base64")).validTo) / 1000 || undefined;
  } catch {}
  known.set(text, ends);
  return ends;
}

/** Days before the end from which check reports a problem, and from which it notes it and `make certs` renews. */
export const PRESSING = 30;
export const DUE = 90;

/** Days before the end from which k3s renews at a start: dynamiclistener v0.2 has 90, modern k3s 120. */
export const renewsFrom = (generation: Generation | undefined): number => (generation === "old" ? 90 : 120);

export const daysTo = (ends: number, now: number): number => (ends - now) / 86_400;

/** Those that end within so many days. */
export const endingIn = (days: number, list: readonly Certificate[], now: number): Certificate[] =>
  list.filter(({ ends }) => daysTo(ends, now) <= days);

/** The one that ends first. */
export const firstOf = (list: readonly Certificate[]): Certificate | undefined =>
  [...list].sort((a, b) => a.ends - b.ends)[0];

export const dateOf = (seconds: number): string => new Date(seconds * 1000).toISOString().slice(0, 10);

/** `end on 2027-01-31, in 20 days`, or `ended on …`; with `s`, of one thing. */
export function ending(ends: number, now: number, s = ""): string {
  const days = Math.floor(daysTo(ends, now));
  if (days < 0) return `ended on ${dateOf(ends)}`;
  return `end${s} on ${dateOf(ends)}, in ${days} day${days === 1 ? "" : "s"}`;
}
