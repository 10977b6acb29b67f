/** What the evidence leaves out, and which rows of huge norm the quality of an SAE may hide behind, become sentences. */
import { formatCount, formatShare, formatValue } from './format';
import type { BundleSummary, Evaluation } from './types';

/** Sentences for every page of a bundle; none where nothing is left out and no row is an outlier. */
export function describeLeftOut({ corpus, evaluation, tokens_scanned: nScanned = 0 }: BundleSummary): string[] {
  const nExcluded = corpus?.n_excluded ?? 0;
  const nIds = corpus?.excluded_token_ids?.length ?? 0;
  const nPlaces = corpus?.excluded_positions ?? 0;
  const which = [
    ...(nPlaces ? [`the first ${nPlaces === 1 ? 'token' : `${formatCount(nPlaces)} tokens`} of each context (harvest.excluded_positions)`] : []),
    ...(nIds ? [`${formatCount(nIds)} token ${nIds === 1 ? 'id' : 'ids'} (harvest.excluded_token_ids)`] : []),
  ];
  return [
    ...(nExcluded ? [`Evidence leaves out ${formatCount(nExcluded)} of ${formatCount(nScanned + nExcluded)} rows: ${which.join(' and ')}.`] : []),
    ...(hasOutliers(evaluation) ? [describeOutliers(evaluation)] : []),
  ];
}

export function hasOutliers(evaluation: Evaluation | undefined): evaluation is Evaluation & { outlier_share: number } {
  return (evaluation?.outlier_share ?? 0) > 0;
}

function describeOutliers(evaluation: Evaluation & { outlier_share: number }): string {
  const share = evaluation.outlier_share;
  const rows = evaluation.n_rows ? `${formatCount(Math.round(share * evaluation.n_rows))} of ${formatCount(evaluation.n_rows)}` : `${formatShare(share)} of the`;
  const { fvu, fvu_ordinary: ordinary } = evaluation;
  const quality = fvu == null || ordinary == null ? '' : `: FVU ${formatValue(fvu)}, without them ${formatValue(ordinary)}`;
  return `${rows} held-out rows are outliers, over ${evaluation.norm_multiple ?? 10} times the median norm${quality}.`;
}
