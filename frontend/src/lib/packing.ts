/** A packed record becomes a record: columns become windows, as `interp_assets/visualize/packing.py` has it. */
import { decodeDecimals, decodeNumbers } from './digits';
import type { FeatureRecord, Logits, Window } from './types';

const PEAK_DIGITS = 4;
const DIGITS = 3;
const BIN_SHIFT = 21;

type Pairs = [number[], number[]];

export interface PackedRecord {
  version: number;
  latent: number;
  statistics: Omit<FeatureRecord['statistics'], 'histogram'> & { histogram: { first: number; counts: number[] } };
  lists: { top: string; intervals: [number, number, string][]; random: string };
  windows: PackedWindows | null;
  logits: (Omit<Logits, 'top' | 'bottom'> & { top: Pairs; bottom: Pairs }) | null;
  logits_reason: string | null;
  neighbours: Pairs;
  coactivations: [number[], number[], number[]];
}

interface PackedWindows {
  documents: string[];
  document: string;
  shard: string;
  row: string;
  before: string;
  after: string;
  position: string;
  masked: Record<string, number[]>;
  exponent: number;
  peak: string;
  firings: string;
  gap: string;
  activation: string;
  tokens: string;
  roles?: { names: string[]; runs: string; gap: string; name: string };
}

/** Raises an error of any kind when the columns do not fit each other. `order` are the token ids by rank. */
export function unpackRecord(packed: PackedRecord, order: ArrayLike<number>): FeatureRecord {
  const windows = packed.windows ? unpackWindows(packed.windows, order) : [];
  const listed = (text: string): Window[] =>
    decodeNumbers(text).map((place) => {
      const window = windows[place];
      if (!window) throw new RangeError(`a list names window ${place} of ${windows.length}`);
      return window;
    });
  const { lists, logits, statistics } = packed;
  return {
    version: packed.version,
    latent: packed.latent,
    is_dead: statistics.count === 0,
    statistics: { ...statistics, histogram: { edges: edgesOf(statistics.histogram), counts: statistics.histogram.counts } },
    examples: {
      top: listed(lists.top),
      intervals: lists.intervals.map(([low, high, text]) => ({ low, high, examples: listed(text) })),
      random: listed(lists.random),
    },
    logits: logits && { ...logits, top: turn<[number, number]>(logits.top), bottom: turn<[number, number]>(logits.bottom) },
    logits_reason: packed.logits_reason,
    neighbours: turn<[number, number]>(packed.neighbours),
    coactivations: turn<[number, number, number]>(packed.coactivations),
  };
}

function unpackWindows(packed: PackedWindows, order: ArrayLike<number>): Window[] {
  const [document, shard, row, before, after, position, firings, gap, ranks] = [
    packed.document, packed.shard, packed.row, packed.before, packed.after, packed.position, packed.firings, packed.gap, packed.tokens,
  ].map(decodeNumbers) as [number[], number[], number[], number[], number[], number[], number[], number[], number[]];
  const peaks = decodeDecimals(packed.peak, packed.exponent, PEAK_DIGITS);
  const values = decodeDecimals(packed.activation, packed.exponent, DIGITS);
  checkLengths([document, shard, row, before, after, position, firings], peaks.length);
  checkLengths([gap, values], sum(firings));
  checkLengths([ranks], sum(before) + sum(after) + peaks.length);
  if (Array.isArray(packed.masked)) throw new TypeError('its masked places name no windows');
  const roles = packed.roles && unpackRoles(packed.roles, peaks.length);
  const windows: Window[] = [];
  let [token, firing, at, line] = [0, 0, 0, 0];
  for (const [i, peak] of before.entries()) {
    at += shard[i]!;
    line = i > 0 && shard[i] === 0 ? line + row[i]! : row[i]!;
    const length = peak + 1 + after[i]!;
    const activations: [number, number][] = [[peak, peaks[i]!]];
    for (let place = 0, end = firing + firings[i]!; firing < end; firing++) {
      place += gap[firing]!;
      activations.push([place, values[firing]!]);
    }
    const tokens = ranks.slice(token, token + length).map((rank) => order[rank]!);
    const name = packed.documents[document[i]!];
    if (name === undefined || tokens.includes(undefined!)) throw new RangeError(`window ${i} names a document or a token that is not there`);
    windows.push({
      row: [at, line],
      document: name,
      tokens,
      peak,
      position: position[i]!,
      activation: peaks[i]!,
      activations: activations.sort((a, b) => a[0] - b[0]),
      masked: packed.masked[i] ?? [],
      ...(roles ? { roles: roles[i]! } : {}),
    });
    token += length;
  }
  return windows;
}

function unpackRoles(packed: NonNullable<PackedWindows['roles']>, nWindows: number): [number, string][][] {
  const [runs, gap, name] = [packed.runs, packed.gap, packed.name].map(decodeNumbers) as [number[], number[], number[]];
  checkLengths([runs], nWindows);
  checkLengths([gap, name], sum(runs));
  let run = 0;
  return runs.map((count) => {
    let place = 0;
    return Array.from({ length: count }, (): [number, string] => {
      const role = packed.names[name[run]!];
      if (role === undefined) throw new RangeError(`a role is number ${name[run]} of ${packed.names.length}`);
      place += gap[run++]!;
      return [place, role];
    });
  });
}

/** Bins are quarter octaves: a float32's bits, shifted. */
function edgesOf({ first, counts }: { first: number; counts: number[] }): number[] {
  if (!counts.length) return [];
  const bits = Uint32Array.from({ length: counts.length + 1 }, (_, i) => ((first + i) << BIN_SHIFT) >>> 0);
  return Array.from(new Float32Array(bits.buffer), (edge) => Number(edge.toPrecision(4)));
}

/** Columns become rows. */
function turn<Row extends number[]>(columns: { [Place in keyof Row]: number[] }): Row[] {
  const [first] = columns as number[][];
  checkLengths(columns as number[][], first!.length);
  return first!.map((_, i) => columns.map((column) => column[i]) as number[] as Row);
}

function checkLengths(columns: number[][], expected: number): void {
  if (columns.some(({ length }) => length !== expected)) throw new RangeError(`its columns have ${columns.map(({ length }) => length).join(', ')} numbers, not ${expected}`);
}

const sum = (numbers: number[]): number => numbers.reduce((total, number) => total + number, 0);
