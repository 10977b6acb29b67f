"""Rows and initial weights become an SAE that SAELens trained: the child process of `quality_train.py`, in an environment of its own.

Its argument is a JSON object: sizes and constants of the recipe, the files of rows and initial weights (our names), and the file to
write the trained tensors to (SAELens' names). Every step is `SAETrainer._train_step`.
"""

# ruff: noqa: PLC0415 - a peer is imported where it is used
# pyright: reportMissingImports=false
import json
import sys
import warnings
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def make_config(request: dict[str, Any], n_warmup: int) -> Any:
    """Return SAELens' configuration of the recipe."""
    import sae_lens

    size = {"d_in": request["d_in"], "d_sae": request["d_sae"], "apply_b_dec_to_input": False}
    coefficient, k = request["sparsity_coefficient"], request["k"]
    l1 = {"l1_coefficient": coefficient, "l1_warm_up_steps": n_warmup}
    l0 = {"l0_coefficient": coefficient, "l0_warm_up_steps": n_warmup}
    configs = {
        "relu": lambda: sae_lens.StandardTrainingSAEConfig(**size, **l1),
        "gated": lambda: sae_lens.GatedTrainingSAEConfig(**size, **l1),
        "topk": lambda: sae_lens.TopKTrainingSAEConfig(**size, k=k, aux_loss_coefficient=0.0),
        "batch_topk": lambda: sae_lens.BatchTopKTrainingSAEConfig(**size, k=k, aux_loss_coefficient=0.0),
        "jump_relu_tanh": lambda: sae_lens.JumpReLUTrainingSAEConfig(
            **size, **l0, jumprelu_sparsity_loss_mode="tanh", jumprelu_bandwidth=2.0, pre_act_loss_coefficient=3e-6, jumprelu_ste_to_input=True
        ),
        "jump_relu_step": lambda: sae_lens.JumpReLUTrainingSAEConfig(
            **size, **l0, jumprelu_sparsity_loss_mode="step", jumprelu_bandwidth=request["step_width"]
        ),
    }
    return configs[request["architecture"]]()


def main() -> None:
    """Train one SAE."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    warnings.simplefilter("ignore")
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    batch_rows, n_rows = request["batch_rows"], request["n_rows"]
    n_steps = n_rows // batch_rows
    sae = sae_lens.TrainingSAE.from_dict(make_config(request, int(request["coefficient_warmup"] * n_steps)).to_dict())
    start = load_file(request["start"])
    names = {
        "W_dec": "W_dec",
        "b_dec": "b_dec",
        "b_enc": "b_gate" if request["architecture"] == "gated" else "b_enc",
        "b_mag": "b_mag",
        "r_mag": "r_mag",
    }
    with torch.no_grad():
        sae.W_enc.copy_(start["W_enc_T"].T)
        for ours, theirs in names.items():
            if ours in start:
                getattr(sae, theirs).copy_(start[ours])
        if "log_threshold" in start:
            sae.threshold.copy_(start["log_threshold"].exp())
    if request["is_mean"]:
        sae.mse_loss_fn = lambda x_hat, x: (x_hat - x).square() / request["d_in"]
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=n_rows,
            train_batch_size_samples=batch_rows,
            lr=request["learning_rate"],
            lr_end=request["learning_rate"] / 10,
            lr_warm_up_steps=int(request["learning_rate_warmup"] * n_steps),
            lr_decay_steps=int(request["learning_rate_decay"] * n_steps),
            adam_beta1=request["betas"][0],
            adam_beta2=request["betas"][1],
            dead_feature_window=10**9,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter([]),
    )
    for group in trainer.optimizer.param_groups:
        group["eps"] = request["epsilon"]
    for x in load_file(request["rows"])["rows"].split(batch_rows):
        trainer._train_step(sae=trainer.sae, sae_in=x)  # noqa: SLF001 - the only name of one step
        trainer.n_training_steps += 1
    save_file({name: value.detach().clone().contiguous() for name, value in sae.named_parameters()}, request["end"])


if __name__ == "__main__":
    main()
