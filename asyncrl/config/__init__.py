"""What a user writes: recipes, deployments and warm starts, as structs that are validated when made. No torch.

Of the modules' names only those listed here are public. The list is explicit, as type checkers can't read a computed one.
"""

from asyncrl.config.algorithm import *
from asyncrl.config.deployment import *
from asyncrl.config.dtypes import *
from asyncrl.config.learner import *
from asyncrl.config.parallel import *
from asyncrl.config.recipe import *
from asyncrl.config.sft import *

__all__ = [
    "CPU_PACK_TOKENS",
    "ESTIMATOR_NAMES",
    "LOSS_DEFAULTS",
    "LOSS_NAMES",
    "PREFERENCE_LOSSES",
    "SETTINGS",
    "UNGROUPED",
    "AggregationName",
    "AlgorithmSpec",
    "BusSpec",
    "CheckpointSpec",
    "CorrectionName",
    "CriticSpec",
    "DataSpec",
    "DemonstrationsSpec",
    "Deployment",
    "Dtypes",
    "EngineSpec",
    "EvalSettingSpec",
    "EvaluationSpec",
    "GeneratorsSpec",
    "Group",
    "Layout",
    "LearnerSpec",
    "LimitsSpec",
    "LoraSpec",
    "MaskName",
    "ModelSpec",
    "OptimizerSpec",
    "ParallelSpec",
    "PlaceSpec",
    "PrecisionSpec",
    "RanksSpec",
    "Recipe",
    "RewardSpec",
    "RewardStyle",
    "RewardTerm",
    "RewardsSpec",
    "SFTSpec",
    "SGLangSpec",
    "SamplingSpec",
    "ServedDtype",
    "ShapingSpec",
    "StalenessSpec",
    "StoreSpec",
    "UpdateMode",
    "layouts",
    "run_dtypes",
]
