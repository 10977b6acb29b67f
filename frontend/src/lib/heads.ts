/** The bundle of a model's attention heads: its description, a head's record, a prompt's patterns. See docs/formats/attention_bundle.md. */
import { Memory, ask, askJson, fileOf, getSite, readRange } from './api';
import { TILE, gunzip, levelsOf, massOf, readHalves, tilePlace, tilesOf, unfoldTriangle, type Side } from './patterns';
import { Problem, asProblem } from './problem';
import { readSpan } from './record';

const VERSION = 1;
const RECORD_VERSION = 1;
export const TOP_KEYS = 8;
const REBUILD = 'Run `interp verify` on the bundle and materialize `attention_browser` again.';

export interface HeadLayer {
  layer: number;
  n_heads: number;
  n_key_heads: number;
  window: number | null;
  softcap: number | null;
  has_sinks: boolean;
}

export interface PromptFacts {
  name: string;
  n_tokens: number;
  both_ways: boolean;
  form: 'triangle' | 'tiles';
  columns: string[];
  thumb: number;
  /** What a text of one's own was cut to, and what bounds a target. */
  note?: string;
}

export interface Heads {
  format: string;
  version: number;
  name: string;
  is_synthetic: boolean;
  pipeline: string;
  model: { name: string; revision: string };
  corpus: { source: string; n_shards: number; context_length: number };
  evidence: { top_k: number; n_intervals: number; examples_per_interval: number; key_tokens: number };
  layers: HeadLayer[];
  /** Layers that do not attend, and what they do instead. */
  other_layers?: { layer: number; kind: string }[];
  heads: Record<string, (number | null)[]>;
  prompts: PromptFacts[];
}

export interface HeadExample {
  context: number;
  query: number;
  score: number;
  first_query: number;
  /** The strongest keys of each query from `first_query` on, and how much it looks at each. */
  rows: { key: number; mass: number }[][];
}

/** A token: id, mass over chance, mass for each occurrence, occurrences. */
export type TokenLift = [number, number | null, number | null, number];

export interface HeadRecord {
  layer: number;
  head: number;
  rows: number;
  statistics: Record<string, number | null>;
  chance: Record<string, number | null>;
  distance: number[];
  distance_chance: number[];
  score: { edges: number[]; counts: number[] };
  keys: TokenLift[];
  queries: TokenLift[];
  top: number[];
  intervals: { low: number; high: number; rows: number; examples: number[] }[];
  examples: HeadExample[];
  contexts: { row: [number, number]; tokens: number[]; documents: [number, string][] }[];
}

/** A statistic of heads: its column, what people call it, and whether it is a share of attention, which has chance beside it. */
export const STATISTICS: { key: string; title: string; isShare: boolean }[] = [
  { key: 'induction', title: 'Induction: on what followed the same token', isShare: true },
  { key: 'previous', title: 'Previous token', isShare: true },
  { key: 'first', title: 'First token', isShare: true },
  { key: 'self', title: 'Itself', isShare: true },
  { key: 'duplicate', title: 'The same token before', isShare: true },
  { key: 'other_document', title: 'Other documents', isShare: true },
  { key: 'learned_sink', title: 'Learned sink', isShare: true },
  { key: 'entropy', title: 'Entropy, nats', isShare: false },
  { key: 'entropy_share', title: 'Entropy over that of an even look', isShare: false },
  { key: 'distance', title: 'Distance, tokens', isShare: false },
  { key: 'distance2', title: 'Squared distance', isShare: false },
  { key: 'logit_std', title: 'Spread of scores', isShare: false },
  { key: 'logit_margin', title: 'Margin of the best score', isShare: false },
  { key: 'logit_z', title: 'Margin over spread', isShare: false },
  { key: 'output_norm', title: 'Size of the output', isShare: false },
];

/** A head that mostly looks at the first token or at itself does nothing most of the time. */
export const RESTING = 0.9;

