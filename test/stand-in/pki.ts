/** Certificates as k3s makes them: P-256, a CA for servers and one for clients. Signed by the openssl command. */
import { generateKeyPairSync, X509Certificate } from "node:crypto";
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Generation, run } from "./common.ts";

export type Subject = {
  cn: string;
  o?: string;
  dns?: string[];
  ips?: string[];
  usage: "serverAuth" | "clientAuth";
};
export type Ca = { crt: string; key: string };

const HOUR = 3600_000,
  DAY = 24 * HOUR;

/** Days that a certificate lasts, in place of 365: a file on the box that signs it, for time that would have to pass. */
export const LASTS = "/run/stand-in-certificate-days";

function days(): number {
  try {
    return Number(readFileSync(LASTS, "utf8"));
  } catch {
    return 365;
  }
}

/**
 * Is it kept at a start? v1.17 renews from 90 days before the end, modern k3s from 120 (createClientCertKey); both when
 * another CA has signed it.
 */
export function lasts(gen: Generation, pem: string, ca: Ca): boolean {
  const certificate = new X509Certificate(pem);
  const left = Date.parse(certificate.validTo) - Date.now();
  return left > (gen === "old" ? 90 : 120) * DAY && signedBy(pem, ca);
}

export const signedBy = (pem: string, ca: Ca): boolean =>
  new X509Certificate(pem).verify(new X509Certificate(readFileSync(ca.crt)).publicKey);

export function newKey(path: string): void {
  const { privateKey } = generateKeyPairSync("ec", {
    namedCurve: "P-256",
    privateKeyEncoding: { type: "sec1", format: "pem" },
    publicKeyEncoding: { type: "spki", format: "pem" },
  });
  writeFileSync(path, privateKey, { mode: 0o600 });
}

const stamp = (time: number): string => new Date(time).toISOString().replace(/[-:T]|\.\d+/g, "");

function issue(
  dir: string,
  key: string,
  ca: Ca | undefined,
  subject: string,
  extensions: string,
  from: number,
  to: number,
): string {
  writeFileSync(
    join(dir, "cnf"),
    `[ca]
default_ca=d
[d]
database=${dir}/db
new_certs_dir=${dir}
rand_serial=yes
default_md=sha256
policy=p
x509_extensions=e
unique_subject=no
[p]
organizationName=optional
commonName=supplied
[req]
distinguished_name=n
[n]
[e]
${extensions}
`,
  );
  writeFileSync(join(dir, "db"), "");
  const cnf = join(dir, "cnf"),
    csr = join(dir, "csr"),
    out = join(dir, "crt");
  run("openssl", "req", "-new", "-config", cnf, "-key", key, "-subj", subject, "-out", csr);
  run(
    "openssl",
    "ca",
    "-batch",
    "-notext",
    "-config",
    cnf,
    "-in",
    csr,
    "-out",
    out,
    "-startdate",
    stamp(from),
    "-enddate",
    stamp(to),
    "-rand_serial",
    ...(ca ? ["-cert", ca.crt, "-keyfile", ca.key] : ["-selfsign", "-keyfile", key]),
  );
  return readFileSync(out, "utf8");
}

function inScratch<T>(work: (dir: string) => T): T {
  const dir = mkdtempSync(join(tmpdir(), "stand-in-pki-"));
  try {
    return work(dir);
  } finally {
    rmSync(dir, { recursive: true });
  }
}

/** Modern k3s dates certificates back by an hour, so that clocks may differ; v1.17 does not. */
export function makeCa(gen: Generation, ca: Ca, name: string, now = Date.now()): void {
  newKey(ca.key);
  const from = gen === "modern" ? now - HOUR : now;
  const text = inScratch((dir) =>
    issue(
      dir,
      ca.key,
      undefined,
      `/CN=${name}@${Math.floor(now / 1000)}`,
      "keyUsage=critical,digitalSignature,keyEncipherment,keyCertSign\nbasicConstraints=critical,CA:TRUE\nsubjectKeyIdentifier=hash",
      from,
      from + 3650 * DAY,
    ),
  );
  writeFileSync(ca.crt, text, { mode: 0o644 });
  chmodSync(ca.crt, 0o644);
}

/** Signs for the key at `key`. v1.17's certificates begin when their CA does. */
export function sign(gen: Generation, ca: Ca, key: string, s: Subject): string {
  const now = Date.now();
  const to = now + days() * DAY;
  const begins =
    gen === "modern" ? now - HOUR : Date.parse(new X509Certificate(readFileSync(ca.crt)).validFrom);
  const from = Math.min(begins, to - DAY);
  const names = [...(s.dns ?? []).map((n) => `DNS:${n}`), ...(s.ips ?? []).map((n) => `IP:${n}`)];
  return inScratch((dir) =>
    issue(
      dir,
      key,
      ca,
      `${s.o ? `/O=${s.o}` : ""}/CN=${s.cn}`,
      `keyUsage=critical,digitalSignature,keyEncipherment\nextendedKeyUsage=${s.usage}\nauthorityKeyIdentifier=keyid\n${names.length ? `subjectAltName=${names.join(",")}` : ""}`,
      from,
      to,
    ),
  );
}

export function splitPem(text: string): { certs: string; key: string } {
  const blocks = text.match(/-----BEGIN [^-]+-----[\s\S]*?-----END [^-]+-----\n/g) ?? [];
  return {
    certs: blocks.filter((b) => !b.includes("PRIVATE KEY")).join(""),
    key: blocks.filter((b) => b.includes("PRIVATE KEY")).join(""),
  };
}
