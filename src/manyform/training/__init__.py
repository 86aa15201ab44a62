"""Training: `Trainer` is the engine, `train` adds folders, checkpoints and a screen."""

from manyform.training.config import TrainConfig
from manyform.training.evaluation import Evaluation, evaluate
from manyform.training.machine import MachineFacts, find_device, machine_facts
from manyform.training.optimizer import param_groups
from manyform.training.record import read_metrics
from manyform.training.run import TrainRun, train
from manyform.training.schedule import learning_rate
from manyform.training.trainer import StepResult, Trainer

__all__ = ["Evaluation", "MachineFacts", "StepResult", "TrainConfig", "TrainRun", "Trainer",
           "evaluate", "find_device", "learning_rate", "machine_facts", "param_groups",
           "read_metrics", "train"]
