/**
 * What a person sets in the panel "Steer" becomes a part of the address, the plans that a server runs, and the same recipe in other words: YAML,
 * Python and curl. Strengths are in units of each feature's maximum; everything is a clamp, so that what the SAE does not explain stays.
 */
import { Problem } from './problem';
import type { Bundle, ServedModel, Site } from './types';

export const PLACES = ['all', 'prompt', 'generated'] as const;
const MOST_FEATURES = 8;
const MOST_TOKENS = 512;

/** A feature and what it is set to, in units of its maximum. */
export interface Dial {
  latent: number;
  times: number;
}

export interface Steering {
  dials: Dial[];
  /** Further features whose activations are shown. */
  watched: number[];
  prompt: string;
  newTokens: number;
  temperature: number;
  seed: number;
  where: (typeof PLACES)[number];
}

/** A token as the server writes it into a line. */
export interface SteeredToken {
  token: number;
  logprob: number;
  /** Under the model without edits, over the same text; null in the text without edits. */
  base: number | null;
  kl: number | null;
  /** What the shown features read at the position that it was drawn from: on the token before it. */
  latents: number[];
}

/** What one edit did, as means over the places that it reached; null where there are none. */
export interface EditEffect {
  places: number;
  moved: number | null;
  before: number | null;
  after: number | null;
}

export interface Tensor {
  shape: number[];
  values: Float32Array;
}

export const newSteering = (latent: number): Steering => ({ dials: [{ latent, times: 10 }], watched: [], prompt: '', newTokens: 32, temperature: 0, seed: 0, where: 'all' });

/** Read `steer=12:10,7:-2` and what stands beside it; null where nothing is steered. What cannot be is left out, or at its default. */
export function parseSteering(given: URLSearchParams): Steering | null {
  const text = given.get('steer');
  if (text === null) return null;
  const plain = newSteering(0);
  const dials = text.split(',').flatMap((part): Dial[] => {
    const found = /^(\d{1,10}):(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)$/.exec(part);
    return found ? [{ latent: Number(found[1]), times: Number(found[2]) }] : [];
  });
  const number = (name: string, low: number, high: number, otherwise: number, isWhole: boolean): number => {
    const value = Number(given.get(name) ?? otherwise);
    return value >= low && value <= high && (!isWhole || Number.isInteger(value)) ? value : otherwise;
  };
  return {
    dials: [...new Map(dials.map((dial) => [dial.latent, dial])).values()].slice(0, MOST_FEATURES),
    watched: parseLatents(given.get('watch') ?? ''),
    prompt: given.get('prompt') ?? '',
    newTokens: number('new', 1, MOST_TOKENS, plain.newTokens, true),
    temperature: number('temp', 0, 10, plain.temperature, false),
    seed: number('seed', 0, 2 ** 31, plain.seed, true),
    where: PLACES.find((place) => place === given.get('where')) ?? plain.where,
  };
}

/** The same as parts of an address; what stands at its default is left out. */
export function writeSteering(query: URLSearchParams, steering: Steering): void {
  const plain = newSteering(0);
  query.set('steer', steering.dials.map(({ latent, times }) => `${latent}:${times}`).join(','));
  if (steering.watched.length) query.set('watch', steering.watched.join(','));
  if (steering.prompt) query.set('prompt', steering.prompt);
  if (steering.newTokens !== plain.newTokens) query.set('new', String(steering.newTokens));
  if (steering.temperature !== plain.temperature) query.set('temp', String(steering.temperature));
  if (steering.seed !== plain.seed) query.set('seed', String(steering.seed));
  if (steering.where !== plain.where) query.set('where', steering.where);
}

/** "5, 9 12" as numbers, each once. */
export function parseLatents(text: string): number[] {
  const found = text.split(/[\s,]+/).filter((part) => /^\d{1,10}$/.test(part)).map(Number);
  return [...new Set(found)].slice(0, MOST_FEATURES);
}

