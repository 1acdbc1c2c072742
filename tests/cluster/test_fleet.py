"""Who comes and who goes, on a clock that the test sets; actors are fakes that are up as soon as they are spawned."""

from typing import Any

import pytest
from msgspec.structs import replace
from ray.exceptions import ActorDiedError, RayActorError

from asyncrl.cluster.fleet import Fleet, excused
from asyncrl.cluster.members import Member
from asyncrl.cluster.placement import Placement
from asyncrl.cluster.plan import RunPlan
from asyncrl.cluster.scaling import Scaler
from asyncrl.config import CountRange, Deployment, GeneratorsSpec, LimitsSpec, PlaceSpec, RewardsSpec
from asyncrl.errors import ConfigError, PlacementError
from asyncrl.report.summary import RunSummary


class Group:
    """A placement group that has room when the test says so."""

    room = True

    def __init__(self) -> None:
        self.released = False

    @property
    def ready(self) -> bool:
        return Group.room

    def release(self) -> None:
        self.released = True


class Retires:
    """An actor's handle: it is told to finish."""

    def __init__(self) -> None:
        self.ask = self.stop = self
        self.told: list[str] = []

    def remote(self, method: str = "stop") -> None:
        self.told.append(method)


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, recipe: Any, **generators: Any) -> None:
        self.now, self.asked, Group.room = 0.0, [], True
        deployment = Deployment(
            generators=GeneratorsSpec(**generators), rewards=RewardsSpec(), limits=LimitsSpec(start_timeout_s=100.0)
        )
        self.plan = RunPlan(recipe=recipe, deployment=deployment, run_dir="/r", started=1000, loopback=True)
        monkeypatch.setattr("asyncrl.cluster.members.request", self.request)
        monkeypatch.setattr("asyncrl.cluster.fleet.fits_nowhere", lambda name, places: PlacementError(f"{name} fits nowhere"))
        monkeypatch.setattr(Member, "spawn", lambda member, plan, known: self.spawn(member))
        monkeypatch.setattr(Member, "kill", lambda member: setattr(member, "phase", "ended"))
        self.fleet = Fleet(self.plan, lambda: self.now)
        for member in self.fleet.members:
            self.spawn(member)

    def request(self, name: str, places: list[PlaceSpec], choice: int = 0) -> Any:
        self.asked.append((name, places[0].choices[choice]))
        return Group()

    def spawn(self, member: Member) -> None:
        member.restart_count += 1
        member.phase, member.handle, member.leaving = "running", Retires(), ""

    def look(self, seconds: float = 0.5) -> list[str]:
        """The generators that there are after a round."""
        self.now += seconds
        self.plan = self.fleet.look(self.plan, {})
        return [member.name for member in self.fleet.members if member.role == "generator"]

    def scale(self, count: int) -> list[str]:
        self.fleet.counts["generator"] = count
        return self.look()

    def member(self, name: str) -> Member:
        (found,) = (member for member in self.fleet.members if member.name == name)
        return found


def test_generators_come_and_go_and_the_plan_says_how_many(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=1)
    assert world.look() == ["generator-0"]
    assert world.scale(3) == ["generator-0", "generator-1", "generator-2"]
    assert (world.plan.deployment.generators.least, world.plan.staleness.most_outstanding) == (3, 20)
    leaver = world.member("generator-2")
    assert world.scale(2) == ["generator-0", "generator-1", "generator-2"], "it finishes what it holds"
    assert leaver.handle.told == ["retire"]
    assert world.fleet.at_work("generator") == 2
    world.fleet.drop(leaver)  # it has ended
    assert world.look() == ["generator-0", "generator-1"]
    world.scale(3)
    assert world.fleet.left == [("generator-2", 0)], "the one that left, not its successor"
    assert world.plan.incarnation(world.member("generator-2").restart_count) == 1001, "the name has a new incarnation"
    assert world.member("generator-0").restart_count == 0


def test_who_does_not_finish_in_time_hands_over(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=2)
    world.scale(1)
    assert world.look(299.0) == ["generator-0", "generator-1"]
    assert world.look(2.0) == ["generator-0"]
    assert world.fleet.left == [("generator-1", 0)]


def test_who_has_no_place_yet_or_still_starts_goes_first_and_at_once(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=3)
    world.member("generator-1").phase = "starting"
    Group.room = False
    assert world.scale(4) == ["generator-0", "generator-1", "generator-2"]
    assert [member.name for member in world.fleet.coming] == ["generator-3"]
    assert world.scale(2) == ["generator-0", "generator-2"]
    assert not world.fleet.coming
    assert not world.member("generator-2").leaving


