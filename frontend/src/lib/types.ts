/** Shapes of the files and answers that the pages read. See docs/formats/feature_bundle.md and feature_record.md. */

export interface Distribution {
  edges: number[];
  counts: number[];
}

export interface BundleSummary {
  name: string;
  /** Of attention heads or of features. */
  kind?: 'attention' | 'features';
  n_layers?: number;
  n_heads?: number;
  n_prompts?: number;
  error?: { what: string; do: string };
  created?: string;
  n_bytes?: number;
  is_synthetic?: boolean;
  pipeline?: string;
  model?: { name: string; revision: string; fingerprint: string };
  hook_point?: string;
  sae?: { name: string; artifact_id: string; config: Record<string, unknown> };
  d_sae?: number;
  n_live?: number;
  tokens_scanned?: number;
  evaluation?: Evaluation;
  corpus?: Corpus;
}

/** What an address serves. A static host has files only: no labels that change, no notes kept on the server, no search by example. */
export interface Site {
  mode: 'server' | 'static';
  /** Whether lists and notes are kept. */
  notes?: boolean;
  /** Whether a text can be run through model and SAE, for each bundle. */
  examples?: Record<string, boolean>;
  /** Whether models are served to notebooks. */
  models?: boolean;
  /** Pipelines whose SAEs are compared. */
  sweeps?: string[];
  bundles: BundleSummary[];
}

/** A model that is served to notebooks. */
export interface ServedModel {
  name: string;
  model: string;
  revision?: string;
  type: string;
  dtype: string;
  device: string;
  n_layers: number;
  d_model: number;
  vocabulary: number;
  max_context: number;
  can_measure: boolean;
  /** `artifact_id` is that of the pipeline's own SAEs. */
  saes: Record<string, { hook_point: string; written_at: string; d_sae: number; is_crosscoder: boolean; fvu?: number | null; artifact_id?: string }>;
  special_tokens: number[];
  stop_tokens: number[];
  limits: Record<'operations' | 'rows' | 'tokens' | 'answer_bytes' | 'kept_bytes' | 'kept_s' | 'seconds' | 'in_flight' | 'queued', number>;
  queue: { waiting: number; answered: number; forwards: number; stopped: string };
}

export interface ServedPoint {
  name: string;
  shape: string;
  module: string;
  alias: string;
  refused: string;
}

export interface Evaluation {
  l0: number | null;
  fvu: number | null;
  ce_recovered: number | null;
  kl: number | null;
  dead_share: number | null;
  /** Rows of the held-out shards. */
  n_rows?: number | null;
  /** A row is an outlier where its norm exceeds so many times the median; the share of such rows, and quality over them and over all others. */
  norm_multiple?: number;
  outlier_share?: number | null;
  fvu_ordinary?: number | null;
  l0_ordinary?: number | null;
  ce_recovered_ordinary?: number | null;
  fvu_outliers?: number | null;
  l0_outliers?: number | null;
  ce_recovered_outliers?: number | null;
}

/** Where the tokens come from; where the harvest leaves rows out, which and how many. */
export interface Corpus {
  source: string;
  n_shards: number;
  excluded_positions?: number;
  excluded_token_ids?: number[];
  n_excluded?: number;
}

export interface Bundle extends Required<Omit<BundleSummary, 'error' | 'created' | 'n_bytes' | 'kind' | 'n_layers' | 'n_heads' | 'n_prompts'>> {
  d_in: number;
  coactivation_rows: number | null;
  logits_reason: string | null;
  records: { version: number; per_file: number; n_files: number; repeat: number | null };
  /** Decoder rows, of so many numbers each, where the bundle holds them. */
  directions?: { width: number } | null;
  map: { method: string; variance_share: number | null; n_points: number; n_tiles: number; n_clusters?: number; neighbours?: { kept: number; near_share: number } | null } | null;
  /** Features whose dose curves lie in the bundle; absent where none was swept. */
  doses?: { version: number; latents: number[] };
  /** What can be sorted by, with the order file of each; what can be filtered, with the type of its values. */
  columns: { sortable: Record<string, string>; numeric: Record<string, string>; labels?: boolean };
  distributions: Record<string, Distribution>;
}

export interface FeatureRow {
  latent: number;
  is_dead: boolean;
  count: number;
  frequency: number;
  mean: number;
  max: number;
  top_token: string;
  top_tokens: string[];
  top_logits: string[];
  bottom_logits: string[];
  n_examples: number;
  decoder_norm: number;
  /** The best of the labels that were imported; null where there is none. */
  label?: Label | null;
}

/** What somebody or some model says that a feature means, and where that comes from. */
export interface Label {
  latent: number;
  text: string;
  source: string;
  score: number | null;
  score_kind: string | null;
  author: string | null;
  set: string;
  file: string;
  imported: string;
}

/** What a person collected: named lists of latents, and a note for a latent; `file` is where they are kept, null where they are not. */
export interface Notes {
  file: string | null;
  lists: Record<string, number[]>;
  notes: Record<string, string>;
}

export interface FeaturePage {
  n_features: number;
  n_matches: number;
  offset: number;
  rows: FeatureRow[];
}

export interface Place {
  position: number | null;
  n_matches: number;
  previous: number | null;
  next: number | null;
}

/** Tokens around one example; `activations` are [place, value] of the non-zero ones. */
export interface Window {
  row: [number, number];
  document: string;
  tokens: number[];
  peak: number;
  /** Place of the peak in its context, from 0. */
  position: number;
  activation: number;
  activations: [number, number][];
  masked: number[];
  /** Of messages: [place, role] wherever another begins to speak. */
  roles?: [number, string][];
}

export interface Logits {
  top: [number, number][];
  bottom: [number, number][];
  histogram: { low: number; high: number; counts: number[] };
}

export interface FeatureRecord {
  version: number;
  latent: number;
  is_dead: boolean;
  statistics: { count: number; frequency: number; mean: number; max: number; quantiles: number[]; histogram: Distribution };
  examples: { top: Window[]; intervals: { low: number; high: number; examples: Window[] }[]; random: Window[] };
  logits: Logits | null;
  logits_reason: string | null;
  neighbours: [number, number][];
  coactivations: [number, number, number][];
}

/** Which features fire on a text: the strongest ones with [place, activation], and for every token its own strongest [latent, activation]. */
export interface Tried {
  tokens: number[];
  masked: number[];
  l0: number;
  features: { latent: number; max: number; activations: [number, number][] }[];
  by_token: [number, number][][];
}
