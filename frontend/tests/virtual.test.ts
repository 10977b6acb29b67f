import { describe, expect, test } from 'vitest';
import { MAX_HEIGHT, contentHeight, scrollTo, viewAt } from '../src/lib/virtual';

const ROW = 36;
const VIEW = 800;

describe('the rows in view', () => {
  test('a short list is drawn whole', () => expect(viewAt(0, VIEW, ROW, 5)).toMatchObject({ first: 0, last: 5, top: 0 }));

  test('rows lie where an ordinary list would have them', () => {
    const view = viewAt(3600, VIEW, ROW, 10_000);
    expect(view.first).toBe(100 - 6);
    expect(view.top).toBe(94 * ROW);
  });

  test('only some rows exist however long the list is', () => {
    for (const nRows of [1e3, 1e5, 1e7]) {
      const room = contentHeight(nRows, ROW) - VIEW;
      for (const share of [0, 0.1, 0.5, 0.999, 1]) {
        const view = viewAt(share * room, VIEW, ROW, nRows);
        expect(view.last - view.first).toBeLessThanOrEqual(Math.ceil(VIEW / ROW) + 14);
      }
    }
  });

  test('ten million rows end with the last one, at the bottom of the view', () => {
    const nRows = 1e7;
    expect(contentHeight(nRows, ROW)).toBe(MAX_HEIGHT);
    const room = MAX_HEIGHT - VIEW;
    const view = viewAt(room, VIEW, ROW, nRows);
    expect(view.last).toBe(nRows);
    expect(view.top + (view.last - view.first) * ROW).toBeCloseTo(room + VIEW, 3);
  });

  test('scrolling beyond the ends stays inside', () => {
    expect(viewAt(-500, VIEW, ROW, 100).first).toBe(0);
    expect(viewAt(1e9, VIEW, ROW, 100).last).toBe(100);
  });
});

describe('bringing a row into view', () => {
  test('a row in view moves nothing', () => expect(scrollTo(10, 200, VIEW, ROW, 10_000)).toBeCloseTo(200));

  test.each([0, 17, 5_000_000, 9_999_999])('row %i of ten million is drawn after scrolling to it', (row) => {
    const scrolled = scrollTo(row, 6e6, VIEW, ROW, 1e7);
    const view = viewAt(scrolled, VIEW, ROW, 1e7);
    expect(view.first).toBeLessThanOrEqual(row);
    expect(view.last).toBeGreaterThan(row);
  });
});
