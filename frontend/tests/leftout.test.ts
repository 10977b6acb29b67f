import { describe, expect, test } from 'vitest';
import { describeLeftOut } from '../src/lib/leftout';
import type { BundleSummary } from '../src/lib/types';

const whole: BundleSummary = {
  name: 'bundle',
  tokens_scanned: 148_796,
  corpus: { source: 'files', n_shards: 4 },
  evaluation: { l0: 8, fvu: 0.031, ce_recovered: 0.9, kl: 0.1, dead_share: 0, n_rows: 4096, norm_multiple: 10, outlier_share: 0, fvu_ordinary: 0.031 },
};

describe('what is left out', () => {
  test('nothing is said where nothing is left out', () => {
    expect(describeLeftOut(whole)).toEqual([]);
    expect(describeLeftOut({ name: 'bundle of an older release' })).toEqual([]);
    expect(describeLeftOut({ ...whole, corpus: { source: 'files', n_shards: 4, excluded_positions: 1, n_excluded: 0 } })).toEqual([]);
  });
  test('rows are counted, and the settings named', () => {
    const corpus = { source: 'files', n_shards: 4, excluded_positions: 1, excluded_token_ids: [198, 220], n_excluded: 1204 };
    expect(describeLeftOut({ ...whole, corpus })).toEqual([
      'Evidence leaves out 1,204 of 150,000 rows: the first token of each context (harvest.excluded_positions) and 2 token ids (harvest.excluded_token_ids).',
    ]);
    expect(describeLeftOut({ ...whole, corpus: { ...corpus, excluded_positions: 4, excluded_token_ids: undefined } })[0]).toContain('rows: the first 4 tokens of each context (harvest.excluded_positions).');
    expect(describeLeftOut({ ...whole, corpus: { ...corpus, excluded_positions: undefined, excluded_token_ids: [198] } })[0]).toContain('rows: 1 token id (harvest.excluded_token_ids).');
  });
  test('outliers are counted, with the quality that they hide', () => {
    const evaluation = { ...whole.evaluation!, outlier_share: 12 / 4096, fvu_ordinary: 0.386 };
    expect(describeLeftOut({ ...whole, evaluation })).toEqual([
      '12 of 4,096 held-out rows are outliers, over 10 times the median norm: FVU 0.0310, without them 0.386.',
    ]);
    expect(describeLeftOut({ ...whole, evaluation: { ...evaluation, n_rows: undefined, fvu_ordinary: null } })[0]).toBe('0.29 % of the held-out rows are outliers, over 10 times the median norm.');
  });
});
