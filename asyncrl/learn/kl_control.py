"""The KL to the reference, over an update: as a penalty in the reward, and the coefficient that adapts to it."""

from torch import Tensor

from asyncrl.algorithms.kl import adapted, token_kl
from asyncrl.config import AlgorithmSpec
from asyncrl.learn.update import Update


class KLControl:
    """Owns the coefficient. state: it, where it adapts, for the checkpoint; overwritten in place by a restore, and
    shared with others that keep figures there."""

    def __init__(self, spec: AlgorithmSpec) -> None:
        self._spec = spec
        self.state = {"kl_coef": spec.kl_coef} if spec.kl_control == "adaptive" else {}

    @property
    def coef(self) -> float:
        return self.state.get("kl_coef", self._spec.kl_coef)

    def penalty(self, update: Update) -> Tensor:
        """−β·KL of each trained token [N], float64 on the CPU: a token-level reward (Ziegler et al. 2019; verl)."""
        return -self.coef * self._kl(update).cpu().double()

    def control(self, update: Update, rollouts: int) -> dict[str, float]:
        """Moves the coefficient, where it adapts, by this batch's KL; figures of both, under verl's names."""
        spec, coef = self._spec, self.coef
        if not spec.kl_coef:
            return {}
        figures = {"actor/reward_kl_penalty_coeff" if spec.kl_in == "reward" else "actor/kl_coef": coef}
        kl_n = self._kl(update)
        kl_n = kl_n[kl_n.isfinite()]
        if not len(kl_n):
            return figures
        kl = float(kl_n.mean())
        if spec.kl_in == "reward":
            figures["actor/reward_kl_penalty"] = kl
        if "kl_coef" in self.state:
            self.state["kl_coef"] = adapted(coef, kl, target=spec.kl_target, horizon=spec.kl_horizon, rollouts=rollouts)
        return figures

    def _kl(self, update: Update) -> Tensor:
        """KL per token [N] of the proximal policy to the reference, by the recipe's estimator; NaN where not known."""
        assert update.reference_n is not None, "asked for a KL without a reference"
        estimator = self._spec.setting("kl_estimator")
        return token_kl(estimator, update.proximal_n, update.reference_n, update.batch.behaviour_n)
