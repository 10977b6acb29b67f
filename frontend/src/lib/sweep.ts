/** The SAEs of a pipeline beside each other: what `sweeps/<pipeline>.json` says, and what pages make of it. See docs/formats/comparison.md. */
import { Memory, ask } from './api';
import { formatCount, formatShare, formatValue } from './format';
import { Problem } from './problem';

const FORMAT = 'interp-assets/comparison-of-saes';
const VERSION = 1;

export type Cell = string | number | null;
export type Columns = Record<string, Cell[]>;

export interface Comparison {
  format: string;
  version: number;
  pipeline: string;
  model: { name: string; revision: string };
  /** Rows that the measured SAEs were measured on; null where not all were on as many. */
  n_held_out: number | null;
  saes: Columns;
  replicas: { members: string[][]; columns: Columns };
  /** Pairs of SAEs whose latents were matched, in both directions. */
  matches: Match[];
  curves: Record<string, Record<CurveName | 'n_rows', (number | null)[]>>;
}

/** What is known of the latents of one SAE beside their nearest in another; `best` are the mutual ones that fire most alike. */
export interface Match {
  sae: string;
  other_sae: string;
  n_latents: number;
  n_held_out: number;
  mean_cosine: number;
  'share_above_0.7': number;
  'share_above_0.9': number;
  share_mutual: number;
  best: { latent: number[]; other_latent: number[]; cosine: number[]; correlation: (number | null)[]; n_fired: (number | null)[]; n_other_fired: (number | null)[] };
}

/** A line of the table: an SAE, or a recipe with its replicas. */
export interface Arm {
  name: string;
  /** SAEs behind it. */
  members: string[];
  status: string;
  why: string | null;
  n: number;
  values: Record<string, Cell>;
  /** Deviations of single trainings, by measure; absent of one. */
  deviations: Record<string, number>;
  /** SAEs of one group do the same thing, so that their numbers can be compared. */
  group: string;
  versus: string | null;
}

export const CURVES = { fvu: 'FVU', loss: 'loss', l0: 'L0', dead_share: 'dead latents' } as const;
export type CurveName = keyof typeof CURVES;

/** What is configured, in the order of the table, and what was measured. */
const CONFIGURED = ['hook_points', 'target_hook_points', 'task', 'architecture', 'd_sae', 'k', 'sparsity_coefficient', 'learning_rate', 'batch_rows', 'n_rows', 'dead_after_rows', 'product_dtype', 'seed', 'options'];
export const MEASURES: Record<string, string> = { l0: 'L0', fvu: 'FVU', ce_recovered: 'CE recovered', kl: 'KL', dead_share: 'dead', train_fvu: 'FVU in training', rows_per_s: 'rows/s' };
const SHARES = new Set(['dead_share', 'ce_recovered']);
const GROUPED = ['task', 'hook_points', 'target_hook_points'];

const kept = new Memory<Comparison>(4);

export function getComparison(name: string): Promise<Comparison> {
  return kept.get(name, async () => readComparison(await (await ask(`sweeps/${encodeURIComponent(name)}.json`, { cache: 'no-store' })).json()));
}

/** Check what came. */
export function readComparison(found: unknown): Comparison {
  const read = found as Comparison | null;
  if (read?.format !== FORMAT || read.version !== VERSION) {
    throw new Problem(`The comparison is '${read?.format}' version ${read?.version}; these pages read version ${VERSION}.`, (read?.version ?? 0) > VERSION ? 'Upgrade interp-assets.' : 'Export the site again.');
  }
  const lengths = new Set(Object.values(read.saes).map((column) => column.length));
  if (lengths.size !== 1 || Object.values(read.replicas.columns).some((column) => column.length !== read.replicas.members.length)) {
    throw new Problem('The columns of the comparison have unequal lengths.', 'Export the site again, or restart `interp serve`.');
  }
  return read;
}