export interface HeadLine {
  name: string;
  layer: number;
  head: number;
  value: number | null;
  chance: number | null;
  /** From 1, the largest first; null without a value. */
  rank: number | null;
  isResting: boolean;
}

/** All heads by one statistic, in order of layer and head. */
export function listHeads(heads: Heads, statistic: string): HeadLine[] {
  const columns = heads.heads;
  const values = columns[statistic] ?? [];
  const sorted = values.filter((value): value is number => value !== null).sort((a, b) => b - a);
  return columns.layer!.map((layer, i) => {
    const value = values[i] ?? null;
    return {
      name: `${layer}.${columns.head![i]}`,
      layer: layer!,
      head: columns.head![i]!,
      value,
      chance: columns[`uniform_${statistic}`]?.[i] ?? null,
      rank: value === null ? null : 1 + sorted.findIndex((other) => other === value),
      isResting: (columns.first?.[i] ?? 0) + (columns.self?.[i] ?? 0) > RESTING,
    };
  });
}

/** The statistics that a bundle has; what no head has is left out, and a learned sink where none is learned. */
export const statisticsOf = (heads: Heads): typeof STATISTICS =>
  STATISTICS.filter(({ key }) => heads.heads[key]?.some((value) => value !== null) && (key !== 'learned_sink' || heads.layers.some((layer) => layer.has_sinks)));

/** The head beside one: `across` in its layer, and on into the next; `along` at the same place of another layer. */
export function besideHead(heads: Heads, name: string, across: number, along: number): string | null {
  const names = listHeads(heads, 'rows').map((line) => line.name);
  if (across) return names[names.indexOf(name) + across] ?? null;
  const [layer, head] = name.split('.').map(Number);
  const place = heads.layers.findIndex((item) => item.layer === layer);
  const next = heads.layers[place + along];
  return next ? `${next.layer}.${Math.min(head!, next.n_heads - 1)}` : null;
}

const described = new Memory<Heads>(4);
const indices = new Memory<ArrayBuffer>(8);
const records = new Memory<HeadRecord>(200);
const prompts = new Memory<Prompt>(8);

export function getHeads(name: string): Promise<Heads> {
  return described.get(name, async () => {
    const known = (await getSite()).bundles.find((item) => item.name === name);
    if (known?.error) throw new Problem(known.error.what, known.error.do);
    const found = await askJson<Heads>(fileOf(name, 'attention.json'));
    if (found.format !== 'interp-assets/attention-bundle' || found.version !== VERSION) {
      const step = found.version > VERSION ? 'Upgrade interp-assets.' : 'Materialize `attention_browser` again.';
      throw new Problem(`attention.json is '${found.format}' version ${found.version}; these pages read version ${VERSION}.`, step);
    }
    return { ...found, name };
  });
}

/** Open one head: the index (kept), then exactly one range request. */
export function getHead(heads: Heads, head: string): Promise<HeadRecord> {
  return records.get(`${heads.name}/${head}`, async () => {
    const place = listHeads(heads, 'rows').findIndex((line) => line.name === head);
    if (place < 0) {
      const shown = heads.layers.map((item) => `${item.layer}.0 to ${item.layer}.${item.n_heads - 1}`).slice(0, 4);
      throw new Problem(`There is no head ${head}; there are ${shown.join(', ')}${heads.layers.length > 4 ? ' and more' : ''}.`, 'Go back to the map of the heads.');
    }
    const index = await indices.get(heads.name, async () => (await ask(fileOf(heads.name, 'records.idx'))).arrayBuffer());
    const { start, stop } = readSpan(index, place, 'records');
    const member = await readRange(fileOf(heads.name, 'records.bin'), start, stop);
    return readHead(await gunzip(member, `The record of head ${head} in records.bin`), head);
  });
}

