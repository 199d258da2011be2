"""The only file that knows TRL: its GRPO trainer with our completions, advantages and reference.

What of TRL is used: the sampler that repeats questions, the clipped loss, the accumulation of
passes, the optimiser loop of transformers below it, and vLLM. What is replaced:

* ``rollout_func`` (marked experimental by TRL) hands over completions of our decode engine.
* Advantages are ours: TRL's own add rounding where all rewards of a group are equal.
* The reference is given: TRL loads it by the path in the model's config, which a model in memory
  does not have. With an adapter it is the model without it; otherwise a frozen copy that shares
  every weight that does not move.
* The head runs at completions' tokens only (``heads.py``).
* The divergence is the plain k3: TRL multiplies it by the ratio by default, another gradient.
* Nothing is sent (telemetry), printed, or written by it, and the model is left as it was.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from delible.lm.lm import LM
from delible.train.onpolicy.heads import fused_forward
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.processes import plain_environment
from delible.train.slots import Placement


@dataclass(frozen=True)
class Hooks:
    """What a run does around TRL's steps.

    Attributes:
        prompts: Token ids of the questions at these places of the plan.
        generate: Completions (token ids) of our own engine.
        judge: What completions earned.
        begin: Before a step (from 0, of those that are left).
        before_update: When the gradient is there; raises to stop before anything moves.
        after: After a step, with its numbers; true: stop here.
        retain: The loss on what is learned beside it in pass ``number`` of ``count`` of a step;
            None: nothing.
    """

    prompts: Callable[[Sequence[int]], list[list[int]]]
    generate: Callable[[Sequence[int], list[list[int]]], list[list[int]]]
    judge: Callable[[Sequence[int], list[list[int]]], list[float]]
    begin: Callable[[int], None]
    before_update: Callable[[], None]
    after: Callable[[int, Mapping[str, float]], bool]
    retain: Callable[[int, int, int], Tensor | None]


class _Steps(TrainerCallback):  # type: ignore[misc]
    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hooks.begin(int(state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hooks.before_update()


class GroupTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, with what :class:`Hooks` gives."""

    def __init__(self, lm: LM, settings: OnPolicyTraining, hooks: Hooks, **options: Any) -> None:
        self.lm, self.settings, self.hooks = lm, settings, hooks
        self.places: list[int] = []
        self.advantages: list[float] = []
        self.passes = 0
        super().__init__(**options)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No file is written."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.places = [int(one["place"]) for one in inputs]
        found: dict[str, Any] = super()._generate_and_score_completions(inputs)
        found["advantages"] = torch.tensor(
            self.advantages, dtype=torch.float32, device=found["advantages"].device
        )
        return found

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self.lm.computing():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        found = super().training_step(model, inputs, num_items_in_batch)
        self.passes += 1
        return found

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:  # fmt: skip
        weight, kept = self.settings.unlearn_weight, self.settings.retain_weight
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch) * weight
        count = self.args.gradient_accumulation_steps
        retain = self.hooks.retain(self.state.global_step, self.passes % count, count)
        if retain is None:
            return loss
        self._metrics["train"]["retain_loss"].append(float(retain.detach()))
        return loss + kept * retain

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        own = {name: values[:] for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        if "train_runtime" in logs:
            return
        means = {name: sum(values) / len(values) for name, values in own.items() if values}
        if parts := own.get("retain_loss"):
            means["retain_loss"] = sum(parts)  # each pass has its share, and some have none
        if self.hooks.after(int(self.state.global_step), {**means, **logs}):
            self.control.should_training_stop = True


def _unused(**kwargs: Any) -> list[float]:
    """TRL wants a reward function; what counts are the rollout's own advantages."""
    return [0.0] * len(kwargs["completions"])


def _rollout(prompts: Sequence[str], trainer: GroupTrainer) -> dict[str, Any]:
    hooks, places = trainer.hooks, trainer.places
    ids, logprobs = hooks.prompts(places), None
    if trainer.use_vllm:
        _, said, given, _ = trainer.vllm_generation.generate(ids, None, trainer.num_generations)
        logprobs = [[token[0] for token in row] for row in given]
    else:
        said = hooks.generate(places, ids)
    trainer.advantages = hooks.judge(places, said)
    return {"prompt_ids": ids, "completion_ids": said, "logprobs": logprobs}


def reference_of(lm: LM, placement: Placement) -> nn.Module | None:
    """The model as it is now, frozen; None: it is the model without the adapter that it wears.

    Weights that do not move are shared with the model.
    """
    if lm.wears_adapter:
        return None
    moving = {id(value) for value in placement.parameters.values()}
    shared = {id(value): value for value in lm.core.parameters() if id(value) not in moving}
    twin: nn.Module = copy.deepcopy(lm.core, dict(shared))
    own = {id(value) for value in shared.values()}
    for value in twin.parameters():
        if id(value) not in own:
            value.requires_grad_(False)
    return twin.eval()


def run(
    lm: LM,
    settings: OnPolicyTraining,
    placement: Placement,
    hooks: Hooks,
    *,
    texts: Sequence[str],
    begin: int,
    passes: int,
    seed: int,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    folder: Path,
    reference: nn.Module | None,
    weight: Callable[[], float],
) -> None:
    """Steps ``begin`` to the end.

    Args:
        texts: The question of every place of the plan from ``begin`` on, for TRL's sampler.
        passes: Gradient passes per step.
        factor: Factor of the learning rate, by step.
        folder: A place that TRL may know of; nothing is written there.
        reference: See :func:`reference_of`.
        weight: The weight of the divergence at the step that begins.
    """
    args = _arguments(lm, settings, begin, passes, seed, folder)
    rows = [{"prompt": text, "place": place} for place, text in enumerate(texts)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(begin + step))
    trainer = GroupTrainer(
        lm, settings, hooks,
        model=lm.model, reward_funcs=_unused, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(lm.tokenizer), optimizers=(optimizer, schedule),
        rollout_func=_rollout, callbacks=[_Steps(hooks)],
    )  # fmt: skip
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    _with_own_heads(trainer, reference)
    if settings.kl_weight:
        trainer.ref_model = reference
        trainer.add_callback(_Weight(trainer, weight))
        trainer.beta = weight()
    trainer.train()


def _with_own_heads(trainer: GroupTrainer, reference: nn.Module | None) -> None:
    """Our head in the place of TRL's, which a mixture of experts keeps for its router's loss."""
    lm, settings = trainer.lm, trainer.settings
    plain = type(lm.core).forward.__get__(lm.core)
    if reference is not None:
        whole = reference.forward
        reference.__dict__["forward"] = fused_forward(
            lm, reference, whole, settings.temperature, False
        )
    if not trainer.aux_loss_enabled:
        lm.core.__dict__["forward"] = fused_forward(
            lm, lm.core, plain, settings.temperature, settings.entropy_weight > 0
        )


class _Weight(TrainerCallback):  # type: ignore[misc]
    """Sets the weight of the divergence at each step."""

    def __init__(self, trainer: GroupTrainer, weight: Callable[[], float]) -> None:
        self.trainer, self.weight = trainer, weight

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.beta = self.weight()


def _arguments(
    lm: LM, settings: OnPolicyTraining, begin: int, passes: int, seed: int, folder: Path
) -> GRPOConfig:
    """Every setting that could change a result, in so many words."""
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps - begin,
        per_device_train_batch_size=settings.completions // passes,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_generations=settings.group_size,
        num_iterations=settings.inner_steps,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        beta=0.0,  # set after the reference was given
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        delta=settings.dual_clip,
        entropy_coef=settings.entropy_weight,
        loss_type="dapo" if settings.normalisation == "token" else "grpo",
        importance_sampling_level="token",
        use_bias_correction_kl=False,
        max_grad_norm=settings.max_gradient_norm or 0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        fp16=False,
        use_cpu=lm.device.type == "cpu",
        seed=seed % 2**32,
        data_seed=seed % 2**32,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        log_completions=False,
        disable_dropout=False,
        use_vllm=settings.vllm,
        router_aux_loss_coef=None,
    )