def test_beyond_the_fewest_a_place_is_waited_for_and_below_them_it_is_an_error(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=CountRange(min=2, max=5))
    Group.room = False
    assert world.scale(5) == ["generator-0", "generator-1"]
    assert world.look(10_000.0) == ["generator-0", "generator-1"]
    world.fleet.drop(world.member("generator-0"))  # its node was taken
    assert world.look() == ["generator-1"]
    assert world.fleet.nobody is False
    assert world.look(99.0) == ["generator-1"], "the others had waited for long, but were not needed"
    with pytest.raises(PlacementError, match="fits nowhere"):
        world.look(2.0)
    Group.room = True
    assert len(world.look()) == 5, "nodes have joined"


def test_the_plan_knows_the_most_there_may_be(monkeypatch, tiny_recipe):
    """A model that starts now has to answer them all later."""
    world = World(monkeypatch, tiny_recipe(), count=1)
    world.fleet._specs["reward"], seen = RewardsSpec(count=CountRange(min=1, max=6)), []
    world.plan = replace(world.plan, deployment=replace(world.plan.deployment, rewards=world.fleet._specs["reward"]))
    for count in (1, 3, 8, 2):
        world.fleet.counts["reward"] = count
        world.look()
        seen.append((world.plan.deployment.rewards.least, world.plan.deployment.rewards.most))
    assert seen == [(1, 6), (3, 6), (8, 8), (2, 8)]


def test_labels_are_asked_for_in_turn(monkeypatch, tiny_recipe):
    place = PlaceSpec(cpus=1, labels={"market": "spot"}, fallback=({"market": "on-demand"}, {}))
    world = World(monkeypatch, tiny_recipe(), count=1, place=place)
    Group.room = False
    world.scale(2)
    for _ in range(60):
        world.look(3.0)
    assert [labels for _, labels in world.asked] == [{"market": "spot"}, {"market": "on-demand"}, {}]


def test_a_count_is_stated_and_then_no_longer_the_rules(monkeypatch, tiny_recipe, caplog):
    world = World(monkeypatch, tiny_recipe(), count=CountRange(min=2, max=5))
    scaler, summary = Scaler(world.fleet, 60.0, lambda: world.now), RunSummary(name="r", total_steps=9, committed=4)
    with pytest.raises(ConfigError, match="scale: generators=0 < 1: nobody would be left"):
        world.fleet.ask({"generator": 0, "reward": None})
    world.fleet.ask({"generator": 7, "reward": None})
    world.fleet.ask({"generator": 6, "reward": 1})
    scaler.look(summary)
    (told,) = summary.scalings
    assert (told.role, told.count_before, told.count, told.step, told.reason) == ("generator", 2, 6, 4, "it was asked for")
    assert world.fleet.elastic == {}
    assert len(world.look()) == 6


def test_the_learner_halts_for_other_ranks_and_starts_where_these_have_room(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=1)
    scaler, summary = Scaler(world.fleet, 60.0, lambda: world.now), RunSummary(name="r", total_steps=9)

    def ranks(seconds: float = 0.5) -> list[tuple[str, str, int]]:
        scaler.look(summary)
        world.look(seconds)
        gang = world.fleet.members[1].gang
        assert world.fleet.members[: 1 + len(gang)] == [world.fleet.members[0], *gang]
        assert len(gang) == world.plan.deployment.learner.ranks
        return [(member.name, member.phase, member.restart_count) for member in gang]

    with pytest.raises(ConfigError, match="ranks=0 < 1"):
        world.fleet.ask({"learner": 0})
    learner = world.member("learner")
    learner.phase = "idle"
    world.fleet.ask({"learner": 3})
    assert ranks() == [("learner", "idle", 0)], "between two trainings it is left alone"
    learner.phase = "running"
    assert ranks() == [("learner", "running", 0)]
    assert learner.handle.told == ["halt"]
    learner.phase = "idle"  # it has saved
    assert ranks() == [("learner", "ended", 0), ("learner-1", "ended", -1), ("learner-2", "ended", -1)]
    assert world.asked[-1][0] == "learner"
    assert ranks()[0] == ("learner", "running", 1), "in these tests a spawn brings the lead alone"
    Group.room = False
    world.fleet.ask({"learner": 2})
    ranks()
    learner.phase = "starting"  # it died meanwhile: what it saved last is what there is
    assert [name for name, *_ in ranks()] == ["learner", "learner-1"]
    assert sorted(world.fleet.who_left()) == [("learner-1", -1), ("learner-2", -1)]
    assert world.fleet.nobody, "a run that waits for that does not stall"
    assert len(ranks(59.0)) == 2
    assert len(ranks(3.0)) == 2
    assert [phase for _, phase, _ in ranks()] == ["ended", "ended", "ended"], "as before"
    Group.room = True
    assert ranks()[0] == ("learner", "running", 2)
    assert not world.fleet.nobody
    told = [(scaling.role, scaling.count_before, scaling.count, scaling.reason) for scaling in summary.scalings]
    assert told == [
        ("learner", 1, 3, "it was asked for"),
        ("learner", 3, 2, "it was asked for"),
        ("learner", 2, 3, "there was no room for 2 in 62 s"),
    ]