/** Check and unpack one record. */
export function readHead(data: ArrayBuffer, head: string): HeadRecord {
  try {
    const found = JSON.parse(new TextDecoder().decode(data)) as Omit<HeadRecord, 'examples'> & { version: number; examples: (Omit<HeadExample, 'rows'> & { keys: string; masses: string })[] };
    if (found.version !== RECORD_VERSION) {
      throw new Problem(`The record of head ${head} has version ${found.version}; these pages read version ${RECORD_VERSION}.`, found.version > RECORD_VERSION ? 'Upgrade interp-assets.' : REBUILD);
    }
    if (`${found.layer}.${found.head}` !== head) throw new Problem(`Index and records disagree: head ${found.layer}.${found.head} lies where head ${head} should.`, REBUILD);
    const examples = found.examples.map((example) => ({ ...example, rows: readRows(example, found.contexts[example.context]!.tokens.length) }));
    return { ...found, examples };
  } catch (error) {
    if (error instanceof Problem) throw error;
    throw new Problem(`The record of head ${head} cannot be read: ${asProblem(error).message}`, REBUILD);
  }
}

function readRows(example: { keys: string; masses: string }, n: number): { key: number; mass: number }[][] {
  const bytes = (text: string): Uint8Array<ArrayBuffer> => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const keys = new Uint32Array(bytes(example.keys).buffer);
  const masses = bytes(example.masses);
  if (keys.length !== masses.length || keys.length % TOP_KEYS || keys.some((key) => key >= n)) throw new Error(`${keys.length} keys and ${masses.length} masses for ${n} tokens`);
  return Array.from({ length: keys.length / TOP_KEYS }, (_, row) =>
    Array.from({ length: TOP_KEYS }, (_, i) => ({ key: keys[row * TOP_KEYS + i]!, mass: massOf(masses[row * TOP_KEYS + i]!) })).filter(({ mass }) => mass > 0),
  );
}

/** What adds to targets over a text of one's own: see docs/formats/attention_answer.md. */
export interface Targets {
  facts: { column: string; text?: string; others: string[]; note: string }[];
  scales: Float32Array;
  terms: Float32Array;
}

/** What adds to one target at one query: by head, and all else. */
export interface TermsAt {
  value: number;
  heads: [string, number][];
  others: [string, number][];
}

/** One prompt: its tokens and, when they are asked for, the patterns of its heads. */
export class Prompt {
  private readonly squares = new Memory<Uint8Array>(64);
  private readonly tiles = new Memory<Uint8Array>(512);
  constructor(
    readonly facts: PromptFacts,
    readonly tokens: number[],
    readonly heads: string[],
    private readonly offsets: ArrayBuffer,
    /** Float16, read when a column is asked for: of many heads they are many. */
    private readonly columns: Uint16Array,
    readonly thumbs: Uint8Array,
    private readonly read: (start: number, stop: number) => Promise<ArrayBuffer>,
    readonly targets: Targets | null = null,
  ) {}

  get n(): number {
    return this.tokens.length;
  }
  get isTiled(): boolean {
    return this.facts.form === 'tiles';
  }

  /** The small picture of a head: bytes, a row a query. */
  thumb(head: string): Uint8Array {
    const size = this.facts.thumb ** 2;
    return this.thumbs.subarray(this.placeOf(head) * size, (this.placeOf(head) + 1) * size);
  }

  /** What weights the keys of a head. */
  column(head: string, name: string): Float32Array | null {
    const at = this.facts.columns.indexOf(name);
    if (at < 0) return null;
    const start = (this.placeOf(head) * this.facts.columns.length + at) * this.n;
    return readHalves(this.columns.subarray(start, start + this.n));
  }

  /** What weights the queries of a head: of columns that belong to a target. */
  scale(head: string, name: string): Float32Array | null {
    const at = this.targets?.facts.findIndex((facts) => facts.column === name) ?? -1;
    if (at < 0) return null;
    const layers = [...new Set(this.heads.map((each) => each.split('.')[0]))];
    const start = (at * layers.length + layers.indexOf(head.split('.')[0])) * this.n;
    return this.targets!.scales.subarray(start, start + this.n);
  }