# ---- leaving things as they were


@contextmanager
def left_as_it_was(lm: LM) -> Iterator[None]:
    """Whatever TRL patches, seeds, sets or tags is put back; weights stay as they were trained.

    Within it the model is told that it trains, and its layers are not: no dropout, as in every
    other run.
    """
    configs = [lm.core.config, lm.core.config.get_text_config(), lm.core.generation_config]
    touched = list({id(one): one for one in (lm.model, lm.core, *configs) if one}.values())
    before = [dict(vars(one)) for one in touched]
    numbers, shuffles = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count())) if lm.device.type == "cuda" else []

    def train(mode: bool = True) -> nn.Module:
        for layer in lm.model.children():
            layer.eval()
        lm.model.training = mode
        return lm.model  # type: ignore[no-any-return]

    lm.model.eval()
    with plain_environment(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*'rollout_func'.*experimental")
        lm.model.__dict__["train"] = train
        try:
            yield
        finally:
            for one, kept in zip(touched, before, strict=True):
                for name in set(vars(one)) - set(kept):
                    vars(one).pop(name)
                vars(one).update(kept)
            np.random.set_state(numbers)
            random.setstate(shuffles)


__all__ = ["GroupTrainer", "Hooks", "left_as_it_was", "reference_of", "run"]
