"""How long anybody waits in a run, and how often an actor is replaced. No torch."""

from asyncrl.config.base import Rule, Spec, require_fields


class LimitsSpec(Spec, frozen=True, kw_only=True):
    """How long anybody waits for anything, in seconds, and how often an actor is replaced."""

    max_restarts: int = 3  # of each actor within restart_window_s; one more failure ends the run
    # A restart counts until the actor has been up for so long since. Time in which it was down lets none be forgotten: an actor
    # that never gets far ends the run, however long each of its starts takes.
    restart_window_s: float = 3600.0
    lease_s: float = 30.0  # silence after which a worker's work is reassigned
    poll_s: float = 2.0  # the longest that one call to the store waits
    start_timeout_s: float = 180.0  # for an actor to be up
    # An actor that answers nothing for so long, or whose engine makes no step, is replaced.
    health_timeout_s: float = 60.0
    # A run in which nothing moves for so long, not a token, a pack, a verdict or a piece of weights, is stopped, with a dump of
    # who waits for what. A server that starts and a sample that is scored have limits of their own, which may be longer.
    stall_timeout_s: float = 300.0
    # For what the learner saves when it is asked to; at an interrupt (Ctrl-C, SIGTERM, SIGHUP) the update under way included.
    save_timeout_s: float = 600.0
    # For an SGLang server to take new weights; then it is replaced. Below stall_timeout_s.
    update_timeout_s: float = 180.0
    # Between two decisions about how many actors there are, where a count has min and max: what is seen meanwhile is averaged.
    scale_every_s: float = 60.0
    # For an actor that is given up to finish what it holds, if its node does not go before; then others begin that anew.
    leave_timeout_s: float = 300.0
    stop_timeout_s: float = 15.0  # for actors to end by themselves, before they are killed

    def __post_init__(self) -> None:
        waits = "restart_window_s lease_s poll_s start_timeout_s health_timeout_s stall_timeout_s save_timeout_s scale_every_s"
        rules: list[Rule] = [
            ("max_restarts", lambda x: x >= 0, "< 0; use 0 to end the run with the first actor that dies"),
            (f"{waits} update_timeout_s", lambda x: x > 0, "<= 0 s: it would be over before it began; use seconds > 0"),
            ("stop_timeout_s leave_timeout_s", lambda x: x >= 0, "< 0 s; use 0 to end actors at once"),
        ]
        require_fields(self, "limits.", rules)
