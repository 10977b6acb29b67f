/** Examples are compared and gathered. */
import type { FeatureRecord, Window } from './types';

const NEAR = 8;
/** Places of a context that count as its start. */
export const START = 4;
const FEWEST = 4;

/** How many of some windows have their peak at the start of a context; null where that is less than half of them, or where there are few. */
export function crowdAtStart(windows: Window[]): number | null {
  const n = windows.filter((window) => window.position < START).length;
  return windows.length >= FEWEST && 2 * n >= windows.length ? n : null;
}

/** Say for each window whether an earlier one has the same tokens around its peak: copied code and boilerplate prove nothing twice. */
export function findRepeats(windows: Window[]): boolean[] {
  const seen = new Set<string>();
  return windows.map((window) => {
    const key = window.tokens.slice(Math.max(0, window.peak - NEAR), window.peak + NEAR + 1).join(' ');
    const isRepeat = seen.has(key);
    seen.add(key);
    return isRepeat;
  });
}

/** All examples of a record with an activation in [low, high), each once, strongest first. */
export function examplesBetween(record: FeatureRecord, low: number, high: number): Window[] {
  const all = [...record.examples.top, ...record.examples.intervals.flatMap((interval) => interval.examples), ...record.examples.random];
  const found = new Map(all.filter((window) => window.activation >= low && window.activation < high).map((window) => [window.row.join(), window]));
  return [...found.values()].sort((a, b) => b.activation - a.activation);
}
