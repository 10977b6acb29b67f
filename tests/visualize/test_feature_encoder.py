"""The scan: compiled, plain and fused paths find the same firings, for every firing rule and however rows and latents are cut."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from interp_assets.compute.coarse import fastest_kind
from interp_assets.compute.compiled import compiled
from interp_assets.compute.dots import dot
from interp_assets.train.sae import Sae
from interp_assets.visualize.encoder import Encoder, row_limits
from interp_assets.visualize.kernels import TILE
from interp_assets.visualize.rising import Guess, certain, guess

CPU = torch.device("cpu")
COMPILED = ["int8", "float32"] if fastest_kind(24) == "int8" else ["float32"]
"""The compiled paths that this processor has."""


def make_sae(kind, d_in=24, d_sae=TILE + 77, k=9, seed=0):
    """Make an SAE of small integers, whose products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).float()

    threshold = draw(0, 9, d_sae) if kind == "jump_relu" else torch.zeros(d_sae)
    k = k if kind == "topk" else 0
    return Sae(
        kind=kind,
        W_enc=draw(-2, 3, d_in, d_sae),
        b_enc=draw(-9, 2, d_sae),
        W_dec=draw(-2, 3, d_sae, d_in),
        b_dec=torch.zeros(d_in),
        threshold=threshold,
        k=k,
    )


def make_rows(n=150, d_in=24, seed=1):
    """Make rows of small integers, some of them not valid."""
    rows = torch.randint(-3, 4, (n, d_in), generator=torch.Generator().manual_seed(seed)).bfloat16()
    return rows, np.random.default_rng(seed).random(n) < 0.9


def find(sae, rows, is_valid, n_block=64, start=0, stop=None, **how):
    """Return (latent, row) -> activation of all firings."""
    encoder = Encoder(sae, start, sae.d_sae if stop is None else stop, CPU, **how)
    found, thresholds = {}, []
    for first in range(0, len(rows), n_block):
        block = encoder.prepare(rows[first : first + n_block], n_block, "here")
        valid = is_valid[first : first + n_block]
        if sae.kind == "topk":
            scans, own = encoder.begin_scan_topk(block, valid)()
            thresholds += own.threshold.tolist()
        else:
            scans = encoder.scan(block, row_limits(valid, -np.inf))
        for scan in scans:
            low, _ = encoder.tile_bounds(scan.tile)
            places = zip((scan.latents + low).tolist(), (scan.rows + first).tolist(), strict=True)
            assert all((np.diff(scan.rows[scan.latents == latent].astype(int)) > 0).all() for latent in np.unique(scan.latents))
            found |= dict(zip(places, scan.activations.tolist(), strict=True))
    return found, thresholds


def expect(sae, rows, is_valid):
    """Encode densely and list what is positive."""
    dense = sae.encode(rows) * torch.from_numpy(is_valid)[:, None]
    places = dense.T.nonzero().tolist()
    return {(latent, row): float(dense[row, latent]) for latent, row in places}


@pytest.mark.parametrize("path", [*COMPILED, "plain"])
def test_a_block_can_be_begun_while_another_is_scanned(path):
    """Pass A prepares and begins the next block before it takes the firings of the last: neither may see the other's rows."""
    sae, (rows, is_valid) = make_sae("relu"), make_rows()
    encoder, n_block, begun, found = Encoder(sae, 0, sae.d_sae, CPU, path=path), 50, [], {}
    for first in range(0, len(rows), n_block):
        block = encoder.prepare(rows[first : first + n_block], n_block, "here")
        begun.append((first, encoder.begin_scan(block, row_limits(is_valid[first : first + n_block], -np.inf))))
        if len(begun) > 1 or first + n_block >= len(rows):
            for earlier, finish in begun[:-1] if first + n_block < len(rows) else begun:
                for scan in finish():
                    low, _ = encoder.tile_bounds(scan.tile)
                    places = zip((scan.latents + low).tolist(), (scan.rows + earlier).tolist(), strict=True)
                    found |= dict(zip(places, scan.activations.tolist(), strict=True))
            begun = begun[-1:]
    assert found == expect(sae, rows, is_valid)


