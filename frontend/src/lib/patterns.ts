/**
 * Patterns of attention: bytes become masses, masses become what a person looks at. See docs/formats/attention_pattern.md.
 *
 * A pattern is asked for lines: what a query looks at (a row), or what looks at a key (a column). Up to 1,024 tokens it is one triangle in memory;
 * above, a pyramid of tiles of which only those that are looked at are loaded.
 */
import { Problem } from './problem';

export const TILE = 256;
const REBUILD = 'Run `interp verify` on the bundle and materialize `prompt_patterns` and `attention_browser` again.';

/** Which side of an edge a chosen token is: where attention goes to (`query`), or what is looked at (`key`). */
export type Side = 'query' | 'key';
export type Sink = 'shown' | 'hidden' | 'renormalised';
export type Scale = 'linear' | 'sqrt' | 'log';

const MASSES = Float64Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);
/** A byte is the square root of a mass: 255 sqrt(p), rounded. */
export const massOf = (byte: number): number => MASSES[byte]!;

export async function gunzip(member: ArrayBuffer | Uint8Array<ArrayBuffer>, what: string): Promise<ArrayBuffer> {
  try {
    return await new Response(new Blob([member]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer();
  } catch {
    throw new Problem(`${what} is damaged or truncated.`, REBUILD);
  }
}

/** A whole square of bytes of a triangle, of a model that looks back only, or of all rows. */
export function unfoldTriangle(data: Uint8Array, n: number, bothWays: boolean, what: string): Uint8Array {
  const expected = bothWays ? n * n : (n * (n + 1)) / 2;
  if (data.length !== expected) throw new Problem(`${what} has ${data.length} edges; ${n} tokens have ${expected}.`, REBUILD);
  if (bothWays) return data;
  const square = new Uint8Array(n * n);
  for (let query = 0, at = 0; query < n; at += ++query) square.set(data.subarray(at, at + query + 1), query * n);
  return square;
}

/** Levels of a pyramid: the last one is a single tile. */
export function levelsOf(n: number): number {
  let levels = 1;
  while (Math.ceil(n / (TILE << (levels - 1))) > 1) levels++;
  return levels;
}

/** The place of a tile among the members of one head, the coarsest level first; -1 above the diagonal, where there is none. */
export function tilePlace(n: number, level: number, row: number, column: number, bothWays: boolean): number {
  const side = (at: number): number => Math.ceil(n / (TILE << at));
  if (!bothWays && column > row) return -1;
  let place = 0;
  for (let at = levelsOf(n) - 1; at > level; at--) place += bothWays ? side(at) ** 2 : (side(at) * (side(at) + 1)) / 2;
  return place + (bothWays ? row * side(level) + column : (row * (row + 1)) / 2 + column);
}

export const tilesOf = (n: number, bothWays: boolean): number => {
  const last = Math.ceil(n / TILE) - 1;
  return tilePlace(n, 0, last, last, bothWays) + 1;
};

/** Little-endian float16 numbers; browsers have no array of these everywhere. */
export function readHalves(halves: Uint16Array): Float32Array {
  return Float32Array.from(halves, (half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return exponent === 31 ? (fraction ? Number.NaN : sign * Infinity) : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
}

export interface Weights {
  /** What a key's mass is multiplied by; null for the pattern itself. */
  column: Float32Array | null;
  /** And a query's: of what adds to a target. */
  rows: Float32Array | null;
  sink: Sink;
  side: Side;
}

/**
 * One line of a pattern as it is shown: `masses` of a query over keys, or of a key over queries. `firsts` is what each query gives to the first
 * token: by it rows are renormalised where that is taken out.
 */
export function weigh(masses: Float32Array, place: number, weights: Weights, firsts: (query: number) => number): Float32Array {
  const shown = new Float32Array(masses.length);
  for (let i = 0; i < masses.length; i++) {
    const [query, key] = weights.side === 'query' ? [place, i] : [i, place];
    if (key === 0 && weights.sink !== 'shown') continue;
    const rest = weights.sink === 'renormalised' ? Math.max(1e-6, 1 - firsts(query)) : 1;
    shown[i] = (masses[i]! / rest) * (weights.column ? weights.column[key]! : 1) * (weights.rows ? weights.rows[query]! : 1);
  }
  return shown;
}

export interface Line {
  place: number;
  value: number;
  /** Share of the whole line that it and those before it have. */
  covered: number;
}

/** The strongest of a line, ties by place: what a table shows. What takes away counts by its size. */
export function strongest(values: ArrayLike<number>, n = 10): Line[] {
  const size = (i: number): number => Math.abs(values[i]!);
  const order = Array.from(values, (_, i) => i).filter(size);
  order.sort((a, b) => size(b) - size(a) || a - b);
  const total = order.reduce((sum, i) => sum + size(i), 0);
  let sum = 0;
  return order.slice(0, n).map((place) => ({ place, value: values[place]!, covered: (sum += size(place)) / total }));
}

/** The rank of one place in a line by size, from 1. */
export function rankOf(values: ArrayLike<number>, place: number): number {
  return 1 + Array.from(values).filter((value) => Math.abs(value) > Math.abs(values[place]!)).length;
}

/** How strongly a value is drawn, 0 to 1, of the largest there is. */
export function strength(value: number, most: number, scale: Scale): number {
  const share = most > 0 ? Math.min(1, Math.max(0, value / most)) : 0;
  if (scale === 'linear') return share;
  return scale === 'sqrt' ? Math.sqrt(share) : share <= 1e-4 ? 0 : 1 + Math.log10(share) / 4;
}

/** Tokens between a common beginning and end that are compared with each other; of longer texts no more are aligned. */
const ALIGNED = 2048;

/** Pairs of places of two texts whose tokens are the same, in order: what begins and ends alike, and a longest common subsequence between. */
export function alignTokens(left: ArrayLike<number>, right: ArrayLike<number>): [number, number][] {
  const shorter = Math.min(left.length, right.length);
  let [head, tail] = [0, 0];
  while (head < shorter && left[head] === right[head]) head++;
  while (tail < shorter - head && left[left.length - 1 - tail] === right[right.length - 1 - tail]) tail++;
  const between = (of: ArrayLike<number>): number[] => Array.from({ length: Math.min(ALIGNED, of.length - head - tail) }, (_, i) => of[head + i]!);
  return [
    ...Array.from({ length: head }, (_, i): [number, number] => [i, i]),
    ...alignMiddle(between(left), between(right)).map(([i, j]): [number, number] => [head + i, head + j]),
    ...Array.from({ length: tail }, (_, i): [number, number] => [left.length - tail + i, right.length - tail + i]),
  ];
}

function alignMiddle(left: number[], right: number[]): [number, number][] {
  const [n, m] = [left.length, right.length];
  const best = new Uint16Array((n + 1) * (m + 1));
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      const at = i * (m + 1) + j;
      best[at] = left[i] === right[j] ? best[at + m + 2]! + 1 : Math.max(best[at + m + 1]!, best[at + 1]!);
    }
  }
  const pairs: [number, number][] = [];
  for (let i = 0, j = 0; i < n && j < m; ) {
    if (left[i] === right[j]) pairs.push([i++, j++]);
    else if (best[(i + 1) * (m + 1) + j]! >= best[i * (m + 1) + j + 1]!) i++;
    else j++;
  }
  return pairs;
}

/** Runs of places that are shown of a long context: those that are needed, with a few around, and what lies near enough to join. */
export function cutRuns(needed: Iterable<number>, n: number, around = 2): [number, number][] {
  const runs: [number, number][] = [];
  for (const place of [...new Set(needed)].sort((a, b) => a - b)) {
    const [start, stop] = [Math.max(0, place - around), Math.min(n, place + around + 1)];
    const last = runs.at(-1);
    if (last && start <= last[1] + 2) last[1] = Math.max(last[1], stop);
    else runs.push([start, stop]);
  }
  return runs;
}
