"""The simulator itself: what it claims of time, engines, clients and figures."""

from __future__ import annotations

import pytest
from simulation.balancers import Balancer
from simulation.engine import EngineSpec, FluidEngine, Generation
from simulation.figures import Window, ends, goodput, jain, percentile
from simulation.job import End, Job
from simulation.mesh import Mesh, MeshSpec, Retries
from simulation.simulator import Simulator
from simulation.state import faults
from simulation.stepped_engine import SteppedEngine
from simulation.workload import Kind, burst, fixed, poisson, square_wave, together

from tidegate.scheduler.config import Settings
from tidegate.scheduler.request import ServiceClass

ENGINES = [FluidEngine, SteppedEngine]


def run_engine(engine_class, spec, starts):
    """Starts answers of an engine at their times; returns when each had its first and its last token."""
    simulator = Simulator(1)
    engine = engine_class(simulator, spec, lambda: None)
    firsts, lasts = {}, {}
    for name, (at, prompt, answer, priority) in starts.items():
        generation = Generation(
            prompt,
            answer,
            priority,
            on_first_token=lambda name=name: firsts.update({name: simulator.now}),
            on_end=lambda name=name: lasts.update({name: simulator.now}),
        )
        simulator.at(at, engine.start, generation)
    simulator.run_until(1_000)
    return firsts, lasts


def run_mesh(jobs, spec=None, *, seconds=60.0, **arguments):
    mesh = Mesh(spec or MeshSpec(), 1, **arguments)
    mesh.play(jobs)
    mesh.run_until(seconds)
    return mesh


class TestSimulator:
    def test_events_of_one_moment_happen_in_the_order_in_which_they_were_made(self):
        simulator = Simulator(1)
        happened = []
        for name in "abc":
            simulator.at(1.0, happened.append, name)
        simulator.at(0.5, happened.append, "first")
        simulator.run_until(2.0)
        assert happened == ["first", "a", "b", "c"]
        assert simulator.now == 2.0

    def test_a_cancelled_event_does_not_happen(self):
        simulator = Simulator(1)
        happened = []
        simulator.after(1.0, happened.append, "no").cancel()
        simulator.run_until(2.0)
        assert happened == []

    def test_the_same_seed_gives_the_same_run(self):
        def run():
            kind = Kind(leave_share=0.3)
            mesh = run_mesh(poisson(kind, 100, 2, 5, 7), seconds=15)
            return [(job.job_id, job.end, job.ended_at, job.replica_address) for job in mesh.jobs]

        assert run() == run()