def test_a_learner_that_was_told_to_halt_starts_anew_although_nobody_wants_that_any_more(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=1)
    scaler, summary = Scaler(world.fleet, 60.0, lambda: world.now), RunSummary(name="r", total_steps=9)
    learner = world.member("learner")
    for ranks in (2, 1):
        world.fleet.ask({"learner": ranks})
        scaler.look(summary)
        world.look()
    assert set(learner.handle.told) == {"halt"}
    learner.phase = "idle"  # it has saved: as it stands, the run would take that for its end
    world.look()
    world.look()
    assert (learner.phase, learner.restart_count, len(learner.gang)) == ("running", 1, 1)


def test_without_room_for_as_many_ranks_as_before_the_run_ends(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=1)
    scaler, summary = Scaler(world.fleet, 60.0, lambda: world.now), RunSummary(name="r", total_steps=9)
    learner, Group.room = world.member("learner"), False

    def look(seconds: float) -> int:
        scaler.look(summary)
        world.look(seconds)
        return len(learner.gang)

    world.fleet.ask({"learner": 2})
    look(0.5)
    learner.phase = "idle"
    assert look(0.5) == 2
    world.fleet.ask({"learner": 4})
    assert look(30.0) == 4
    assert look(50.0) == 4, "these have been sought for less than a minute"
    assert look(11.0) == 4
    assert look(0.5) == 1, "none of what was asked for since has ever been"
    assert look(99.0) == 1
    with pytest.raises(PlacementError, match="learner fits nowhere"):
        look(2.0)


def test_ranks_are_refused_that_would_have_no_place_beside_the_others_that_there_are_now(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=2, place=PlaceSpec(cpus=0.5))
    world.fleet._deployment = replace(
        world.fleet._deployment, num_cpus=2, learner=replace(world.fleet._deployment.learner, place=PlaceSpec(cpus=1))
    )
    with pytest.raises(ConfigError, match="more than this machine has"):
        world.fleet.ask({"learner": 2})
    world.scale(1)
    with pytest.raises(ConfigError, match="more than this machine has"):
        world.fleet.ask({"learner": 2})
    world.fleet._deployment = replace(world.fleet._deployment, num_cpus=3)
    world.fleet.ask({"learner": 2})


def test_the_learner_leaves_a_node_that_drains_as_it_does_for_other_ranks(monkeypatch, tiny_recipe):
    world = World(monkeypatch, tiny_recipe(), count=1)
    drains: dict[str, int] = {}
    monkeypatch.setattr("ray._private.state.state.get_draining_nodes", lambda: drains)
    world.fleet._loopback = False
    learner = world.member("learner")

    def look(seconds: float = 0.5) -> tuple[str, int]:
        world.look(seconds)
        if learner.phase == "ended":
            learner.node = ""
        return learner.phase, learner.restart_count

    learner.node, drains["a"], learner.phase = "a", 0, "idle"
    assert look() == ("idle", 0), "between two trainings it is left alone"
    learner.phase = "running"
    assert look() == look(3.0) == ("running", 0)
    assert learner.handle.told == ["halt", "halt"], "until it has"
    learner.phase = "idle"  # it has saved
    assert look() == ("ended", 0)
    assert look() == ("running", 1)
    assert world.fleet.preemptions == {"learner": 1}
    learner.node = "a"
    assert look(3.0) == ("running", 1)
    learner.phase, learner.node = "starting", ""  # it died meanwhile
    assert look() == ("starting", 1)
    learner.phase = "running"
    assert look(3.0) == ("running", 1), "it came up elsewhere"
    assert learner.handle.told == ["halt"]
    Group.room, learner.node, drains["b"] = False, "b", 0
    assert look(3.0) == ("running", 1)
    learner.phase = "idle"
    assert look() == ("ended", 1)
    assert look(99.0) == ("ended", 1)
    assert world.fleet.nobody
    with pytest.raises(PlacementError, match="learner fits nowhere"):
        look(2.0)


class Preempted(ActorDiedError):
    def __init__(self, preempted: bool, text: str) -> None:
        RayActorError.__init__(self, "1", text, False, preempted)


ANNOUNCED, UNANNOUNCED = Preempted(True, "…"), Preempted(False, "The actor died because its node has died. Node Id: 12")


@pytest.mark.parametrize(
    ("error", "roles"),
    [
        (ANNOUNCED, ["generator", "reward", "model", "learner"]),
        (UNANNOUNCED, ["generator", "reward", "model"]),
        (Preempted(False, f"{UNANNOUNCED}\nThe actor never ran - …"), ["generator", "reward", "model", "learner"]),
        (Preempted(False, "The actor is dead because its worker process has died."), []),
        (RuntimeError("its node has died"), []),
    ],
)
def test_who_dies_with_its_node_has_not_failed(error, roles):
    assert [role for role in ("generator", "reward", "model", "learner") if excused(role, error)] == roles


def test_a_placement_without_a_group_is_ready_at_once():
    assert Placement(({},)).ready
