import { describe, expect, test } from 'vitest';
import { LABEL_HEIGHT, nameOf, placeLabels, readClusters, type Cluster } from '../src/lib/labels';

const whole = { left: 0, top: 0, size: 1, aspect: 1 };
const measure = (): number => 80;
const make = (x: number, y: number, cells: number, nLatents: number, text: string): Cluster => ({ x, y, cells, nLatents, names: [{ kind: 'peaks', text }] });
const names = (clusters: Cluster[], view = whole, side = 600): string[] => placeLabels(clusters, view, side, side, measure).map(({ cluster }) => nameOf(cluster));

describe('names on the map', () => {
  const clusters = [make(0.2, 0.2, 8, 50, 'if'), make(0.22, 0.2, 8, 90, 'for'), make(0.7, 0.7, 8, 20, 'class'), make(0.5, 0.3, 32, 10, 'yield')];

  test('the larger of two in one place is shown, and those of fine grids only when there is room', () => {
    expect(names(clusters)).toEqual(['for', 'class']);
    expect(names(clusters, { left: 0.3, top: 0.1, size: 0.4, aspect: 1 })).toEqual(['yield']);
  });
  test('no name lies over another or over the edge, wherever the clusters are', () => {
    const many = Array.from({ length: 400 }, (_, i) => make((i * 0.618) % 1, (i * 0.414) % 1, 8 << (i % 5), i, `t${i}`));
    for (const side of [362, 900, 4000]) {
      const placed = placeLabels(many, whole, side, side, measure);
      expect(placed.length).toBeGreaterThan(5);
      for (const [i, a] of placed.entries()) {
        expect(a.left >= 0 && a.top >= 0 && a.left + 80 <= side && a.top + LABEL_HEIGHT <= side).toBe(true);
        expect(placed.slice(0, i).filter((b) => Math.abs(a.left - b.left) < 80 && Math.abs(a.top - b.top) < LABEL_HEIGHT)).toEqual([]);
      }
    }
  });
  test('a name says what is raised, and shows white space', () => {
    expect(nameOf({ ...clusters[0]!, names: [{ kind: 'peaks', text: ' import' }, { kind: 'raised', text: ' ' }] })).toBe('import ↑␣');
  });
  test('a file of another version is refused', () => {
    expect(() => readClusters({ format: 'interp-assets/map-clusters', version: 2, clusters: [] })).toThrow('version 2');
    expect(readClusters({ format: 'interp-assets/map-clusters', version: 1, clusters: [{ x: 65535, y: 0, cells: 8, n_latents: 9, names: [['raised', 'a']] }] })).toEqual([
      { x: 1, y: 0, cells: 8, nLatents: 9, names: [{ kind: 'raised', text: 'a' }] },
    ]);
  });
});