@pytest.mark.parametrize("engine_class", ENGINES)
class TestEngines:
    def test_one_answer_takes_its_prefill_and_a_step_a_token(self, engine_class):
        spec = EngineSpec(base_seconds=0.01, per_sequence_seconds=0.0, prefill_tokens_per_second=1_000)
        firsts, lasts = run_engine(engine_class, spec, {"a": (0.0, 512, 101, 1)})
        assert firsts["a"] == pytest.approx(0.522)
        assert lasts["a"] - firsts["a"] == pytest.approx(1.0)

    def test_each_running_sequence_makes_the_others_slower(self, engine_class):
        spec = EngineSpec(base_seconds=0.01, per_sequence_seconds=0.01, prefill_tokens_per_second=1e9)
        _, alone = run_engine(engine_class, spec, {"a": (0.0, 1, 101, 1)})
        _, four = run_engine(engine_class, spec, dict.fromkeys("abcd", (0.0, 1, 101, 1)))
        assert alone["a"] == pytest.approx(2.0, rel=0.02)
        assert four["a"] == pytest.approx(5.0, rel=0.02)

    def test_what_finds_no_slot_waits_and_the_more_urgent_goes_first(self, engine_class):
        spec = EngineSpec(slot_count=1)
        starts = {"runs": (0.0, 10, 50, 1), "later": (0.1, 10, 50, 2), "urgent": (0.2, 10, 50, 0)}
        firsts, lasts = run_engine(engine_class, spec, starts)
        assert max(firsts, key=firsts.get) == "later"
        assert firsts["later"] >= lasts["urgent"]

    def test_the_last_of_the_least_urgent_gives_its_slot_and_goes_on_where_it_was(self, engine_class):
        spec = EngineSpec(slot_count=2, base_seconds=0.01, per_sequence_seconds=0.0, prefill_tokens_per_second=1e9)
        starts = {"first": (0.0, 1, 101, 2), "second": (0.005, 1, 101, 2), "urgent": (0.5, 1, 51, 0)}
        firsts, lasts = run_engine(engine_class, spec, starts)
        assert firsts["urgent"] == pytest.approx(0.51, abs=0.03)
        assert lasts["first"] == pytest.approx(1.01, abs=0.03)
        # As much later as the urgent one took.
        assert lasts["second"] == pytest.approx(1.02 + 0.5, abs=0.03)

    def test_a_cancelled_sequence_frees_its_slot(self, engine_class):
        simulator = Simulator(1)
        engine = engine_class(simulator, EngineSpec(slot_count=1), lambda: None)
        ended = []
        long = Generation(10, 10_000, 1, lambda: None, lambda: ended.append("long"))
        engine.start(long)
        engine.start(Generation(10, 10, 1, lambda: None, lambda: ended.append("short")))
        simulator.after(1.0, engine.cancel, long)
        simulator.run_until(3.0)
        assert ended == ["short"]
        assert engine.load().running == 0
        assert engine.load().free_blocks == engine.load().total_blocks


def test_the_flow_and_the_real_batcher_agree():
    medians = {}
    for engine_class in ENGINES:
        mesh = run_mesh(poisson(Kind(), 45, 2, 20, 1), MeshSpec(engine_class=engine_class))
        assert ends(mesh.jobs) == {"completed": len(mesh.jobs)}
        medians[engine_class] = percentile([job.ended_at - job.sent_at for job in mesh.jobs], 0.5)
    # The flow knows no wait for the end of a step.
    assert medians[FluidEngine] == pytest.approx(medians[SteppedEngine], rel=0.1)


@pytest.mark.parametrize("engine_class", ENGINES)
def test_a_realtime_request_takes_the_slot_of_a_batch_one_which_loses_no_token(engine_class):
    mesh = Mesh(MeshSpec(engines=(EngineSpec(),), engine_class=engine_class), 1, warm_up_seconds=60.0)
    batch = Kind(answer=fixed(400), max_tokens=400, service_class=ServiceClass.BATCH, deadline_seconds=None)
    start = mesh.now
    mesh.play(
        together(
            (batch.job(number, start + 0.1 * number, mesh.simulator.random) for number in range(8)),
            [Job("urgent", start + 2, service_class=ServiceClass.REALTIME)],
        )
    )
    mesh.run_for(1.9)
    assert mesh.replicas[0].engine.load().running == 8
    mesh.run_for(1.1)
    urgent = next(job for job in mesh.jobs if job.job_id == "urgent")
    assert urgent.end is End.COMPLETED
    assert urgent.time_to_first_token_seconds < 0.1
    assert ends(mesh.jobs)["open"] == 8
    mesh.run_for(20)
    assert ends(mesh.jobs) == {"completed": 9}
    assert {job.generated_token_count for job in mesh.jobs if job is not urgent} == {400}
    assert faults(mesh) == []


