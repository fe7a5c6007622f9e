/** The slow lab of the benches: WireGuard's tools are there, and a node is Ready two seconds after its k3s's start. */
import { writeFileSync } from "node:fs";
import { type Lab, up } from "../lab/lab.ts";

/** From k3s's start to Ready. Longer than the stand-in itself takes on two busy cores, shorter than any k3s. */
const START = 2;

/** NAME=ADDRESS of each box, the server a1 first. */
export const all = (lab: Lab) => lab.boxes.map(({ name, publicIp }) => `${name}=${publicIp}`);

/** New boxes, `ms` milliseconds away from their operator and back, whose env file names them. */
export async function slowLab(name: string, boxes: string[], ms: number): Promise<Lab> {
  const lab = await up({ name, boxes, tools: true, slow: true, hairpin: ["a", "b"], startSeconds: START });
  const [server, ...agents] = all(lab);
  writeFileSync(
    lab.envFile,
    `SERVER=${server}\nAGENTS="${agents.join(" ")}"\nK3S_MIRRORS="${lab.mirror.plain} ${lab.mirror.github}"\n`,
  );
  await lab.line("op", ms);
  return lab;
}

/** When each box's journal has this line for the first time, in milliseconds since 1970; undefined: not yet. */
export const when = (lab: Lab, line: string): Promise<(number | undefined)[]> =>
  Promise.all(
    lab.boxes.map(async (box) => {
      const said = await box.sh(
        `journalctl -u k3s -u k3s-agent -o short-unix --no-pager | grep -m 1 -F '${line}' || :`,
      );
      return said ? 1000 * Number(said.split(" ")[0]) : undefined;
    }),
  );

/** What the kubelet says just before it tells the API (v1.36.3, recorded). */
export const READY = "Fast updating node status as it just became ready";
