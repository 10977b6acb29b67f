import { describe, expect, test } from 'vitest';
import { parseDoses, rangeOf, shapeOf, strengthNumber, summarize, type DoseCurve } from '../src/lib/doses';

const CURVE: DoseCurve = {
  recipe: 'golden', edits: [], strengths: ['10 max', '-2 max', '0 max'], prompts: ['a'], n_texts: 4, new_tokens: 8, temperature: 0,
  outcomes: { kl: { feature: { mean: [3, 1, 0], low: [2, 0.5, 0], high: [4, 2, 0] }, other: { mean: [0.5, null, 0], low: [0.4, null, 0], high: [0.6, null, 0] } } },
  texts: [],
};
const FILE = { format: 'interp-assets/dose-curves', version: 1, latent: 3, curves: [CURVE] };

describe('files of dose curves', () => {
  test('are read as they are', () => expect(parseDoses(FILE, 3)).toEqual([CURVE]));

  test('what is none, of another latent or version, or too short is a problem that names the file', () => {
    const short = { ...CURVE, outcomes: { kl: { feature: { mean: [1], low: [1], high: [1] } } } };
    for (const wrong of [null, {}, { ...FILE, version: 2 }, { ...FILE, latent: 4 }, { ...FILE, curves: {} }, { ...FILE, curves: [null] }, { ...FILE, curves: [short] }]) {
      expect(() => parseDoses(wrong, 3)).toThrow(/doses\/3\.json/);
    }
  });
});

describe('a curve', () => {
  test('stands over the numbers of its strengths', () => expect(['-2 max', 'q0.99', '0.5 norm'].map(strengthNumber)).toEqual([-2, 0.99, 0.5]));

  test('runs from left to right, and leaves out what could not be measured', () => {
    const { feature, other } = CURVE.outcomes.kl!;
    const numbers = CURVE.strengths.map(strengthNumber);
    expect(shapeOf(feature!, numbers).line).toEqual([[-2, 1], [0, 0], [10, 3]]);
    expect(shapeOf(other!, numbers)).toEqual({ line: [[0, 0], [10, 0.5]], band: [[0, 0], [10, 0.4], [10, 0.6], [0, 0]] });
    expect(rangeOf([feature!, other!])).toEqual([0, 4]);
    expect(rangeOf([])).toEqual([0, 1]);
  });

  test('is one sentence too', () => expect(summarize(CURVE, 'kl', String)).toBe('kl at 10 max: feature 3 (2 to 4), other 0.5 (0.4 to 0.6)'));
});