class TestClients:
    def test_who_leaves_leaves_nothing_behind(self):
        mesh = run_mesh(poisson(Kind(leave_share=1.0, leave_within_seconds=0.4), 150, 2, 10, 1), seconds=30)
        assert ends(mesh.jobs)["left"] > 0.5 * len(mesh.jobs)
        assert faults(mesh) == []

    def test_who_gives_up_at_the_deadline_has_expired(self):
        mesh = run_mesh([Job("slow", 2.0, answer_token_count=200, deadline_seconds=0.5)])
        assert mesh.jobs[0].end is End.EXPIRED
        assert mesh.jobs[0].generated_token_count > 10
        assert faults(mesh) == []

    def test_a_refused_one_tries_again_as_often_as_it_may(self):
        mesh = Mesh(MeshSpec(settings=Settings(replica_grace_seconds=0.5)), 1, retries=Retries(3, pause_seconds=0.1))
        for replica in mesh.replicas:
            replica.set_ready(False)
        mesh.run_for(5)
        mesh.play([Job("wish", mesh.now)])
        mesh.run_for(5)
        assert [job.end for job in mesh.jobs] == [End.REFUSED] * 4
        assert [job.attempt for job in mesh.jobs] == [0, 1, 2, 3]

    def test_without_a_live_scheduler_the_replicas_go_on_serving(self):
        mesh = Mesh(MeshSpec(), 1)
        mesh.kill_scheduler(0)
        mesh.play(poisson(Kind(), 30, mesh.now, 5, 1))
        mesh.run_for(10)
        assert ends(mesh.jobs) == {"completed": len(mesh.jobs)}
        assert faults(mesh) == []

    def test_what_a_killed_scheduler_held_is_served_all_the_same(self):
        mesh = Mesh(MeshSpec(), 1)
        mesh.play(burst(Kind(deadline_seconds=None), 100, mesh.now, 0.1, 1))
        mesh.run_for(0.2)
        assert mesh.schedulers[0].waiting_count > 50
        mesh.kill_scheduler(0)
        mesh.run_for(20)
        assert ends(mesh.jobs) == {"completed": 100}


def test_a_mesh_that_lost_a_credit_is_found_out():
    mesh = run_mesh(poisson(Kind(), 30, 2, 5, 1), seconds=20)
    assert faults(mesh) == []
    known = next(iter(mesh.schedulers[0].table))
    known.book.spend(mesh.now)
    assert faults(mesh) != []


class TestWorkload:
    def test_arrivals_are_in_order_and_as_many_as_asked(self):
        times = [
            job.sent_at for job in together(poisson(Kind(name="a"), 50, 0, 100, 1), poisson(Kind(), 50, 0, 100, 1))
        ]
        assert times == sorted(times)
        assert len(times) == pytest.approx(10_000, rel=0.05)

    def test_a_square_wave_is_silent_in_every_other_half(self):
        times = [job.sent_at for job in square_wave(Kind(), 100, 0, 0.5, 0, 10, 1)]
        assert times and all(at % 1.0 < 0.5 for at in times)


class TestFigures:
    def test_jain_is_one_for_equals_and_a_share_for_one_that_has_all(self):
        assert jain([3, 3, 3, 3]) == 1
        assert jain([1, 0, 0, 0]) == 0.25

    def test_goodput_counts_what_was_in_time(self):
        good = Job("good", 1.0, deadline_seconds=1.0, end=End.COMPLETED, ended_at=1.5)
        late = Job("late", 1.0, deadline_seconds=1.0, end=End.COMPLETED, ended_at=2.5)
        refused = Job("refused", 1.0, end=End.REFUSED, ended_at=1.1)
        assert goodput([good, late, refused], Window(0, 2)) == 0.5


class TestBalancers:
    def test_round_robin_takes_turns(self):
        mesh = Mesh(MeshSpec(scheduler_count=0), 1)
        order = Balancer.round_robin(mesh.simulator).order
        assert [order(mesh.replicas)[0].address for _ in range(3)] == [
            "10.0.0.1:50060",
            "10.0.0.2:50060",
            "10.0.0.1:50060",
        ]

    @pytest.mark.parametrize("rule", [Balancer.least_request, Balancer.power_of_two])
    def test_the_emptier_of_two_is_chosen(self, rule):
        mesh = Mesh(MeshSpec(scheduler_count=0), 1)
        mesh.replicas[0].take(Job("a", 0.0, answer_token_count=100), "")
        assert rule(mesh.simulator).order(mesh.replicas)[0] is mesh.replicas[1]
