"""Optimizers and schedules: what a step does with gradients, on any number of ranks, wrapped or not.

Optimizer       a rule over everything trainable, with summed gradients and, where the rule needs them, fp32 masters
RULES           --optimizer -> rule: AdamW (torch's fused one), anyprecision (bf16 or 8-bit states), adamw8bit (torchao)
problems        what a rule needs and this machine has not
grad_norm, not_finite, clip_factor  0-dim fp32 tensors that stay on the device
LossScale       fp16's: gradients large enough to be held, overflows skipped
schedule        the learning rate's factor as a function of the step
"""

from packtrain.optim.gradients import clip_factor, grad_norm, not_finite
from packtrain.optim.optimizer import RULES, Optimizer, problems
from packtrain.optim.scaling import LOWEST_SCALE, LossScale
from packtrain.optim.schedule import SCHEDULERS, schedule

__all__ = [
    "LOWEST_SCALE",
    "RULES",
    "SCHEDULERS",
    "LossScale",
    "Optimizer",
    "clip_factor",
    "grad_norm",
    "not_finite",
    "problems",
    "schedule",
]
