/**
 * The list of a bundle from its files alone, as `interp_assets/web/table.py` and `search.py` do it on a server: an unfiltered page is a range of an
 * order file and some rows; a filter reads the whole column that it names, a search the postings of its words, by which it is ranked. Orders and columns that were read
 * are kept (4 bytes a feature).
 */
import { Problem } from './problem';
import { RELEVANCE, type ListState } from './route';
import type { Bundle, FeaturePage, FeatureRow, Place } from './types';

const ROW_BYTES = 76;
const NO_WORD = 0xffffffff;
const SHOWN_WORDS = 4;
const NEAR_ROWS = 256;
const NEAR_BYTES = 1 << 16;
const READ_BYTES = 4 << 20;
const MAX_BYTES = 64 << 20;
const WIDTHS = [1, 2, 4] as const;
const KEPT = 4;
const MAX_PLACED = 1 << 18;
const SEARCHED = ['peaks', 'raised', 'lowered'];
const CONDITION = /^(\w+)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(%?)$/;
const CHANGE = 'Change the query.';

export type ReadFile = (file: string) => Promise<Response>;
export type ReadRange = (file: string, start: number, stop: number) => Promise<ArrayBuffer>;

/** Bytes [start, stop) of the postings: one list, in numbers of `width` bytes, and what a match in it is worth. */
interface Span {
  start: number;
  stop: number;
  width: number;
  weight: number;
}

export class StaticList {
  private readonly kept = new Map<string, Promise<Uint32Array>>();
  private words?: Promise<string[]>;
  private entries?: Promise<number[]>;

  constructor(
    private readonly bundle: Bundle,
    private readonly file: ReadFile,
    private readonly range: ReadRange,
  ) {}

  async page(state: ListState, offset: number, limit: number): Promise<FeaturePage> {
    this.check(state);
    let [matches, latents]: [number, Uint32Array] = [0, new Uint32Array()];
    if (isPlain(state)) {
      const { first, length } = this.span(state);
      matches = length;
      latents = await this.readOrder(state, first, length, offset, Math.max(0, Math.min(limit, length - offset)));
    } else {
      const order = await this.order(state);
      matches = order.length;
      latents = order.subarray(offset, offset + limit);
    }
    return { n_features: this.bundle.d_sae, n_matches: matches, offset, rows: await this.rows([...latents]) };
  }

  /** A whole order is read only for a list that was reduced, or a short one: 40 MB for "next" would be too much at ten million. */
  async place(state: ListState, latent: number): Promise<Place> {
    if (isPlain(state) && this.bundle.d_sae > MAX_PLACED) return { position: null, n_matches: this.span(state).length, previous: null, next: null };
    const order = await this.order(state);
    const position = order.indexOf(latent);
    if (position < 0) return { position: null, n_matches: order.length, previous: null, next: null };
    return { position, n_matches: order.length, previous: order[position - 1] ?? null, next: order[position + 1] ?? null };
  }

  async rows(latents: number[]): Promise<FeatureRow[]> {
    const words = await this.allWords();
    const found = new Map<number, FeatureRow>();
    const sorted = [...new Set(latents)].sort((a, b) => a - b);
    const groups: number[][] = [];
    for (const latent of sorted) {
      const group = groups.at(-1);
      if (group && latent - group[0]! < NEAR_ROWS) group.push(latent);
      else groups.push([latent]);
    }
    await Promise.all(
      groups.map(async (group) => {
        const first = group[0]!;
        const data = new DataView(await this.range('list/rows.bin', first * ROW_BYTES, (group.at(-1)! + 1) * ROW_BYTES));
        for (const latent of group) found.set(latent, readRow(data, (latent - first) * ROW_BYTES, latent, words));
      }),
    );
    return latents.map((latent) => found.get(latent)!);
  }

  private check(state: ListState): void {
    const { sortable, numeric } = this.bundle.columns;
    const known = [...Object.keys(sortable), ...(state.text.trim() ? [RELEVANCE] : [])];
    if (!known.includes(state.sort)) throw new Problem(`Cannot sort by '${state.sort}'; the table has ${known.join(', ')}.`, CHANGE, 400);
    for (const filter of state.filters) {
      const name = parseFilter(filter).name;
      if (!(name in numeric)) throw new Problem(`Cannot filter by '${name}'; the numeric columns are ${Object.keys(numeric).join(', ')}.`, CHANGE, 400);
    }
  }

