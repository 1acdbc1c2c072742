"""What befell the servers of an engine, and the rollouts on them."""

from dataclasses import asdict, dataclass


@dataclass
class Counts:
    """Over all replicas of an engine, since its start."""

    tokens: int = 0  # reported by servers
    restarts: int = 0  # servers replaced
    resumed: int = 0  # rollouts that went on after the loss of their server, with the tokens so far
    reissued: int = 0  # rollouts that began anew after it
    lost_tokens: int = 0  # computed again because of it
    interrupted: int = 0  # rollouts that had to leave their server for an update
    retracted: int = 0  # times that a server took a rollout out of its batch for want of KV cache
    recovery_s: float = 0.0  # last loss of a server: until it served again

    def gauges(self) -> dict[str, float]:
        return {name: float(value) for name, value in asdict(self).items()}
