/** Releases of k3s: their order, and upgrade paths. */
import { SettingError } from "../settings.ts";
import { Refusal } from "../step.ts";

/** One release of each minor version, for upgrade paths (docs.k3s.io/release-notes, 2026-05). */
const RELEASES = [
  ...["v1.18.20+k3s1", "v1.19.16+k3s1", "v1.20.15+k3s1", "v1.21.14+k3s1", "v1.22.17+k3s1", "v1.23.17+k3s1"],
  ...["v1.24.17+k3s1", "v1.25.16+k3s4", "v1.26.15+k3s1", "v1.27.16+k3s1", "v1.28.15+k3s1", "v1.29.15+k3s1"],
  ...["v1.30.14+k3s2", "v1.31.14+k3s1", "v1.32.11+k3s3", "v1.33.7+k3s1", "v1.34.2+k3s1", "v1.35.4+k3s1"],
];

/** A release of k3s: its minor version, patch, release candidate if it is one, and k3s's own count. */
export const RELEASE = /^v1\.(\d+)\.(\d+)(?:-rc(\d+))?\+k3s(\d+)$/;
const minorOf = (version: string) => Number(version.split(".")[1]);

/** Less than 0 where the first release is older. A release candidate comes before its release. */
export function compare(a: string, b: string): number {
  const parts = (version: string) => {
    const [, minor, patch, rc, k3s] = RELEASE.exec(version) ?? [];
    return [
      Number(minor),
      Number(patch),
      rc === undefined ? Number.POSITIVE_INFINITY : Number(rc),
      Number(k3s),
    ];
  };
  const [one, other] = [parts(a), parts(b)];
  for (const [i, x] of one.entries()) {
    const y = other[i] as number;
    if (x !== y) return x < y ? -1 : 1;
  }
  return 0;
}

/**
 * The releases to pass through from the running ones (two after an interrupted upgrade) to `to`. Completed ones of
 * `steps` are left out, so that the same command can be repeated.
 *
 * @throws {SettingError} for steps that do not lead to `to`, {Refusal} for a downgrade or a skipped minor version,
 * unless forced.
 */
export function pathOf(
  running: readonly string[],
  to: string,
  steps: readonly string[],
  force: boolean,
): string[] {
  const sorted = [...running].sort(compare);
  const [from = to, newest = to] = [sorted[0], sorted.at(-1)];
  const way = steps.at(-1) === to ? steps : [...steps, to];
  for (const [i, release] of way.entries())
    if (i > 0 && compare(way[i - 1] as string, release) >= 0)
      throw new SettingError(
        `STEPS goes from ${way[i - 1]} to ${release}: expected later and later releases, up to K3S_VERSION`,
      );
  if (compare(to, newest) < 0) {
    if (force) return [to];
    throw new Refusal(
      `The cluster runs ${newest}, and a way back to ${to} is not safe: its datastore may hold what the older release cannot read. A backup from before restores the old state; FORCE=1 goes back all the same`,
    );
  }
  const path = way.filter((release) => compare(release, from) > 0);
  const full: string[] = [];
  let jumps = false;
  for (const release of path) {
    const [before, after] = [minorOf(full.at(-1) ?? from), minorOf(release)];
    jumps ||= after > before + 1;
    full.push(...RELEASES.filter((r) => minorOf(r) > before && minorOf(r) < after), release);
  }
  if (jumps && !force)
    throw new Refusal(
      `From ${from} to ${to} minor versions would be left out, which Kubernetes does not support. Pass through one release of each: STEPS="${full.slice(0, -1).join(" ")}"; FORCE=1 jumps all the same`,
    );
  return path;
}
