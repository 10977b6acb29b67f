"""Rows and initial weights become an SAE that SAELens trained: the child process of `quality_train.py`, in an environment of its own.

Its argument is a JSON object: sizes and constants of the recipe, the files of rows and initial weights (our names), and the file to
write the trained tensors to (SAELens' names). Every step is `SAETrainer._train_step`.

SAELens as it is shipped has other recipes in some places. With `is_same_recipe` its classes are given the papers' recipe there, and all else
(products, selection, straight-through gradients, autograd, Adam, clipping, schedules) remains its own:

    gated                       the gates' reconstruction trains the gates only, not the decoder (2404.16014, eq. 8); decoder rows keep norm 1
    jump_relu_step              decoder rows keep norm 1 (2407.14435)
    jump_relu_tanh              the logarithm of the threshold is trained; the loss on silence is on all latents (January 2025 update)
    matryoshka_batch_topk       mean over prefixes, the empty one included (2503.17547), instead of their sum without it
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
        "matryoshka_batch_topk": lambda: sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
            **size, k=k, aux_loss_coefficient=0.0, matryoshka_widths=request["group_ends"]
        ),
        "jump_relu_tanh": lambda: sae_lens.JumpReLUTrainingSAEConfig(
            **size, **l0, jumprelu_sparsity_loss_mode="tanh", jumprelu_bandwidth=2.0, pre_act_loss_coefficient=3e-6, jumprelu_ste_to_input=True
        ),
        "jump_relu_step": lambda: sae_lens.JumpReLUTrainingSAEConfig(
            **size, **l0, jumprelu_sparsity_loss_mode="step", jumprelu_bandwidth=request["step_width"]
        ),
    }
    return configs[request["architecture"]]()


def make_sae(config: Any, architecture: str, *, is_same_recipe: bool) -> Any:
    """Return SAELens' class of the architecture, changed where its recipe is another one."""
    from sae_lens import GatedTrainingSAE, JumpReLUTrainingSAE, MatryoshkaBatchTopKTrainingSAE, TrainingSAE

    class PaperGated(GatedTrainingSAE):
        def calculate_aux_loss(self, step_input: Any, feature_acts: Any, hidden_pre: Any, sae_out: Any) -> Any:  # noqa: ARG002
            gates = torch.relu(step_input.sae_in @ self.W_enc + self.b_gate)
            missed = gates @ self.W_dec.detach() + self.b_dec.detach() - step_input.sae_in
            l1_loss = step_input.coefficients["l1"] * gates.sum(-1).mean()
            return {"l1_loss": l1_loss, "auxiliary_reconstruction_loss": missed.pow(2).sum(dim=-1).mean()}

    class LogThreshold(JumpReLUTrainingSAE):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.log_threshold = torch.nn.Parameter(self._parameters.pop("threshold").detach().log())

        @property
        def threshold(self) -> Any:
            if "log_threshold" not in self._parameters:
                raise AttributeError  # while the class above still keeps a parameter of that name
            return self.log_threshold.exp()

    class MeanOfPrefixes(MatryoshkaBatchTopKTrainingSAE):
        def _iterable_decode(self, feature_acts: Any, include_outer_loss: Any = False) -> Any:  # noqa: FBT002 - SAELens' signature
            yield 0, self.b_dec.expand(len(feature_acts), -1)
            yield from super()._iterable_decode(feature_acts, include_outer_loss)

    if is_same_recipe:
        same = {"gated": PaperGated, "matryoshka_batch_topk": MeanOfPrefixes, "jump_relu_tanh": LogThreshold}
        if architecture in same:
            return same[architecture](config)
    return TrainingSAE.from_dict(config.to_dict())


def keep_unit_norm(sae: Any) -> None:
    """Keep a decoder's gradients orthogonal to its rows, as soon as they are there and before they are clipped."""

    def project(weight: Any) -> None:
        weight.grad.sub_((weight.grad * weight.data).sum(1, keepdim=True) * weight.data)

    sae.W_dec.register_post_accumulate_grad_hook(project)


def main() -> None:
    """Train one SAE."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    warnings.simplefilter("ignore")
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    batch_rows, n_rows = request["batch_rows"], request["n_rows"]
    architecture, is_same_recipe = request["architecture"], request["is_same_recipe"]
    n_steps = n_rows // batch_rows
    sae = make_sae(make_config(request, int(request["coefficient_warmup"] * n_steps)), architecture, is_same_recipe=is_same_recipe)
    start = load_file(request["start"])
    names = {"W_dec": "W_dec", "b_dec": "b_dec", "b_enc": "b_gate" if architecture == "gated" else "b_enc", "b_mag": "b_mag", "r_mag": "r_mag"}
    with torch.no_grad():
        sae.W_enc.copy_(start["W_enc_T"].T)
        for ours, theirs in names.items():
            if ours in start:
                getattr(sae, theirs).copy_(start[ours])
        if "threshold" in start:
            sae.threshold.copy_(start["threshold"])
        if "log_threshold" in start:
            trained = dict(sae.named_parameters())
            if "log_threshold" in trained:
                trained["log_threshold"].copy_(start["log_threshold"])
            else:
                trained["threshold"].copy_(start["log_threshold"].exp())
    if request["error_parts"] > 1:
        sae.mse_loss_fn = lambda x_hat, x: (x_hat - x).square() / request["error_parts"]
    is_unit_norm = is_same_recipe and request["is_unit_norm"]
    if is_unit_norm:
        keep_unit_norm(sae)
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
            # Every latent counts as dead, and so gets the loss on silence; without AuxK that is all that depends on it.
            dead_feature_window=-1 if is_same_recipe and architecture == "jump_relu_tanh" else 10**9,
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
        if is_unit_norm:
            sae.W_dec.data.div_(sae.W_dec.data.norm(dim=1, keepdim=True))
    found = {name: value.detach().clone().contiguous() for name, value in sae.named_parameters()}
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    save_file(found, request["end"])


if __name__ == "__main__":
    main()