/** Find the served model that has the very SAE of a bundle; else why nothing can be steered here, and what to do. */
export function findModel(site: Site, models: ServedModel[], bundle: Bundle): ServedModel | Problem {
  const command = `\`interp serve --config PIPELINE.yaml --model ${bundle.model.name}\``;
  if (site.mode === 'static') return new Problem('This site is files only, and steering needs the model.', `Start ${command} beside the pipeline '${bundle.pipeline}', and open this feature there.`);
  if (!site.models) return new Problem('This server serves no model.', `Start it with the model: ${command}.`);
  const model = models.find(({ saes }) => saes[bundle.sae.name]?.artifact_id === bundle.sae.artifact_id);
  if (!model) {
    const names = models.map(({ name }) => name).join(', ');
    return new Problem(`The SAE '${bundle.sae.name}' of this bundle (${bundle.sae.artifact_id}) is with none of the models that are served here: ${names}.`, `Serve the pipeline's own model, with its configuration: ${command}.`);
  }
  if (model.queue.stopped) return new Problem(model.queue.stopped, 'Start the server again.');
  if (!model.can_measure) return new Problem(`${model.model} predicts no next token, so it writes no text.`, 'Steer a causal language model.');
  return model;
}

/** The plan that writes a text, and the same without the edits; `values` are what the dials' strengths are in raw units. */
export function makeTextPlan(model: ServedModel, sae: string, steering: Steering, ids: number[], values: number[]): Record<string, unknown> {
  const edits = steering.dials.map((dial, i) => ({
    write: { op: 'sae_clamp', point: pointsOf(model, sae).written, sae, latents: [dial.latent], values: [values[i]] },
    where: steering.where,
  }));
  const { newTokens: new_tokens, seed, temperature } = steering;
  const latents = model.saes[sae]!.is_crosscoder ? [] : [{ sae, latents: shownLatents(steering) }];
  return { version: 1, whole: 'generate', rows: [ids], new_tokens, seed, temperature, stop: model.stop_tokens, special: model.special_tokens, edits, compare: true, latents };
}

/** The plan that reads latents over two whole texts, without the edits and with them; null for no latents. */
export function makeReadPlan(model: ServedModel, sae: string, steering: Steering, texts: { prompt: number[]; plain: number[]; steered: number[] }, values: number[]): Record<string, unknown> {
  const rows = [[...texts.prompt, ...texts.plain], [...texts.prompt, ...texts.steered]];
  const special = new Set(model.special_tokens);
  const [first, last] = steering.where === 'prompt' ? [0, texts.prompt.length] : [steering.where === 'generated' ? texts.prompt.length : 0, rows[1]!.length];
  const pos = rows[1]!.flatMap((token, place) => (place >= first && place < last && !special.has(token) ? [place] : []));
  const { read, written } = pointsOf(model, sae);
  const clamps = steering.dials.map((dial, i) => ({ op: 'sae_clamp', point: written, sae, latents: [dial.latent], values: [values[i]], rows: [1], pos }));
  return { version: 1, rows, operations: [...(pos.length ? clamps : []), { op: 'sae_read', name: 'latents', point: read, sae, latents: shownLatents(steering), after: true }] };
}

/** The features whose activations are shown: those that are set, then those that are watched. */
export const shownLatents = (steering: Steering): number[] => [...new Set([...steering.dials.map(({ latent }) => latent), ...steering.watched])];

function pointsOf(model: ServedModel, sae: string): { read: string; written: string } {
  const found = model.saes[sae]!;
  return { read: found.hook_point, written: found.written_at };
}

/** The recipe's file: what `interp steer`, `lab` and a pipeline's configuration read. */
export function asYaml(sae: string, steering: Steering): string {
  const where = steering.where === 'all' ? '' : `, where: ${steering.where}`;
  return `edits:\n${steering.dials.map(({ latent, times }) => `  - {sae: ${JSON.stringify(sae)}, latent: ${latent}, clamp: ${times} max${where}}\n`).join('')}`;
}

/** A program of a notebook that writes the same texts; without a served model it opens the pipeline. */
export function asPython(sae: string, steering: Steering, server: { address: string; model: string } | null): string {
  const where = steering.where === 'all' ? '' : `, "where": "${steering.where}"`;
  const edits = steering.dials.map(({ latent, times }) => `    {"sae": ${asPythonText(sae)}, "latent": ${latent}, "clamp": "${times} max"${where}},\n`);
  const sampling = `${steering.temperature ? `, temperature=${steering.temperature}` : ''}, seed=${steering.seed}`;
  return [
    'from interp_assets import lab\n\n',
    server ? `llm = lab.connect("${server.address}", ${asPythonText(server.model)})  # token="..." where the server asks for one\n` : 'llm = lab.open("PIPELINE.yaml").model()\n',
    `recipe = [\n${edits.join('')}]\n`,
    `texts = llm.generate(${asPythonText(steering.prompt)}, steer=recipe, new_tokens=${steering.newTokens}${sampling}, compare=True)\n`,
    'texts  # in a notebook: both, side by side; texts.table() and texts.effects() have the numbers\n',
  ].join('');
}

