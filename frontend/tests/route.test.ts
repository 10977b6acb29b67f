import { describe, expect, test } from 'vitest';
import { DEFAULT_LIST, RELEVANCE, boundsOf, formatRoute, listParameters, parseBound, parseRoute, withBounds, withText } from '../src/lib/route';

describe('addresses', () => {
  test('the whole state survives a copied address', () => {
    const list = { sort: 'max', isDescending: true, life: 'all' as const, filters: ['max>=3', 'frequency<=0.01'], text: 'a&b #?"%" =', list: 'my list/é' };
    const address = formatRoute({ bundle: 'demo 1/é', latent: 17, list, isFull: true, range: [2, 2.5] });
    expect(parseRoute(address)).toEqual({ bundle: 'demo 1/é', latent: 17, other: null, view: null, isModels: false, list, at: null, isFull: true, range: [2, 2.5], steering: null });
  });

  test('a default list has a short address', () => expect(formatRoute({ bundle: 'demo', list: DEFAULT_LIST })).toBe('#/demo'));

  test('models have a page of their own, and no bundle', () => {
    expect(parseRoute('#/models')).toMatchObject({ bundle: null, isModels: true });
    expect(parseRoute('#/models/3')).toMatchObject({ bundle: 'models', latent: 3, isModels: false });
  });

  test('an empty address names nothing', () => expect(parseRoute('')).toMatchObject({ bundle: null, latent: null, list: DEFAULT_LIST }));

  test('nonsense where the number should be is kept as no number, for the page to say so', () => {
    expect(parseRoute('#/demo/abc').latent).toBeNaN();
    expect(parseRoute('#/demo/-1').latent).toBeNaN();
  });

  test('a range that is none is left out', () => expect(['#/a/1?range=3~2', '#/a/1?range=x', '#/a/1'].map((address) => parseRoute(address).range)).toEqual([null, null, null]));

  test('a broken escape does not break the page', () => expect(parseRoute('#/%E0%A4%A').bundle).toBe('%E0%A4%A'));
});

describe('the order of a search', () => {
  test('the best match stands first, until somebody chooses another order, and again when the query is gone', () => {
    const searched = withText(DEFAULT_LIST, 'def');
    expect(searched.sort).toBe(RELEVANCE);
    expect(withText(searched, '')).toEqual(DEFAULT_LIST);
    expect(withText({ ...DEFAULT_LIST, sort: 'max', isDescending: true }, 'def')).toMatchObject({ sort: 'max', isDescending: true });
    expect(withText({ ...searched, sort: 'latent' }, 'class').sort).toBe('latent');
  });

  test('its address says so only where it is not so', () => {
    expect(parseRoute('#/demo?q=def').list.sort).toBe(RELEVANCE);
    expect(formatRoute({ bundle: 'demo', list: withText(DEFAULT_LIST, 'def') })).toBe('#/demo?q=def');
    expect(formatRoute({ bundle: 'demo', list: { ...DEFAULT_LIST, text: 'def' } })).toBe('#/demo?sort=latent&q=def');
  });
});

describe('filters', () => {
  test.each([['0.005', 0.005], ['0.5 %', 0.005], ['5%', 0.05], ['5e-3', 0.005], ['.5', 0.5], ['1,000', 1000], ['−2', -2], ['28.5 %', 0.285]])('%s is understood', (text, value) => {
    expect(parseBound(text, true)).toBe(value);
  });

  test.each(['', 'abc', '5 percent', '1e', '%', 'NaN', 'Infinity', '0x10', '1 2', '>3', '1%%'])('%s is not', (text) => expect(parseBound(text, true)).toBeNull());

  test('what is no share has no percent', () => expect(parseBound('5 %', false)).toBeNull());

  test('a percentage in an address is a bound like another', () => {
    expect(boundsOf(['frequency>=0.5%', 'frequency <= 2 %'], 'frequency')).toEqual({ low: 0.005, high: 0.02 });
  });

  test('bounds of one column replace its old ones and leave the others', () => {
    const filters = withBounds(['max>=1', 'mean<=2'], 'max', 3, null);
    expect(filters).toEqual(['mean<=2', 'max>=3']);
    expect(boundsOf(filters, 'max')).toEqual({ low: 3, high: null });
    expect(boundsOf(filters, 'mean')).toEqual({ low: null, high: 2 });
  });

  test('a bound that is no number is none', () => expect(boundsOf(['max>=x'], 'max')).toEqual({ low: null, high: null }));

  test("the server's query repeats filters", () => {
    const query = listParameters({ ...DEFAULT_LIST, filters: ['max>=1', 'max<=2'], text: ' def ' });
    expect(query.toString()).toBe('sort=latent&life=live&filter=max%3E%3D1&filter=max%3C%3D2&q=def');
  });
});