  /** What adds to a target at a query; null where nothing is known of it. */
  termsAt(name: string, query: number): TermsAt | null {
    const [facts, at] = [this.targets?.facts ?? [], this.targets?.facts.findIndex((each) => each.column === name) ?? -1];
    if (at < 0) return null;
    const rowsOf = (others: string[]): number => this.heads.length + 2 + others.length;
    const first = facts.slice(0, at).reduce((sum, each) => sum + rowsOf(each.others), 0);
    const value = (row: number): number => this.targets!.terms[(first + row) * this.n + query]!;
    const others = ['heads of other layers', ...facts[at]!.others].map((other, i): [string, number] => [other, value(this.heads.length + 1 + i)]);
    return { value: value(this.heads.length), heads: this.heads.map((head, i) => [head, value(i)]), others: others.filter(([, each]) => each !== 0) };
  }

  /** Bytes of a part of a pattern at one level of its pyramid, a row a query; zeros beyond the text. */
  async block(head: string, level: number, q0: number, k0: number, height: number, width: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(height * width);
    /** Copy what a square of `side` at a place has in common with the part. */
    const copy = (from: Uint8Array, side: number, top: number, left: number): void => {
      const [start, stop] = [Math.max(left, k0), Math.min(left + side, k0 + width)];
      for (let q = Math.max(top, q0); q < Math.min(top + side, q0 + height) && start < stop; q++) {
        bytes.set(from.subarray((q - top) * side + start - left, (q - top) * side + stop - left), (q - q0) * width + start - k0);
      }
    };
    if (!this.isTiled) {
      const square = await this.square(head);
      if (q0 === 0 && k0 === 0 && height === this.n && width === this.n) return square;
      copy(square, this.n, 0, 0);
      return bytes;
    }
    const last = Math.ceil(this.n / (TILE << level)) - 1;
    const tiles = (from: number, length: number): number[] => {
      const [start, stop] = [Math.floor(from / TILE), Math.min(last, Math.floor((from + length - 1) / TILE))];
      return Array.from({ length: Math.max(0, stop - start + 1) }, (_, i) => start + i);
    };
    await Promise.all(tiles(q0, height).flatMap((row) => tiles(k0, width).map(async (column) => copy(await this.tile(head, level, row, column), TILE, row * TILE, column * TILE))));
    return bytes;
  }

  /** All bytes of a head up to 1,024 tokens. */
  square(head: string): Promise<Uint8Array> {
    return this.squares.get(head, async () => {
      const what = `The pattern of head ${head}`;
      const data = await gunzip(await this.member(this.placeOf(head)), what);
      return unfoldTriangle(new Uint8Array(data), this.n, this.facts.both_ways, what);
    });
  }

  /** A tile of a head, empty above the diagonal. */
  tile(head: string, level: number, row: number, column: number): Promise<Uint8Array> {
    const place = tilePlace(this.n, level, row, column, this.facts.both_ways);
    if (place < 0) return Promise.resolve(new Uint8Array(TILE * TILE));
    return this.tiles.get(`${head}/${place}`, async () => {
      const what = `A tile of head ${head}`;
      const data = new Uint8Array(await gunzip(await this.member(this.placeOf(head) * tilesOf(this.n, this.facts.both_ways) + place), what));
      if (data.length !== TILE * TILE) throw new Problem(`${what} has ${data.length} bytes; a tile has ${TILE * TILE}.`, REBUILD);
      return data;
    });
  }

  /** What a query looks at, or what looks at a key: a mass a token. */
  async line(head: string, side: Side, place: number): Promise<Float32Array> {
    const n = this.n;
    if (!this.isTiled) {
      const square = await this.square(head);
      return Float32Array.from({ length: n }, (_, i) => massOf(square[side === 'query' ? place * n + i : i * n + place]!));
    }
    const [tile, inside] = [Math.floor(place / TILE), place % TILE];
    const parts = await Promise.all(Array.from({ length: Math.ceil(n / TILE) }, (_, i) => (side === 'query' ? this.tile(head, 0, tile, i) : this.tile(head, 0, i, tile))));
    return Float32Array.from({ length: n }, (_, i) => massOf(parts[Math.floor(i / TILE)]![side === 'query' ? inside * TILE + (i % TILE) : (i % TILE) * TILE + inside]!));
  }