/** The request that this page sends; a plan holds numbers alone and names without quotes of a shell. */
export const asCurl = (address: string, model: string, plan: Record<string, unknown>): string =>
  `curl -N '${address}/api/models/${encodeURIComponent(model)}/generate' -H 'content-type: application/json' -d '${JSON.stringify(plan).replaceAll("'", '\\u0027')}'\n`;

/** A text as a literal of Python, as JSON's are; characters that are not seen, or that turn the order of others around, by number. */
const asPythonText = (text: string): string =>
  JSON.stringify(text).replace(/[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`);

/** Tell for each token of two texts whether it is in the longest text that both have in common. */
export function shareTokens(a: number[], b: number[]): [boolean[], boolean[]] {
  const [n, m] = [a.length, b.length];
  const longest = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--) longest[i]![j] = a[i] === b[j] ? longest[i + 1]![j + 1]! + 1 : Math.max(longest[i + 1]![j]!, longest[i]![j + 1]!);
  const [ours, theirs] = [new Array<boolean>(n).fill(false), new Array<boolean>(m).fill(false)];
  let [i, j] = [0, 0];
  while (i < n && j < m) {
    if (a[i] === b[j]) [ours[i++], theirs[j++]] = [true, true];
    else if (longest[i + 1]![j]! >= longest[i]![j + 1]!) i++;
    else j++;
  }
  return [ours, theirs];
}

/** What a line of the stream says: a token of one of the texts, or what all edits did at the end. A line with an error becomes a Problem. */
export type Line = { isDefault: boolean; token: SteeredToken } | { effects: EditEffect[]; fvu: Record<string, number | null> };

export function readLine(text: string): Line {
  const line = JSON.parse(text) as { token?: unknown[]; generated?: { effects: Record<string, { values: (number | null)[] }>[]; fvu: Record<string, number | null> }; error?: { what: string; do: string; status?: number } };
  if (line.error) throw new Problem(line.error.what, line.error.do, line.error.status);
  if (line.token) {
    const [, isDefault, , token, logprob, base, kl, , latents] = line.token as [number, boolean, number, number, number, number | null, number | null, number[], number[]];
    return { isDefault, token: { token, logprob, base, kl, latents } };
  }
  if (!line.generated) throw new Problem('The server sent a line that is neither a token nor an end.', 'Are the server and this page of one release? Reload the page.');
  const first = (effect: Record<string, { values: (number | null)[] }>, name: string): number | null => effect[name]?.values[0] ?? null;
  const effects = line.generated.effects.map((effect) => ({ places: first(effect, 'n_places') ?? 0, moved: first(effect, 'moved'), before: first(effect, 'before'), after: first(effect, 'after') }));
  return { effects, fvu: line.generated.fvu };
}

/** Cut a stream of bytes into lines, however its pieces are cut. */
export async function* splitLines(stream: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const [reader, decoder] = [stream.getReader(), new TextDecoder()];
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (rest + (done ? decoder.decode() : decoder.decode(value, { stream: true }))).split('\n');
    rest = done ? '' : lines.pop()!;
    for (const line of lines) if (line) yield line;
    if (done) return;
  }
}

/** Read an answer, a safetensors file: its float32 tensors by the names of the plan's operations. */
export function readAnswer(body: ArrayBuffer): Map<string, Tensor> {
  try {
    const length = Number(new DataView(body).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(body, 8, length))) as Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }> & { __metadata__: { answer: string } };
    const { tensors } = JSON.parse(header.__metadata__.answer) as { tensors: Record<string, string> };
    return new Map(
      Object.entries(tensors).map(([name, key]) => {
        const { dtype, shape, data_offsets: [start, stop] } = header[key]!;
        if (dtype !== 'F32') throw new Error(`${name} is ${dtype}`);
        return [name, { shape, values: new Float32Array(body.slice(8 + length + start, 8 + length + stop)) }];
      }),
    );
  } catch (error) {
    throw new Problem(`The server's answer cannot be read: ${(error as Error).message}.`, 'Are the server and this page of one release? Reload the page.');
  }
}

/** The activations of one latent along one row of [rows, positions, latents]. */
export function activationsOf({ shape, values }: Tensor, row: number, latent: number, first: number, last: number): number[] {
  const [, width = 0, n = 0] = shape;
  return Array.from({ length: last - first }, (_, i) => values[(row * width + first + i) * n + latent]!);
}