@pytest.mark.parametrize("path", [*COMPILED, "plain"])
@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_every_path_finds_the_firings_of_a_dense_encode(kind, path):
    """The compiled loops look at peaks of rows only; a firing they overlook would be missing for ever."""
    sae, (rows, is_valid) = make_sae(kind), make_rows()
    found, thresholds = find(sae, rows, is_valid, path=path)
    assert found == expect(sae, rows, is_valid)
    if kind == "topk":
        assert thresholds == sae.threshold_for(sae.pre_activations(rows))[:, 0].tolist()


@pytest.mark.parametrize("k", [1, 511, 512, 513, 588, 589, 700])
def test_topk_holds_for_any_k(k):
    """A row may keep one latent, more than a tile holds, all but one, or all."""
    sae, (rows, is_valid) = make_sae("topk", k=k), make_rows(40)
    found, thresholds = find(sae, rows, is_valid)
    assert found == expect(sae, rows, is_valid)
    assert thresholds == sae.threshold_for(sae.pre_activations(rows))[:, 0].tolist()


def make_lifelike(kind, spread=1.0, d_in=96, n_tiles=3):
    """Make an SAE and 300 rows as models have them: away from 0, dimensions of very unequal sizes, some rows far larger than others."""
    generator = torch.Generator().manual_seed(8)
    sizes = torch.exp(spread * torch.randn(d_in, generator=generator))
    rows = (torch.randn(300, d_in, generator=generator) + 3 * torch.randn(d_in, generator=generator)) * sizes
    rows[::50] *= 40
    d_sae = n_tiles * TILE - 30
    W = torch.randn(d_in, d_sae, generator=generator) / sizes[:, None]
    pre = rows @ W
    limit = pre.quantile(0.97, dim=0)
    zeros = torch.zeros(d_sae)
    bias, threshold = (-limit, zeros) if kind == "relu" else (zeros, limit.clamp_min(0) if kind == "jump_relu" else zeros)
    sae = Sae(kind=kind, W_enc=W, b_enc=bias, W_dec=W.T.contiguous(), b_dec=torch.zeros(d_in), threshold=threshold, k=16 if kind == "topk" else 0)
    return sae, rows, np.arange(300) % 11 > 0


@compiled
def all_dots(rows, columns, d, products):
    """Multiply every row with every column in the fixed order."""
    for i in range(products.shape[0]):
        for j in range(products.shape[1]):
            products[i, j] = dot(rows, i * d, columns, j * d, d)


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_activations_are_those_of_the_fixed_order_bit_for_bit(kind, path, spread):
    """Whatever finds the candidates, what fires is decided by one arithmetic: any block, slice, library or number of threads gives the same bytes."""
    sae, rows, is_valid = make_lifelike(kind, spread)
    products = np.empty((len(rows), sae.d_sae), np.float32)
    all_dots(rows.numpy().reshape(-1), sae.W_enc.T.contiguous().numpy().reshape(-1), sae.d_in, products)
    pre = torch.from_numpy(products + sae.b_enc.numpy())
    dense = torch.where(pre > sae.threshold_for(pre), pre, 0.0).clamp_min(0) * torch.from_numpy(is_valid)[:, None]
    expected = {(latent, row): float(dense[row, latent]) for latent, row in dense.T.nonzero().tolist()}
    assert len(expected) > 3000
    for n_block in (300, 128, 40):
        found, _ = find(sae, rows, is_valid, path=path, n_block=n_block)
        assert found == expected
    if kind != "topk":
        parts = [find(sae, rows, is_valid, path=path, start=start, stop=start + 200, n_block=64)[0] for start in (0, 200, 400)]
        expected_parts = [{place: value for place, value in expected.items() if low <= place[0] < low + 200} for low in (0, 200, 400)]
        assert parts == expected_parts