/** Every SAE as a line, or every recipe. */
export function listArms(data: Comparison, isFolded: boolean): Arm[] {
  const names = data.saes.name as string[];
  const place = new Map(names.map((name, i) => [name, i]));
  const ofSae = (i: number): Record<string, Cell> => Object.fromEntries(Object.entries(data.saes).map(([key, column]) => [key, column[i] ?? null]));
  const groupOf = (values: Record<string, Cell>): string => {
    const [task, from, to] = GROUPED.map((key) => String(values[key] ?? ''));
    return from === to ? `${task} ${from}` : `${task} ${from} to ${to}`;
  };
  if (!isFolded) {
    return names.map((name, i) => {
      const values = ofSae(i);
      return { name, members: [name], status: String(values.status), why: values.why as string | null, n: 1, values, deviations: {}, group: groupOf(values), versus: null };
    });
  }
  return data.replicas.members.map((members, i) => {
    const each = members.map((name) => ofSae(place.get(name)!));
    const folded = Object.fromEntries(Object.entries(data.replicas.columns).map(([key, column]) => [key, column[i] ?? null]));
    const values: Record<string, Cell> = { ...each[0]!, ...folded, ...(members.length > 1 ? { seed: null } : {}) };
    values.rows_per_s = mean(each.map((one) => one.rows_per_s as number | null));
    const deviations = Object.fromEntries(Object.keys(folded).flatMap((key) => (typeof folded[`${key}_deviation`] === 'number' ? [[key, folded[`${key}_deviation`] as number]] : [])));
    const statuses = new Set(each.map((one) => String(one.status)));
    return { name: String(folded.name), members, status: statuses.size === 1 ? [...statuses][0]! : 'mixed', why: (each.find((one) => one.why)?.why ?? null) as string | null, n: members.length, values, deviations, group: groupOf(values), versus: folded.versus_best as string | null };
  });
}

export const hasReplicas = (data: Comparison): boolean => data.replicas.members.some((members) => members.length > 1);

/** What is measured: the columns of the table, then those of one's own metrics, which are called `my.half_norm`. */
export function measuresOf(arms: Arm[]): string[] {
  const own = Object.keys(arms[0]?.values ?? {}).filter((key) => key.includes('.') && !key.endsWith('_deviation'));
  return [...Object.keys(MEASURES), ...own];
}

/** What is configured and not alike for all, then what is measured at all: only what differs is a column. */
export function columnsOf(arms: Arm[]): { configured: string[]; measured: string[] } {
  const whole = arms.filter((arm) => !arm.why); // one that ended early has fewer rows than it was configured with
  const differs = (key: string): boolean => new Set((key === 'n_rows' ? whole : arms).map((arm) => arm.values[key] ?? null)).size > 1;
  const isThere = (key: string): boolean => arms.some((arm) => arm.values[key] !== null && arm.values[key] !== undefined);
  const isWhole = arms.every((arm) => arm.values.fvu !== null);
  const isFolded = arms.some((arm) => arm.n > 1);
  return { configured: CONFIGURED.filter((key) => differs(key) && (key !== 'seed' || !isFolded)), measured: measuresOf(arms).filter((key) => isThere(key) && (key !== 'train_fvu' || !isWhole)) };
}

/** Sorted by a column; what has no value stands last either way. */
export function sortArms(arms: Arm[], by: string, isDescending: boolean): Arm[] {
  const valueOf = (arm: Arm): Cell => (by === 'name' ? arm.name : by === 'n' ? arm.n : by === 'status' ? arm.status : (arm.values[by] ?? null));
  return arms.toSorted((a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    if (x === null || y === null) return Number(x === null) - Number(y === null);
    const order = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y), 'en', { numeric: true });
    return isDescending ? -order : order;
  });
}

/** Those of which no other of the group is as sparse and more exact, or sparser and as exact; by L0. */
export function findBest(arms: Arm[]): Arm[] {
  const measured = arms.filter((arm) => typeof arm.values.l0 === 'number' && typeof arm.values.fvu === 'number');
  const sorted = measured.toSorted((a, b) => (a.values.l0 as number) - (b.values.l0 as number) || (a.values.fvu as number) - (b.values.fvu as number));
  let least = Infinity;
  return sorted.filter((arm) => {
    const isBetter = (arm.values.fvu as number) < least;
    if (isBetter) least = arm.values.fvu as number;
    return isBetter;
  });
}