  /** The levels of its pyramid; one where it is a triangle. */
  get levels(): number {
    return this.isTiled ? levelsOf(this.n) : 1;
  }

  private placeOf(head: string): number {
    const place = this.heads.indexOf(head);
    if (place < 0) throw new Problem(`There is no head ${head} in the prompt ${this.facts.name}; there are ${this.heads.slice(0, 8).join(', ')}.`, 'Choose another head.');
    return place;
  }
  private async member(place: number): Promise<ArrayBuffer> {
    const { start, stop } = readSpan(this.offsets, place, 'patterns');
    return this.read(start, stop);
  }
}

export function getPrompt(heads: Heads, name: string): Promise<Prompt> {
  return prompts.get(`${heads.name}/${name}`, async () => {
    const facts = heads.prompts.find((item) => item.name === name);
    if (!facts) {
      const there = heads.prompts.map((item) => item.name).join(', ') || 'none: name texts in `heads.prompts`';
      throw new Problem(`There is no prompt '${name}'; there are ${there}.`, 'Choose one of them.');
    }
    const at = (file: string): string => fileOf(heads.name, `prompts/${encodeURIComponent(name)}/${file}`);
    const bytes = async (file: string): Promise<ArrayBuffer> => (await ask(at(file))).arrayBuffer();
    const [said, offsets, columns, thumbs, targets] = await Promise.all([
      askJson<Said>(at('prompt.json')),
      bytes('patterns.idx'),
      bytes('columns.bin'),
      bytes('thumbs.bin'),
      facts.columns.some((column) => column.includes(':')) ? Promise.all([askJson<Targets['facts']>(at('targets.json')), bytes('scales.bin'), bytes('terms.bin')]) : null,
    ]);
    const found = targets && { facts: targets[0], scales: new Float32Array(targets[1]), terms: new Float32Array(targets[2]) };
    return joinPrompt({ ...facts, ...said }, said, offsets, columns, thumbs, (start, stop) => readRange(at('patterns.bin'), start, stop), found);
  });
}

type Said = Omit<PromptFacts, 'name' | 'n_tokens'> & { tokens: number[]; heads: string[]; note?: string };

/** A prompt of files that are all here. */
export async function makePrompt(name: string, files: (file: string) => ArrayBuffer): Promise<Prompt> {
  const json = <T>(file: string): T => JSON.parse(new TextDecoder().decode(files(file))) as T;
  const said = json<Said>('prompt.json');
  const patterns = files('patterns.bin');
  const targets = files('targets.json').byteLength ? { facts: json<Targets['facts']>('targets.json'), scales: new Float32Array(files('scales.bin')), terms: new Float32Array(files('terms.bin')) } : null;
  const facts = { ...said, name, n_tokens: said.tokens.length };
  return joinPrompt(facts, said, files('patterns.idx'), files('columns.bin'), files('thumbs.bin'), (start, stop) => Promise.resolve(patterns.slice(start, stop)), targets);
}

async function joinPrompt(
  facts: PromptFacts,
  said: Said,
  offsets: ArrayBuffer,
  columns: ArrayBuffer,
  thumbs: ArrayBuffer,
  read: (start: number, stop: number) => Promise<ArrayBuffer>,
  targets: Targets | null = null,
): Promise<Prompt> {
  const small = new Uint8Array(await gunzip(thumbs, 'thumbs.bin'));
  const [n, nHeads] = [said.tokens.length, said.heads.length];
  if (n !== facts.n_tokens || small.length !== nHeads * facts.thumb ** 2 || columns.byteLength !== 2 * nHeads * facts.columns.length * n) {
    throw new Problem(`The files of the prompt '${facts.name}' do not fit each other.`, REBUILD);
  }
  return new Prompt(facts, said.tokens, said.heads, offsets, new Uint16Array(columns), small, read, targets);
}
