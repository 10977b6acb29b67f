"""One training step of SAELens, sparsify or dictionary_learning on request: the child process of `bench_train.py`.

Runs in an environment of its own that has the peers (see there). Reads JSON lines: `{"make": {peer, architecture, d_in, d_sae,
batch_rows, k}}` answers `{"made": true}` or why not; `{"run": true}` makes one step and answers its seconds. Every peer uses its own
trainer's step (its optimizer, clipping, decoder constraints and dead-latent counters), float32, on the same number of threads.
"""

# ruff: noqa: PLC0415 - a peer is imported where it is measured
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable

import torch

Step = Callable[[], None]


def make_sae_lens(architecture: str, x: torch.Tensor, d_sae: int, k: int) -> Step:
    """Return a step of SAELens' `SAETrainer`. TopK uses sparse activations, its fastest setting.

    Their backward is not implemented together with rescaling by decoder norms (its default, a product of a sparse and a dense tensor), so
    this is switched off with them.
    """
    return _make_sae_lens("topk_sparse" if architecture == "topk" else architecture, x, d_sae, k)


def _make_sae_lens(architecture: str, x: torch.Tensor, d_sae: int, k: int) -> Step:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    size = {"d_in": x.shape[1], "d_sae": d_sae}
    configs = {
        "relu": lambda: sae_lens.StandardTrainingSAEConfig(**size, l1_coefficient=5.0),
        "gated": lambda: sae_lens.GatedTrainingSAEConfig(**size, l1_coefficient=5.0),
        "topk_sparse": lambda: sae_lens.TopKTrainingSAEConfig(**size, k=k, use_sparse_activations=True, rescale_acts_by_decoder_norm=False),
        "batch_topk": lambda: sae_lens.BatchTopKTrainingSAEConfig(**size, k=k),
        "matryoshka_batch_topk": lambda: sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
            **size, k=k, matryoshka_widths=[d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
        ),
        "jump_relu": lambda: sae_lens.JumpReLUTrainingSAEConfig(**size, jumprelu_sparsity_loss_mode="quadratic", target_l0=float(k)),
        "jump_relu_tanh": lambda: sae_lens.JumpReLUTrainingSAEConfig(
            **size, jumprelu_sparsity_loss_mode="tanh", pre_act_loss_coefficient=3e-6, jumprelu_ste_to_input=True
        ),
        "jump_relu_step": lambda: sae_lens.JumpReLUTrainingSAEConfig(**size, jumprelu_sparsity_loss_mode="step"),
    }
    sae = sae_lens.TrainingSAE.from_dict(configs[architecture]().to_dict())
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**6 * len(x),
            lr_end=3e-5,
            train_batch_size_samples=len(x),
            logger=LoggingConfig(log_to_wandb=False),
            dead_feature_window=10**9,
        ),
        sae=sae,
        data_provider=iter([]),
    )

    def run() -> None:
        trainer._train_step(sae=trainer.sae, sae_in=x)  # noqa: SLF001 - the only name of one step
        trainer.n_training_steps += 1

    return run


def make_sparsify(architecture: str, x: torch.Tensor, d_sae: int, k: int) -> Step:
    """Return what sparsify's `Trainer.fit` does per batch, with its Adam: forward, backward, projection, step, renormalisation."""
    from sparsify import SparseCoder, SparseCoderConfig

    if architecture != "topk":
        raise KeyError(architecture)
    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / (d_sae / 2**14) ** 0.5)
    fired = torch.zeros(d_sae, dtype=torch.bool)

    def run() -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return run


def make_dictionary_learning(architecture: str, x: torch.Tensor, d_sae: int, k: int) -> Step:
    """Return `trainer.update` of dictionary_learning."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    common = {"steps": 10**6, "activation_dim": x.shape[1], "dict_size": d_sae, "layer": 0, "lm_name": "none", "device": "cpu"}
    trainers = {
        "relu": lambda: StandardTrainerAprilUpdate(**common),
        "gated": lambda: GatedSAETrainer(**common),
        "topk": lambda: TopKTrainer(**common, k=k),
        "batch_topk": lambda: BatchTopKTrainer(**common, k=k),
        "matryoshka_batch_topk": lambda: MatryoshkaBatchTopKTrainer(**common, k=k, group_fractions=[1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]),
        "jump_relu_step": lambda: JumpReluTrainer(**common, target_l0=float(k)),
    }
    trainer = trainers[architecture]()
    step = [1]

    def run() -> None:
        trainer.update(step[0], x)
        step[0] += 1

    return run


MAKERS = {"sae_lens": make_sae_lens, "sparsify": make_sparsify, "dictionary_learning": make_dictionary_learning}


def answer(request: dict, state: dict) -> dict:
    """Do what a line asks for."""
    if "make" in request:
        wanted = request["make"]
        x = torch.randn(wanted["batch_rows"], wanted["d_in"], generator=torch.Generator().manual_seed(1))
        state.pop("run", None)
        try:
            state["run"] = MAKERS[wanted["peer"]](wanted["architecture"], x, wanted["d_sae"], wanted["k"])
            state["run"]()
        except KeyError:
            return {"made": False, "because": "it has no such architecture"}
        except Exception as error:  # noqa: BLE001 - a peer that fails must not end the run of the others
            return {"made": False, "because": f"{type(error).__name__}: {error}"[:300]}
        return {"made": True}
    begun = time.perf_counter()
    state["run"]()
    return {"seconds": time.perf_counter() - begun}


def main() -> None:
    """Answer lines until the input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(sys.argv[1]))
    state: dict = {}
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = answer(json.loads(line), state)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