  private span(state: ListState): { first: number; length: number } {
    const { d_sae, n_live } = this.bundle;
    if (state.life === 'all') return { first: 0, length: d_sae };
    return state.life === 'dead' ? { first: 0, length: d_sae - n_live } : { first: d_sae - n_live, length: n_live };
  }

  private async readOrder(state: ListState, first: number, length: number, offset: number, n: number): Promise<Uint32Array> {
    if (n === 0) return new Uint32Array();
    const start = first + (state.isDescending ? length - offset - n : offset);
    const part =
      state.sort === 'latent' && state.life === 'all'
        ? Uint32Array.from({ length: n }, (_, i) => start + i)
        : new Uint32Array(await this.range(`list/${this.bundle.columns.sortable[state.sort]}.order`, 4 * start, 4 * (start + n)));
    return state.isDescending ? part.toReversed() : part;
  }

  private order(state: ListState): Promise<Uint32Array> {
    this.check(state);
    return this.keep(JSON.stringify([state.sort, state.isDescending, state.life, state.filters, state.text.trim()]), async () => {
      const { first, length } = this.span(state);
      const isRanked = state.sort === RELEVANCE;
      const whole = await this.readOrder(isRanked ? { ...state, sort: 'latent', isDescending: false } : state, first, length, 0, length);
      if (isPlain(state)) return whole;
      const mask = new Uint8Array(this.bundle.d_sae).fill(1);
      for (const filter of state.filters) await this.applyFilter(filter, mask);
      const scores = await this.search(state.text);
      const found = whole.filter((latent) => mask[latent] && (!scores || scores[latent]));
      if (!isRanked) return found;
      if (scores) found.sort((a, b) => scores[b]! - scores[a]! || a - b);
      return state.isDescending ? found.toReversed() : found;
    });
  }

  private async applyFilter(filter: string, mask: Uint8Array): Promise<void> {
    const { name, relation, value } = parseFilter(filter);
    const type = this.bundle.columns.numeric[name];
    const data = await (await this.file(`list/${name}.bin`)).arrayBuffer();
    const values = type === '<f8' ? new Float64Array(data) : type === '<u4' ? new Uint32Array(data) : new Float32Array(data);
    const bound = type === '<f4' ? Math.fround(value) : value;
    for (let i = 0; i < mask.length; i++) {
      const found = values[i]!;
      const isIn = relation === '>=' ? found >= bound : relation === '<=' ? found <= bound : relation === '>' ? found > bound : found < bound;
      if (!isIn) mask[i] = 0;
    }
  }

  /** How well each latent matches, 0 where it does not; null without a query. */
  private async search(text: string): Promise<Uint16Array | null> {
    if (!parseQuery(text).length) return null;
    const [words, entries] = await Promise.all([this.allWords(), this.allEntries()]);
    const folded = words.map((word) => word.toLowerCase());
    const plans = parseQuery(text).map(([column, piece]) => joinSpans(planSpans(folded, entries, column, piece)));
    const bytes = plans.flat().reduce((sum, { start, stop }) => sum + stop - start, 0);
    if (bytes > MAX_BYTES) {
      throw new Problem(`This search would read ${Math.round(bytes / 1e6)} MB of the index from a host without a server.`, 'Use longer pieces, or open the bundle with `interp serve`.');
    }
    const total = new Uint16Array(this.bundle.d_sae);
    for (const [part, spans] of plans.entries()) {
      const found = new Uint8Array(total.length);
      await Promise.all(
        spans.map(async ({ start, stop, inside }) => {
          const data = await this.range('search/postings.bin', start, stop);
          for (const span of inside) markLatents(data.slice(span.start - start, span.stop - start), span.width, found, span.weight);
        }),
      );
      for (let i = 0; i < total.length; i++) total[i] = found[i] && (total[i] || part === 0) ? total[i]! + found[i]! : 0;
    }
    return total;
  }

  private keep(key: string, make: () => Promise<Uint32Array>): Promise<Uint32Array> {
    const found = this.kept.get(key);
    if (found) return found;
    const made = make();
    this.kept.set(key, made);
    made.catch(() => this.kept.delete(key));
    const oldest = this.kept.keys().next().value;
    if (this.kept.size > KEPT && oldest !== undefined) this.kept.delete(oldest);
    return made;
  }

  private allWords(): Promise<string[]> {
    this.words ??= this.file('words.json').then(async (response) => ((await response.json()) as { words: string[] }).words);
    return this.words;
  }

