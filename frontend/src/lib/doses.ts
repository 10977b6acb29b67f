/** Dose curves of a bundle: what steering by a feature did beside controls, checked before it is drawn. See docs/formats/feature_bundle.md. */
import { Problem } from './problem';

export interface Curve {
  mean: (number | null)[];
  low: (number | null)[];
  high: (number | null)[];
}

export interface DoseCurve {
  recipe: string;
  edits: Record<string, unknown>[];
  strengths: string[];
  prompts: string[];
  n_texts: number;
  new_tokens: number;
  temperature: number;
  outcomes: Record<string, Record<string, Curve>>;
  texts: { strength: number; prompt: number; text: string }[];
}

/** Arms in the order of the legend, and what each is. */
export const ARMS: Record<string, string> = {
  feature: 'the feature is set to the strength',
  'feature - controls': 'the feature less the mean of another and random',
  other: 'another live feature that fires about as often, set likewise',
  random: 'a random direction, moved as far',
  flip: 'the opposite direction',
  zero: 'the feature is set to 0',
};

/** Outcomes and what they are; others are shown by their names. */
export const OUTCOMES: Record<string, string> = {
  kl: 'KL divergence of the edited prediction from the unedited one, nats',
  perplexity: 'perplexity of the text under the unedited model',
  distinct_2: 'share of different pairs of neighbouring tokens',
  f_after: 'what the latent reads after the edits',
  moved: 'how far the activation moved, of its length',
  metric: 'log probability of the named tokens, nats',
};

/** Check a file of curves. */
export function parseDoses(content: unknown, latent: number): DoseCurve[] {
  const file = content as { format?: string; version?: number; latent?: number; curves?: DoseCurve[] };
  const where = `doses/${latent}.json`;
  if (file?.format !== 'interp-assets/dose-curves') throw new Problem(`${where} holds no dose curves.`, 'Materialize `feature_browser` again.');
  if (file.version !== 1) throw new Problem(`${where} has version ${file.version}; these pages read version 1.`, (file.version ?? 0) > 1 ? 'Upgrade interp-assets.' : 'Materialize `feature_browser` again.');
  const isCurve = (curve: DoseCurve): boolean =>
    Array.isArray(curve?.strengths) && Array.isArray(curve.prompts) && Array.isArray(curve.texts) && Object.values(curve.outcomes ?? {}).every((arms) => Object.values(arms).every((arm) => [arm.mean, arm.low, arm.high].every((numbers) => numbers?.length === curve.strengths.length)));
  if (file.latent !== latent || !Array.isArray(file.curves) || !file.curves.every(isCurve)) throw new Problem(`${where} is not what the bundle says.`, 'Run `interp verify` on the bundle and materialize `feature_browser` again.');
  return file.curves;
}

/** The number of a strength, by which it stands on the axis: `-2 max`, `q0.99`. */
export const strengthNumber = (strength: string): number => Number.parseFloat(strength.replace(/^q/, ''));

/** The range of all means and intervals of some arms, with room for zero. */
export function rangeOf(curves: Curve[]): [number, number] {
  const numbers = [0, ...curves.flatMap(({ mean, low, high }) => [...mean, ...low, ...high])].filter((value) => value !== null);
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  return high > low ? [low, high] : [low, low + 1];
}

/** Points of a line, and of the band around it, where a mean is known; both in units of the data. */
export function shapeOf(curve: Curve, numbers: number[]): { line: [number, number][]; band: [number, number][] } {
  const known = numbers.map((_, i) => i).filter((i) => curve.mean[i] !== null).sort((a, b) => numbers[a]! - numbers[b]!);
  const edge = (name: 'low' | 'high', i: number): [number, number] => [numbers[i]!, curve[name][i] ?? curve.mean[i]!];
  return { line: known.map((i) => [numbers[i]!, curve.mean[i]!]), band: [...known.map((i) => edge('low', i)), ...known.toReversed().map((i) => edge('high', i))] };
}

/** One sentence for whoever cannot see the curve: the feature beside its controls at the largest strength. */
export function summarize(curve: DoseCurve, outcome: string, write: (value: number) => string): string {
  const numbers = curve.strengths.map(strengthNumber);
  const last = numbers.indexOf(Math.max(...numbers));
  const arms = Object.entries(curve.outcomes[outcome] ?? {}).filter(([, { mean }]) => mean[last] !== null);
  return `${outcome} at ${curve.strengths[last]}: ${arms.map(([arm, { mean, low, high }]) => `${arm} ${write(mean[last]!)} (${write(low[last] ?? mean[last]!)} to ${write(high[last] ?? mean[last]!)})`).join(', ')}`;
}
