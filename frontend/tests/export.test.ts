import { expect, test } from 'vitest';
import { toCsv } from '../src/lib/export';
import { formatRoute, parseRoute } from '../src/lib/route';

test('cells with commas, quotes and new lines are quoted', () => {
  expect(toCsv(['a', 'b'], [['x,y', 'he said "no"\n']])).toBe('a,b\r\n"x,y","he said ""no""\n"\r\n');
});

test('a token that looks like a formula cannot run in a spreadsheet', () => {
  expect(toCsv(['a'], [['=HYPERLINK("http://x")'], ['@x'], [-1.5], [null]])).toBe('a\r\n"\'=HYPERLINK(""http://x"")"\r\n\'@x\r\n-1.5\r\n\r\n');
});

test('two features have an address', () => {
  const address = formatRoute({ bundle: 'demo 1', latent: 3, other: { bundle: 'b/2', latent: 9 } });
  expect(parseRoute(address)).toMatchObject({ bundle: 'demo 1', latent: 3, other: { bundle: 'b/2', latent: 9 } });
  expect(parseRoute('#/demo/3/with/x/y')).toMatchObject({ latent: 3, other: null });
});

test('map and search by example have addresses', () => {
  expect(parseRoute(formatRoute({ bundle: 'demo', view: 'map' }))).toMatchObject({ bundle: 'demo', latent: null, view: 'map' });
  expect(parseRoute('#/demo/try')).toMatchObject({ latent: null, view: 'try' });
});
