import { describe, expect, test } from 'vitest';
import { formatBytes, formatOneIn, formatShare, formatShort, formatTick, formatValue } from '../src/lib/format';
import { crowdAtStart, examplesBetween, findRepeats } from '../src/lib/examples';
import { countTicks, intensity, linearTicks, logHeight, logPlace, logTicks } from '../src/lib/scale';
import type { FeatureRecord, Window } from '../src/lib/types';

describe('numbers for people', () => {
  test.each([[0, '0'], [1, '1.00'], [11.74, '11.7'], [0.0325, '0.0325'], [-1.5, '−1.50'], [1234.5, '1,235'], [0.00001234, '1.2e−5'], [2.5e7, '2.5e7']])(
    'value %f is written %s',
    (value, text) => expect(formatValue(value)).toBe(text),
  );
  test.each([[0, '0'], [2, '2'], [0.05, '0.05'], [-0.5, '−0.5'], [0.0001, '1e−4'], [100000, '1e5']])('tick %f is written %s', (value, text) => expect(formatTick(value)).toBe(text));
  test.each([[0, '0 %'], [1, '100 %'], [0.934, '93 %'], [0.0341, '3.4 %'], [0.00012, '0.012 %'], [1.2e-7, '1.2e−5 %']])('share %f is written %s', (value, text) =>
    expect(formatShare(value)).toBe(text),
  );
  test('a rare feature is told as one in many', () => {
    expect(formatOneIn(0.0005)).toBe('1 in 2k');
    expect(formatOneIn(0)).toBe('never');
  });
  test('large counts are short', () => expect([formatShort(999), formatShort(12_345_678), formatShort(1e10)]).toEqual(['999', '12.3M', '10B']));
  test('bytes have binary units', () => expect(formatBytes(3 * 1024 * 1024)).toBe('3 MiB'));
});

describe('scales', () => {
  test('no firing has no colour, a weak one has some, the strongest has all', () => {
    expect(intensity(0, 5)).toBe(0);
    expect(intensity(0.001, 5)).toBeGreaterThan(0.1);
    expect(intensity(5, 5)).toBe(1);
    expect(intensity(9, 5)).toBe(1);
    expect(intensity(1, 0)).toBe(0);
  });
  test('a single firing is seen beside a million', () => {
    expect(logHeight(1, 1e6)).toBeGreaterThan(0.04);
    expect(logHeight(0, 1e6)).toBe(0);
    expect(logHeight(1e6, 1e6)).toBe(1);
  });
  test('ticks are round and inside', () => {
    expect(linearTicks(-1.75, 3.21)).toEqual([-1, 0, 1, 2, 3]);
    expect(linearTicks(2, 2)).toEqual([2]);
    expect(logTicks(0.009, 0.06)).toEqual([0.01, 0.02, 0.05]);
    expect(logTicks(28, 64)).toEqual([30, 40, 50, 60]);
    expect(logTicks(1e-7, 1, 5)).toEqual([1e-6, 1e-4, 1e-2, 1]);
    expect(logTicks(0, 1)).toEqual([]);
    expect(countTicks(1500)).toEqual([1, 10, 100, 1000]);
  });
  test('the middle of a logarithmic axis is the geometric mean', () => expect(logPlace(10, 1, 100)).toBeCloseTo(0.5));
});

const window = (tokens: number[], peak: number, activation = 1, row = 0): Window => ({ row: [0, row], document: '', tokens, peak, position: row, activation, activations: [], masked: [] });

test('a second example with the same tokens around its peak is a repeat', () => {
  expect(findRepeats([window([1, 2, 3], 1), window([1, 2, 4], 1), window([1, 2, 3], 1)])).toEqual([false, false, true]);
});

test('examples that crowd at the start of their contexts are counted, from half of them on', () => {
  const at = (...positions: number[]): Window[] => positions.map((position) => ({ ...window([1], 0), position }));
  expect(crowdAtStart(at(0, 3, 4, 90))).toBe(2);
  expect(crowdAtStart(at(0, 4, 50, 90))).toBeNull();
  expect(crowdAtStart(at(0, 1, 2))).toBeNull();
});

test('a bar of the histogram opens its examples, each once', () => {
  const [weak, middle, strong] = [window([1], 0, 1, 1), window([1], 0, 2, 2), window([1], 0, 3, 3)];
  const record = { examples: { top: [strong, middle], intervals: [{ low: 1, high: 3, examples: [middle, weak] }], random: [weak] } } as unknown as FeatureRecord;
  expect(examplesBetween(record, 1, 3)).toEqual([middle, weak]);
});
