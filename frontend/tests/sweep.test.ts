import { describe, expect, test } from 'vitest';
import { columnsOf, findBest, findDifferences, formatSweepRoute, isToldApart, listArms, parseSweepRoute, readComparison, showCell, showChange, showDeviation, sortArms, type Comparison } from '../src/lib/sweep';

const DATA: Comparison = {
  format: 'interp-assets/comparison-of-saes', version: 1, pipeline: 'demo', model: { name: 'm', revision: 'main' }, n_held_out: 100,
  saes: {
    name: ['a-seed0', 'a-seed1', 'b', 'x'], task: ['sae', 'sae', 'sae', 'sae'], hook_points: ['r.1', 'r.1', 'r.1', 'r.2'], target_hook_points: ['r.1', 'r.1', 'r.1', 'r.2'],
    architecture: ['topk', 'topk', 'topk', 'topk'], k: [8, 8, 16, 8], seed: [0, 1, 0, 0], options: [null, null, '{"decay_share": 0.4}', null],
    l0: [8, 8, 16, null], fvu: [0.19, 0.21, 0.1, null], dead_share: [0, 0.02, 0, null], status: ['measured', 'measured', 'measured', 'failed'], why: [null, null, null, 'nan'],
  },
  replicas: {
    members: [['a-seed0', 'a-seed1'], ['b'], ['x']],
    columns: { name: ['a', 'b', 'x'], n: [2, 1, 1], l0: [8, 16, null], fvu: [0.2, 0.1, null], fvu_deviation: [0.0141421, null, null], l0_deviation: [0, null, null], versus_best: ['+0.1', 'best', null] },
  },
  matches: [],
  curves: { b: { n_rows: [1, 2], loss: [1, 0.5], l0: [16, 16], fvu: [0.5, 0.1], dead_share: [0, 0] } },
};

describe('a comparison', () => {
  test('of another version, or with ragged columns, is a problem', () => {
    expect(readComparison(DATA)).toBe(DATA);
    for (const wrong of [null, { ...DATA, version: 2 }, { ...DATA, saes: { ...DATA.saes, k: [1] } }, { ...DATA, replicas: { ...DATA.replicas, columns: { n: [1] } } }]) {
      expect(() => readComparison(wrong)).toThrow();
    }
  });

  test('is folded over seeds, or not', () => {
    const folded = listArms(DATA, true);
    expect(folded.map(({ name, n, versus }) => [name, n, versus])).toEqual([['a', 2, '+0.1'], ['b', 1, 'best'], ['x', 1, null]]);
    expect(folded[0]!.values.fvu).toBe(0.2);
    expect(folded[0]!.deviations).toEqual({ fvu: 0.0141421, l0: 0 });
    expect(folded[0]!.values.seed).toBeNull();
    expect(folded.map((arm) => arm.group)).toEqual(['sae r.1', 'sae r.1', 'sae r.2']);
    expect(listArms(DATA, false).map((arm) => arm.n)).toEqual([1, 1, 1, 1]);
    expect(listArms(DATA, false)[3]!.why).toBe('nan');
  });

  test('shows only what differs', () => {
    const arms = listArms(DATA, true).slice(0, 2);
    expect(columnsOf(arms)).toEqual({ configured: ['k', 'options'], measured: ['l0', 'fvu', 'dead_share'] });
  });

  test('shows own metrics beside the others', () => {
    const own: Comparison = { ...DATA, saes: { ...DATA.saes, 'my.norm': [1, 3, 2, null] }, replicas: { ...DATA.replicas, columns: { ...DATA.replicas.columns, 'my.norm': [2, 2, null], 'my.norm_deviation': [1.4, null, null] } } };
    const arms = listArms(own, true).slice(0, 2);
    expect(columnsOf(arms).measured).toEqual(['l0', 'fvu', 'dead_share', 'my.norm']);
    expect(arms[0]!.deviations['my.norm']).toBe(1.4);
  });

  test('sorts with what is missing last', () => {
    const arms = listArms(DATA, false);
    expect(sortArms(arms, 'fvu', false).map((arm) => arm.name)).toEqual(['b', 'a-seed0', 'a-seed1', 'x']);
    expect(sortArms(arms, 'fvu', true).map((arm) => arm.name)).toEqual(['a-seed1', 'a-seed0', 'b', 'x']);
  });

  test('names the best at their L0', () => {
    expect(findBest(listArms(DATA, false)).map((arm) => arm.name)).toEqual(['a-seed0', 'b']);
  });

  test('names what two differ in, option by option, and what is noise', () => {
    const [a, b] = listArms(DATA, true) as [never, never];
    expect(findDifferences(a, b)).toEqual([{ field: 'k', a: '8', b: '16' }, { field: 'option decay_share', a: 'not set', b: '0.4' }]);
    expect(isToldApart(a, b, 'fvu')).toBeNull();
    const with2 = (fvu: number, fvu_deviation: number): never => ({ values: { fvu }, deviations: { fvu: fvu_deviation } }) as never;
    expect(isToldApart(with2(0.2, 0.01), with2(0.219, 0.01), 'fvu')).toBe(false);
    expect(isToldApart(with2(0.2, 0.01), with2(0.221, 0.01), 'fvu')).toBe(true);
  });

  test('writes cells as people read them', () => {
    expect([showCell('k', 1024), showCell('fvu', 0.123456), showCell('dead_share', 0.034), showCell('fvu', null), showCell('architecture', 'topk')]).toEqual(['1,024', '0.123', '3.4 %', '–', 'topk']);
    expect([showChange('dead_share', -0.005), showChange('fvu', 0.02), showChange('k', 0), showDeviation('fvu', 0.0014142)]).toEqual(['−0.50 %', '+0.0200', '0', '0.0014']);
  });
});

describe('its address', () => {
  test('is the whole state', () => {
    const route = { pipeline: 'a b', group: 'sae r.1', by: 'l0', isDescending: true, isEach: true, curve: 'loss' as const, arms: ['x', 'y&z'] };
    expect(parseSweepRoute(formatSweepRoute(route))).toEqual(route);
    expect(formatSweepRoute({ pipeline: 'demo' })).toBe('#/sweep/demo');
    expect(parseSweepRoute('#/sweep/demo')).toEqual({ pipeline: 'demo', group: '', by: 'fvu', isDescending: false, isEach: false, curve: 'fvu', arms: [] });
    expect(parseSweepRoute('#/bundle/3')).toBeNull();
  });
});
