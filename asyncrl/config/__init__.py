"""What a user writes: recipes, deployments and warm starts, as structs that are validated when made. No torch.

What these modules define, and begins with no underscore, is said here once more for whoever imports it.
"""

from asyncrl.config.algorithm import *
from asyncrl.config.bus import *
from asyncrl.config.counts import *
from asyncrl.config.deployment import *
from asyncrl.config.dtypes import *
from asyncrl.config.learner import *
from asyncrl.config.limits import *
from asyncrl.config.parallel import *
from asyncrl.config.recipe import *
from asyncrl.config.rewards import *
from asyncrl.config.sentinels import *
from asyncrl.config.sft import *