/** What two lines are configured otherwise in: field, before, after; options one by one. */
export function findDifferences(a: Arm, b: Arm): { field: string; a: string; b: string }[] {
  const fields = CONFIGURED.filter((key) => key !== 'options' && (key !== 'seed' || (a.n === 1 && b.n === 1))).map((key) => [key, a.values[key], b.values[key]] as const);
  const options = [a, b].map((arm) => JSON.parse((arm.values.options as string | null) ?? '{}') as Record<string, unknown>);
  const named = [...new Set(options.flatMap((each) => Object.keys(each)))].map((key) => [`option ${key}`, options[0]![key], options[1]![key]] as const);
  const say = (value: unknown): string => (value === undefined || value === null ? 'not set' : typeof value === 'object' ? JSON.stringify(value) : String(value));
  return [...fields, ...named].filter(([, x, y]) => say(x) !== say(y)).map(([field, x, y]) => ({ field, a: say(x), b: say(y) }));
}

/** Deviations that two means must be apart to be told from each other; as `train/results/replicas.py` has it. */
const NOISE = 2;

/** Whether a difference is more than noise; null where one of both was trained once. */
export function isToldApart(a: Arm, b: Arm, measure: string): boolean | null {
  const [x, y, s, t] = [a.values[measure], b.values[measure], a.deviations[measure], b.deviations[measure]];
  if (typeof x !== 'number' || typeof y !== 'number' || s === undefined || t === undefined) return null;
  return Math.abs(x - y) >= NOISE * Math.sqrt((s ** 2 + t ** 2) / 2);
}

/** A value as the table shows it. */
export function showCell(key: string, value: Cell): string {
  if (value === null || value === undefined) return '–';
  if (typeof value === 'string') return value;
  if (SHARES.has(key)) return formatShare(value);
  return Number.isInteger(value) && !(key in MEASURES) ? formatCount(value) : formatValue(value);
}

/** A deviation: two digits say all that three trainings know. */
export const showDeviation = (key: string, value: number): string => (SHARES.has(key) ? formatShare(value) : value !== 0 && value < 1e-5 ? value.toExponential(0).replace('-', '−') : String(Number(value.toPrecision(2))));

/** A difference, with its sign. */
export const showChange = (key: string, value: number): string => (value === 0 ? '0' : `${value > 0 ? '+' : '−'}${showCell(key, Math.abs(value))}`);

function mean(values: (number | null)[]): number | null {
  const known = values.filter((value): value is number => typeof value === 'number');
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/**
 * Addresses, the whole state of the page:
 *
 *     #/sweep/<pipeline>?group=sae resid_post.2&by=fvu&desc=1&each=1&curve=loss&arm=a&arm=b
 */
export interface SweepRoute {
  pipeline: string;
  group: string;
  by: string;
  isDescending: boolean;
  /** Every SAE by itself, where recipes have replicas. */
  isEach: boolean;
  curve: CurveName;
  /** Chosen lines, in the order in which they were. */
  arms: string[];
}

export function parseSweepRoute(hash: string): SweepRoute | null {
  const [path = '', query = ''] = hash.replace(/^#\/?/, '').split('?', 2);
  const [place = '', name = ''] = path.split('/');
  if (place !== 'sweep' || !name) return null;
  const given = new URLSearchParams(query);
  const curve = given.get('curve') ?? '';
  return {
    pipeline: decodePart(name),
    group: given.get('group') ?? '',
    by: given.get('by') ?? 'fvu',
    isDescending: given.get('desc') === '1',
    isEach: given.get('each') === '1',
    curve: curve in CURVES ? (curve as CurveName) : 'fvu',
    arms: given.getAll('arm'),
  };
}

export function formatSweepRoute(route: Partial<SweepRoute> & { pipeline: string }): string {
  const query = new URLSearchParams();
  if (route.group) query.set('group', route.group);
  if (route.by && route.by !== 'fvu') query.set('by', route.by);
  if (route.isDescending) query.set('desc', '1');
  if (route.isEach) query.set('each', '1');
  if (route.curve && route.curve !== 'fvu') query.set('curve', route.curve);
  for (const arm of route.arms ?? []) query.append('arm', arm);
  const text = query.toString();
  return `#/sweep/${encodeURIComponent(route.pipeline)}${text ? `?${text}` : ''}`;
}

function decodePart(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
