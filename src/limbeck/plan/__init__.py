"""What a run would need on GPUs that are not here: memory, traffic and time of one rank, from its configuration alone."""

from limbeck.plan.estimate import Plan, make_plan, refusal
from limbeck.plan.gpus import GPUS, Gpu, find_gpu
from limbeck.plan.render import print_plan
from limbeck.plan.simulate import Simulation, simulate

__all__ = ["GPUS", "Gpu", "Plan", "Simulation", "find_gpu", "make_plan", "print_plan", "refusal", "simulate"]
