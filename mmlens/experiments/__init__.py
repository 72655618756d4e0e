"""The claims, each an experiment: the paper's figures, and beyond."""

from mmlens.experiments.catalog import EXPERIMENTS as EXPERIMENTS
from mmlens.experiments.core_heads_claim import CoreHeads as CoreHeads
from mmlens.experiments.core_heads_claim import core_heads as core_heads
from mmlens.experiments.experiment import Experiment as Experiment
from mmlens.experiments.experiment import Findings as Findings
from mmlens.experiments.experiment import Setup as Setup