@pytest.mark.skipif("int8" not in COMPILED, reason="8-bit products are not fast here")
def test_digits_are_given_up_where_they_rule_out_too_little():
    """Rows of one huge dimension each leave no digits for the others: nearly everything would be computed one by one, block after block."""
    sae, rows, is_valid = make_lifelike("jump_relu", spread=0.0)
    generator = torch.Generator().manual_seed(9)
    rows[torch.arange(300), torch.randint(0, sae.d_in, (300,), generator=generator)] += 3000
    sae.threshold.copy_((rows @ sae.W_enc).quantile(0.995, dim=0).clamp_min(0))
    expected, _ = find(sae, rows, is_valid, path="float32", n_block=40)
    encoder, found = Encoder(sae, 0, sae.d_sae, CPU, path="int8"), {}
    kinds = []
    for first in range(0, len(rows), 40):
        block = encoder.prepare(rows[first : first + 40], 40, "here")
        for scan in encoder.scan(block, row_limits(is_valid[first : first + 40], -np.inf)):
            low, _ = encoder.tile_bounds(scan.tile)
            found |= dict(zip(zip((scan.latents + low).tolist(), (scan.rows + first).tolist(), strict=True), scan.activations.tolist(), strict=True))
        kinds.append(encoder.kind)
    assert kinds[0] == "int8"
    assert kinds[-1] == "float32"
    assert found == expected


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize(
    ("first", "later", "columns", "centre"),
    [(1e-30, 1e25, 1.0, 0.0), (1.0, 1.0, 1.0, 1e20), (1e-43, 1e-43, 1e30, 0.0), (1e-44, 1e-41, 1e36, 0.0), (1e-20, 1e15, 1e-15, 0.0)],
)
def test_no_scale_loses_a_firing(first, later, columns, centre, path):
    """Scales of a frame overflow, norms underflow: numbers that no model has, and yet nothing may be missed in silence."""
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(96, 32, generator=generator)
    rows[:48] *= first
    rows[48:] *= later
    rows[:, 5] += centre
    W = torch.randn(32, 300, generator=generator) * columns
    W[:, 7] = 0
    bias = torch.zeros(300)
    bias[7] = 1.0
    products = np.empty((96, 300), np.float32)
    all_dots(rows.numpy().reshape(-1), W.T.contiguous().numpy().reshape(-1), 32, products)
    pre = products + bias.numpy()
    threshold = torch.from_numpy(np.nextafter(np.median(pre, axis=0), np.float32(-np.inf))).clamp_min(0)
    sae = Sae(kind="jump_relu", W_enc=W, b_enc=bias, W_dec=W.T.contiguous(), b_dec=torch.zeros(32), threshold=threshold, k=0)
    found, _ = find(sae, rows, np.ones(96, np.bool_), path=path, n_block=48)
    dense = np.where(pre > threshold.numpy(), pre, 0)
    assert found == {(int(latent), int(row)): float(dense[row, latent]) for latent, row in np.argwhere(dense.T > 0)}
    assert len(found) > 1000