  private allEntries(): Promise<number[]> {
    this.entries ??= this.file('search/postings.idx').then(async (response) => Array.from(new BigUint64Array(await response.arrayBuffer()), Number));
    return this.entries;
  }
}

function isPlain(state: ListState): boolean {
  return !state.filters.length && !state.text.trim();
}

function parseFilter(text: string): { name: string; relation: string; value: number } {
  const found = CONDITION.exec(text.trim());
  if (!found) throw new Problem(`'${text}' is no filter; they look like 'max>=3.5', 'frequency<1e-3' or 'frequency<0.1%'.`, CHANGE, 400);
  return { name: found[1]!, relation: found[2]!, value: Number(found[3]) / (found[4] ? 100 : 1) };
}

/** Cut a query into [column or '', text], as the server does; only a server has labels. */
export function parseQuery(query: string, hasLabels = false): [string, string][] {
  const parts = [...query.matchAll(/(?:(\w+):)?(?:"([^"]*)"|(\S+))/g)].map(([, column = '', quoted, plain]): [string, string] => {
    const text = quoted ?? plain ?? '';
    return column && !SEARCHED.includes(column) && !(hasLabels && column === 'label') ? ['', `${column}:${text}`] : [column, text];
  });
  return parts.filter(([, text]) => text !== '');
}

function planSpans(folded: string[], entries: number[], column: string, piece: string): Span[] {
  const text = piece.toLowerCase();
  const isSingle = /^[a-z0-9]$/.test(text);
  const spans: Span[] = [];
  folded.forEach((word, number) => {
    if (!(isSingle ? word.trim() === text : word.includes(text))) return;
    const kind = compare(word, text);
    for (const place of column ? [SEARCHED.indexOf(column)] : [0, 1, 2]) {
      const entry = entries[3 * number + place]!; // where the list starts, times four, and which width
      const [start, stop] = [Math.floor(entry / 4), Math.floor(entries[3 * number + place + 1]! / 4)];
      if (stop > start) spans.push({ start, stop, width: WIDTHS[entry % 4]!, weight: 1 + 3 * (2 - place) + kind });
    }
  });
  return spans;
}

/** How close a token is to the text that it holds, spaces around both aside: it is the text (2), begins with it (1) or holds it (0). */
function compare(word: string, text: string): number {
  const [bare, wanted] = [word.trim(), text.trim()];
  return bare === wanted ? 2 : bare.startsWith(wanted) ? 1 : 0;
}

/** Spans that lie near each other are read together. */
function joinSpans(spans: Span[]): { start: number; stop: number; inside: Span[] }[] {
  const joined: { start: number; stop: number; inside: Span[] }[] = [];
  for (const span of spans) {
    const last = joined.at(-1);
    if (last && span.start - last.stop < NEAR_BYTES && span.stop - last.start < READ_BYTES) {
      last.stop = span.stop;
      last.inside.push(span);
    } else joined.push({ start: span.start, stop: span.stop, inside: [span] });
  }
  return joined;
}

/** A list holds steps from one latent to the next; the largest number of its width steps so far without naming one. */
export function markLatents(data: ArrayBuffer, width: number, found: Uint8Array, weight = 1): void {
  const numbers = width === 1 ? new Uint8Array(data) : width === 2 ? new Uint16Array(data) : new Uint32Array(data);
  const limit = 2 ** (8 * width) - 1;
  let latent = 0;
  for (const number of numbers) {
    latent += number;
    if (number !== limit && found[latent]! < weight) found[latent] = weight;
  }
}

export function readRow(data: DataView, at: number, latent: number, words: string[]): FeatureRow {
  const list = (start: number): string[] =>
    Array.from({ length: SHOWN_WORDS }, (_, i) => data.getUint32(at + start + 4 * i, true))
      .filter((number) => number !== NO_WORD)
      .map((number) => words[number] ?? '');
  const short = (offset: number): number => Number(data.getFloat32(at + offset, true).toPrecision(7));
  const count = data.getFloat64(at, true);
  const top_tokens = list(28);
  return {
    latent,
    is_dead: count === 0,
    count,
    frequency: short(8),
    mean: short(12),
    max: short(16),
    n_examples: data.getUint32(at + 20, true),
    decoder_norm: short(24),
    top_token: top_tokens[0] ?? '',
    top_tokens,
    top_logits: list(44),
    bottom_logits: list(60),
  };
}
