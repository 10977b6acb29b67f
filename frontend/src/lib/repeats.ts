import type { Window } from './types';

const NEAR = 8;

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