def make_normal_topk(n_tiles, k, order=0.0):
    """Make a `topk` SAE of normal weights and 200 rows; with `order` its first latents are the largest on every row."""
    generator = torch.Generator().manual_seed(5)
    d_sae = n_tiles * TILE - 30
    W = torch.randn(24, d_sae, generator=generator)
    bias = torch.where(torch.arange(d_sae) < d_sae // 8, order, 0.0)
    sae = Sae(kind="topk", W_enc=W, b_enc=bias, W_dec=W.T, b_dec=torch.zeros(24), threshold=torch.zeros(d_sae), k=k)
    return sae, torch.randn(200, 24, generator=generator), np.arange(200) % 7 > 0


@pytest.mark.parametrize("order", [0.0, 100.0, -100.0])
def test_topk_holds_where_bounds_are_guessed(order):
    """With many tiles the bound of a row is a guess from an eighth of the latents: wrong for few rows, for all of them, or far too low."""
    sae, rows, is_valid = make_normal_topk(16, 32, order)
    assert guess(32, 16) == Guess(2, 16)
    found, thresholds = find(sae, rows, is_valid, n_block=40)
    expected = expect(sae, rows, is_valid)
    assert found.keys() == expected.keys()
    assert max(abs(found[place] - expected[place]) for place in found) < 1e-3
    np.testing.assert_allclose(thresholds, sae.threshold_for(sae.pre_activations(rows))[:, 0].numpy(), atol=1e-4)


def test_a_guess_that_fails_too_often_is_made_more_carefully():
    """Latents sorted by how often they fire would have every row scanned twice, block after block."""
    sae, rows, is_valid = make_normal_topk(16, 32, order=100.0)
    encoder, guesses = Encoder(sae, 0, sae.d_sae, CPU), []
    for first in range(0, 160, 40):
        encoder.begin_scan_topk(encoder.prepare(rows[first : first + 40], 40, "here"), is_valid[first : first + 40])()
        guesses.append(encoder.guess)
    assert guesses == [Guess(2, 32), certain(32, 16), certain(32, 16), certain(32, 16)]


def test_the_firings_of_a_guess_do_not_depend_on_who_comes_first():
    """Threads race for the bounds; what is returned must be the same bytes every time, rows that were scanned again included."""
    sae, rows, is_valid = make_normal_topk(16, 32)
    sae.b_enc[: TILE // 2] += 2.0
    runs = [find(sae, rows, is_valid, n_block=200) for _ in range(5)]
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize(
    ("k", "n_tiles", "expected"), [(32, 15, certain(32, 15)), (0, 64, certain(0, 64)), (4000, 16, certain(4000, 16)), (64, 128, Guess(16, 24))]
)
def test_a_guess_needs_many_tiles_and_few_kept(k, n_tiles, expected):
    """Where an eighth of the latents cannot tell, the bound is the certain one."""
    assert guess(k, n_tiles) == expected


def test_dense_firing_outgrows_the_first_columns():
    """A latent that fires everywhere fills the columns of a thread, which then grow and are filled again."""
    sae, (rows, is_valid) = make_sae("relu"), make_rows(300)
    sae.b_enc.fill_(200.0)
    found, _ = find(sae, rows, is_valid, n_block=320)
    assert len(found) == sae.d_sae * is_valid.sum()
    assert found == expect(sae, rows, is_valid)


def test_rounded_operands_give_float32_sums():
    """With bfloat16 the operands are rounded, and nothing else: the bits are those of a float32 product of rounded values."""
    generator = torch.Generator().manual_seed(3)
    sae = make_sae("relu")
    sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
    rows, is_valid = torch.randn(64, 24, generator=generator), np.ones(64, np.bool_)
    found, _ = find(sae, rows, is_valid, dtype="bfloat16")
    rounded, _ = find(Sae(**(vars(sae) | {"W_enc": sae.W_enc.bfloat16().float()})), rows.bfloat16().float(), is_valid)
    exact, _ = find(sae, rows, is_valid)
    assert found == rounded
    assert found != exact
    common = found.keys() & exact.keys()
    assert len(common) > 0.95 * len(exact)
    assert max(abs(found[place] - exact[place]) for place in common) < 0.2


INTERPRETED = """
import numpy as np, torch
import interp_assets.visualize.fused as fused
import test_feature_encoder as plain
fused.BM, fused.BN, fused.BK, fused.GM, fused._FIRST_PLACES = 32, 128, 16, 2, 64
for kind in ("relu", "jump_relu"):
    sae, (rows, is_valid) = plain.make_sae(kind), plain.make_rows(90)
    found, _ = plain.find(sae, rows, is_valid, path="fused")
    assert found == plain.expect(sae, rows, is_valid), kind
    assert len(found) > 1000
sae, (rows, is_valid) = plain.make_sae("topk"), plain.make_rows(64)
found, _ = plain.find(sae, rows, is_valid, path="fused")
assert found == plain.expect(sae, rows, is_valid)
print("the fused kernel finds", len(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton (Linux), no GPU needed")
def test_the_fused_kernel_finds_the_same_firings():
    """The kernel that a GPU runs, in Triton's interpreter, bins overflowing and growing on the way; the last rows and latents are padding."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the fused kernel finds" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("path", ["auto", "plain"])
def test_a_gpu_finds_the_firings_of_a_dense_encode(path):
    """On a real accelerator, compiled: integers are exact there too."""
    sae, (rows, is_valid) = make_sae("jump_relu"), make_rows(3000)
    encoder = Encoder(sae, 0, sae.d_sae, torch.device("cuda"), path=path)
    scans = encoder.scan(encoder.prepare(rows, 3000, "here"), row_limits(is_valid, -np.inf))
    columns = (zip((s.latents + encoder.tile_bounds(s.tile)[0]).tolist(), s.rows.tolist(), s.activations.tolist(), strict=True) for s in scans)
    assert {(latent, row): value for rows_ in columns for latent, row, value in rows_} == expect(sae, rows, is_valid)
