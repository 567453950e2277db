"""What is expected of answers, waits and arrivals, and what admission makes of it."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from tidegate.common.errors import Reason
from tidegate.scheduler.admission import Admission, Conditions, latest_start
from tidegate.scheduler.answer_lengths import FEWEST_ANSWERS, HISTOGRAM_LIMIT, AnswerLengths
from tidegate.scheduler.brownout import Brownout, Signs, Terms
from tidegate.scheduler.expectations import Expectations
from tidegate.scheduler.fair_shares import FairShares, max_min_shares
from tidegate.scheduler.forecast import LONGEST_LULL_SECONDS, Arrivals, WorkRates
from tidegate.scheduler.lanes import NO_FLOORS, LaneLimits, Lanes, Waiting
from tidegate.scheduler.observations import Ended, Observations, cost_of
from tidegate.scheduler.outlook import Outlook
from tidegate.scheduler.replica_table import ReplicaLoad, ReplicaTable
from tidegate.scheduler.request import Request, ServiceClass, request_from_headers
from tidegate.scheduler.tenant_habits import STEADY_COUNT, TenantHabits

REALTIME, STANDARD, BATCH = ServiceClass
NOW = 100.0


class TestAnswerLengths:
    def test_nothing_known_is_the_default_and_max_tokens_is_the_cap(self):
        lengths = AnswerLengths(256)
        assert lengths.expected("t", "m", 1000, 0.9) == 256
        assert lengths.expected("t", "m", 16, 0.9) == 16

    def test_a_quantile_of_what_was_seen_is_expected_within_a_quarter(self):
        lengths = AnswerLengths(256)
        for number in range(100):
            lengths.see("t", "m", 1 + number * 37 % 100)
        assert 50 <= lengths.expected("t", "m", 1000, 0.5) <= 63
        assert 90 <= lengths.expected("t", "m", 1000, 0.9) <= 113

    def test_the_past_fades(self):
        lengths = AnswerLengths(256)
        for length in [10] * 1000 + [400] * 1000:
            lengths.see("t", "m", length)
        assert lengths.expected("t", "m", 1000, 0.5) >= 400

    def test_each_model_has_answers_of_its_own_length(self):
        lengths = AnswerLengths(256)
        for _ in range(100):
            lengths.see("t", "usual", 400)
            lengths.see("t", "lite", 8)
        assert lengths.expected("t", "usual", 1000, 0.5) >= 400
        assert lengths.expected("t", "lite", 1000, 0.5) <= 10

    def test_of_a_model_of_which_little_is_known_the_tenants_answers_of_all_models_are_expected(self):
        lengths = AnswerLengths(256)
        for _ in range(15):
            lengths.see("t", "one", 8)
            lengths.see("t", "other", 100)
        for _ in range(1000):
            lengths.see("else", "one", 400)
        # Neither model alone says anything by now.
        for model in ("one", "other", "new"):
            assert lengths.expected("t", model, 1000, 0.4) <= 10
            assert 100 <= lengths.expected("t", model, 1000, 0.6) <= 125

    def test_a_tenant_of_which_little_is_known_is_like_all(self):
        lengths = AnswerLengths(256)
        assert not lengths.is_known("unknown", "m")
        for _ in range(100):
            lengths.see("known", "m", 8)
        assert lengths.expected("unknown", "m", 1000, 0.5) <= 10
        assert lengths.is_known("unknown", "new")

    def test_what_is_kept_is_bounded_and_the_tenant_heard_of_longest_ago_is_forgotten(self):
        lengths = AnswerLengths(256)
        for number in range(HISTOGRAM_LIMIT // 2 + 10):
            for model in ("usual", "lite"):
                lengths.see(str(number), model, 5)
        assert sum(len(models) for models in lengths._tenants.values()) == HISTOGRAM_LIMIT
        assert list(lengths._tenants) == [str(number) for number in range(10, HISTOGRAM_LIMIT // 2 + 10)]


class TestArrivals:
    def test_a_steady_stream_at_the_capacity_presses_about_once(self):
        arrivals = Arrivals()
        for number in range(1000):
            arrivals.count(10, number * 0.1)
        assert arrivals.pressure(100, 99.95) == pytest.approx(1.0, abs=0.1)

    def test_a_flood_is_seen_within_a_tenth_of_a_second_and_forgotten_soon(self):
        arrivals = Arrivals()
        for number in range(20):
            arrivals.count(10, number * 0.005)
        assert arrivals.pressure(200, 0.1) > 2
        assert arrivals.pressure(200, 5.0) < 0.1

    def test_an_unknown_capacity_is_no_pressure(self):
        assert Arrivals().pressure(None, 0) == 1

    def test_the_longest_pause_of_late_is_known_and_fades(self):
        arrivals = Arrivals()
        for number in range(200):
            arrivals.count(10, number * 0.005 + (0.06 if number >= 100 else 0))
        last = 199 * 0.005 + 0.06
        assert 0.03 < arrivals.lull_seconds(last) < 0.06
        for number in range(1000):
            arrivals.count(10, last + number * 0.005)
        assert arrivals.lull_seconds(last + 5) < 0.01

    def test_a_pause_that_lasts_counts_while_it_does_but_not_without_a_bound(self):
        arrivals = Arrivals()
        arrivals.count(10, 0.0)
        assert arrivals.lull_seconds(0.04) == pytest.approx(0.04)
        assert arrivals.lull_seconds(61.0) == LONGEST_LULL_SECONDS


class TestWorkRates:
    def test_what_leaves_into_empty_slots_is_not_how_fast_they_become_free(self):
        work = WorkRates(5.0)
        work.set_backlog([STANDARD], 0.0, is_full=False)
        for number in range(100):
            work.count_dispatch(STANDARD, 10, number * 0.01)
        assert work.rate(1.0) is None
        work.set_backlog([STANDARD], 1.0, is_full=True)
        for number in range(1, 101):
            work.count_dispatch(STANDARD, 10, 1.0 + number * 0.1)
        assert work.rate(11.0) == pytest.approx(100, rel=0.05)


def ready_table(slot_count=10):
    table = ReplicaTable(margin_seconds=0.25, silence_seconds=1e9, now=0)
    table.set_addresses(["a:1"])
    replica = table.get("a:1")
    table.connect(replica, 0)
    table.hear(replica, ReplicaLoad(True, 0, 0, slot_count, 0.01, 0.1), 0)
    return table


class World:
    """Admission and all it goes by, with answers of 100 tokens that take 1 s in each of ten slots."""

    def __init__(self, answers_seen=200, floors=NO_FLOORS):
        self.lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(10**6, 10**9, 10**12)), floors=floors)
        self.observations = Observations(self.lanes, AnswerLengths(256))
        self.work = WorkRates(5.0)
        self.table = ready_table()
        self.table.get("a:1").book.grant(["free"], 1e9, 0)
        self.outlook = Outlook(self.lanes, self.table, self.work, self.observations)
        self.habits = TenantHabits()
        self.brownout = Brownout(Terms(2.0, 0.5, 2.0, 2.0), 0.0)
        self.admission = Admission(
            self.lanes,
            replica_grace_seconds=5,
            held_request_limit=10**6,
            default_retry_seconds=5,
            habits=self.habits,
            brownout=self.brownout,
        )
        for number in range(answers_seen):
            self.observations.dispatch(self.request(), str(number), 210)
            self.observations.end(Ended(str(number), True, 0.01, 1.0, 10, 100), NOW - 1)

    def expectations(self):
        return Expectations(self.outlook, self.observations, self.habits, self.brownout, 0.8)

    def request(self, *, timeout=None, service_class=STANDARD, tenant="t"):
        fields = {} if timeout is None else {"grpc-timeout": f"{int(timeout * 1000)}m"}
        request = request_from_headers({"x-tidegate-tenant": tenant, **fields}, NOW)
        request.service_class, request.cost = service_class, cost_of(10, 100)
        request.expected_seconds = self.outlook.service_seconds(100, NOW)
        if request.deadline is None:
            request.deadline = NOW + 600
        return request

    def wait(self, count, service_class=STANDARD, tenant="t"):
        for _ in range(count):
            self.lanes.add(Waiting("", service_class, 1, 1, 1, NOW, NOW + 60, tenant=tenant, cost=210))

    def press(self, times=0, service_class=STANDARD, **times_of_tenants):
        capacity = self.outlook.capacity(NOW)
        for number in range(500):
            for tenant, its_times in {"t": times, **times_of_tenants}.items():
                self.outlook.ask(service_class, tenant, capacity * its_times / 100, NOW - 5 + number * 0.01)

    def dispatch(self, count):
        for _ in range(count):
            self.lanes.take(self.lanes.next)

    def see(self, *works, tenant="t"):
        for work in works:
            request = self.request(timeout=5, tenant=tenant)
            request.work = work
            self.habits.see(request)

    def refusal(self, request, lot=0.0):
        return self.admission.refusal(request, self.conditions(lot))

    def conditions(self, lot=0.0):
        return Conditions(NOW, None, 0.0, 1, 0.0, self.outlook, lot=lot)


class TestAdmission:
    def test_before_anything_was_measured_capacity_follows_from_slots_and_times(self):
        world = World()
        assert world.outlook.capacity(NOW) == pytest.approx(2100, rel=0.05)

    def test_before_answers_ended_capacity_follows_from_what_replicas_say_of_their_speed(self):
        world = World(answers_seen=int(FEWEST_ANSWERS) - 1)
        assert world.outlook.capacity(NOW) is None
        request = world.request()
        request.prompt_token_count = 10
        world.expectations().expect(request, NOW)
        assert world.outlook.capacity(NOW) == pytest.approx(
            10 * request.cost / world.outlook.service_seconds(256, NOW), rel=0.01
        )

    @pytest.mark.parametrize("floors", [{STANDARD: 0.1}, {STANDARD: 0.1, BATCH: 0.02}, NO_FLOORS])
    def test_what_a_floor_has_paid_for_is_taken_behind_a_flood_of_what_is_more_urgent(self, floors):
        world = World(floors=floors)
        world.press(5, REALTIME)
        world.wait(100, REALTIME)
        assert world.refusal(world.request(timeout=5)).reason is Reason.SERVER_IS_OVERLOADED
        world.dispatch(6)
        assert world.refusal(world.request(timeout=5)) is not None
        world.dispatch(4)
        assert (world.refusal(world.request(timeout=5)) is None) == bool(floors)

    def test_a_brownout_takes_what_the_floor_of_a_class_that_it_leaves_out_pays_for(self):
        world = World(floors={STANDARD: 0.1})
        world.brownout.step = 5
        world.wait(100, REALTIME)
        assert world.refusal(world.request()) is None
        world.wait(1)
        assert world.refusal(world.request()).brownout_step == 5
        world.dispatch(9)
        assert world.refusal(world.request()) is not None
        world.lanes.lane(STANDARD).owe(21)
        assert world.refusal(world.request()) is None

    def test_the_floors_of_less_urgent_classes_that_ask_for_them_leave_less(self):
        world = World(floors={STANDARD: 0.3, BATCH: 0.2})
        world.press(0.8, REALTIME)
        assert world.outlook.pressure(REALTIME, NOW) == pytest.approx(0.8, abs=0.05)
        world.press(2, STANDARD)
        world.press(0.1, BATCH)
        assert world.outlook.pressure(REALTIME, NOW) == pytest.approx(0.8 / 0.6, abs=0.1)
        world.wait(1, BATCH)
        assert world.outlook.pressure(REALTIME, NOW) == pytest.approx(0.8 / 0.5, abs=0.1)

    def test_a_request_may_use_all_of_its_slack_while_nothing_presses(self):
        world = World()
        world.wait(25)
        assert world.refusal(world.request(timeout=5)) is None
        world.wait(20)
        refused = world.refusal(world.request(timeout=5))
        assert refused.reason is Reason.SERVER_IS_OVERLOADED
        assert "45 requests wait before this one, for about 4.5 s" in refused.message

    def test_under_a_flood_the_queue_is_kept_short(self):
        world = World()
        world.press(10)
        assert world.refusal(world.request(timeout=5)) is None
        world.wait(3)
        assert world.refusal(world.request(timeout=5)).reason is Reason.SERVER_IS_OVERLOADED

    def test_what_envoy_refuses_for_the_scheduler_presses_too(self):
        presses = []
        for offered_count in (1.0, 4.0):
            world = World()
            request = world.request()
            request.offered_count = offered_count
            world.expectations().count(request, NOW)
            world.expectations().count_unread(request, NOW)
            presses.append(world.outlook.pressure(STANDARD, NOW))
        assert presses[1] == pytest.approx(4 * presses[0])

    def test_under_a_flood_who_comes_while_no_slot_is_free_is_not_let_wait(self):
        world = World()
        world.press(10)
        assert world.refusal(world.request(timeout=5)) is None
        world.table.get("a:1").book.spend(NOW, urgent=False)
        assert world.refusal(world.request(timeout=5)).reason is Reason.SERVER_IS_OVERLOADED

    def test_with_no_slot_free_the_first_in_line_waits_until_an_answer_ends(self):
        world = World()
        assert world.outlook.wait_seconds(STANDARD, "t", 210, NOW) == 0
        world.table.get("a:1").book.spend(NOW, urgent=False)
        assert world.outlook.wait_seconds(STANDARD, "t", 210, NOW) == pytest.approx(0.1, rel=0.05)

    def test_while_no_replica_is_there_the_first_in_line_is_not_refused_for_its_wait(self):
        world = World()
        world.table.disconnect(world.table.get("a:1"), "away")
        assert world.outlook.capacity(NOW) == 0
        assert world.refusal(world.request(timeout=60)) is None

    def test_a_stream_that_makes_pauses_may_keep_as_much_waiting_as_they_last(self):
        steady, paused = World(), World()
        for world, seconds in ((steady, 0.01), (paused, 0.09)):
            for number in range(100):
                cost = 10 * seconds * world.outlook.capacity(NOW)
                world.outlook.ask(STANDARD, "t", cost, NOW - seconds * (100 - number))
            world.lanes.add(Waiting("", STANDARD, 1, 1, 1, NOW, NOW + 60, tenant="t", cost=100))
        assert steady.refusal(steady.request(timeout=5)).reason is Reason.SERVER_IS_OVERLOADED
        assert paused.refusal(paused.request(timeout=5)) is None

    def test_who_gave_no_deadline_may_wait_all_the_same(self):
        world = World()
        world.press(10)
        world.wait(1000)
        assert world.refusal(world.request()) is None

    def test_who_left_much_time_may_wait_for_most_of_it(self):
        world = World()
        world.press(10)
        world.wait(400)
        assert world.refusal(world.request(timeout=300)) is None
        assert world.refusal(world.request(timeout=20)) is not None
        world.wait(2000)
        assert world.refusal(world.request(timeout=300)) is not None

    def test_what_could_not_be_answered_in_time_at_all_is_told_so(self):
        world = World()
        refused = world.refusal(world.request(timeout=0.5))
        assert "The answer would take about 1." in refused.message
        assert "/v1/batches" in refused.message

    def test_a_modest_tenant_is_let_in_where_a_greedy_one_is_not(self):
        world = World()
        world.press(greedy=10, modest=0.1)
        world.wait(50, tenant="greedy")
        assert world.refusal(world.request(timeout=5, tenant="greedy")) is not None
        assert world.refusal(world.request(timeout=5, tenant="modest")) is None

    def test_a_flood_of_a_less_urgent_class_does_not_press_the_urgent(self):
        world = World()
        world.press(12, service_class=BATCH)
        assert world.outlook.pressure(REALTIME, NOW) < 0.1
        assert world.outlook.pressure(BATCH, NOW) > 8

    def test_a_tenant_over_its_share_is_refused_and_those_within_theirs_are_not(self):
        world = World()
        world.press(greedy=3, modest=0.3)
        outcomes = []
        for _ in range(30):
            request = world.request(timeout=5, tenant="greedy")
            refused = world.refusal(request)
            outcomes.append(refused is None)
            if refused is None:
                world.outlook.shares[STANDARD].admit("greedy", request.cost)
        assert 3 <= sum(outcomes) <= 12
        assert "more than its share" in refused.message
        assert world.refusal(world.request(timeout=5, tenant="modest")) is None

    def test_under_a_flood_a_longer_request_has_a_smaller_chance(self):
        world = World()
        world.press(10)
        world.see(*([100, 1000] * 20))
        short, long = world.request(timeout=5), world.request(timeout=5)
        short.work, long.work = 100, 1000
        taken = [world.refusal(long, number / 100) is None for number in range(100)]
        assert 8 <= sum(taken) <= 12
        assert taken == sorted(taken, reverse=True)
        assert world.refusal(short, 0.8) is None
        assert "shorter requests go first" in world.refusal(long, 0.99).message

    @pytest.mark.parametrize("service_class", [STANDARD, BATCH])
    def test_without_a_flood_nor_in_the_batch_lane_lengths_are_no_reason(self, service_class):
        world = World()
        world.press(10 if service_class is BATCH else 1.9, service_class)
        world.see(*([100, 1000] * 20))
        request = world.request(timeout=5, service_class=service_class)
        request.work = 1000
        assert world.refusal(request, 0.99) is None

    def test_of_requests_that_are_alike_none_has_a_smaller_chance(self):
        world = World()
        world.press(10)
        world.see(*([500] * 40))
        request = world.request(timeout=5)
        request.work = 500
        assert world.refusal(request, 0.99) is None

    def test_while_slots_have_nothing_to_do_nobody_is_refused_for_what_others_might_need_them_for(self):
        world = World()
        world.press(10)
        world.see(*([100, 1000] * 20))
        request = world.request(timeout=5)
        request.work = 1000
        assert world.refusal(request, 0.99) is not None
        world.table.get("a:1").book.grant(["second"], 1e9, 0)
        assert world.refusal(request, 0.99) is None

    def test_a_tenant_is_compared_with_itself_alone(self):
        world = World()
        world.press(10)
        world.see(*([10] * 40))
        world.see(1000, tenant="long")
        long = world.request(timeout=5, tenant="long")
        long.work = 1000
        assert world.refusal(long, 0.99) is None

    def test_a_tenant_that_asks_for_less_than_its_share_is_not_refused_for_lengths(self):
        world = World()
        world.press(greedy=10, modest=0.1)
        requests = {tenant: world.request(timeout=5, tenant=tenant) for tenant in ("greedy", "modest")}
        for tenant, request in requests.items():
            world.see(*([100, 1000] * 20), tenant=tenant)
            request.work = 1000
        assert world.refusal(requests["modest"], 0.99) is None
        while world.outlook.shares[STANDARD].owed_share("greedy") > 0.1:
            world.outlook.shares[STANDARD].admit("greedy", 10)
        assert "shorter requests go first" in world.refusal(requests["greedy"], 0.99).message

    def test_what_a_request_takes_follows_from_its_prompt_and_five_times_its_answer(self):
        world = World()
        request = world.request()
        request.prompt_token_count, request.max_tokens = 10, 20
        world.expectations().expect(request, NOW)
        assert request.work == 110

    def test_a_length_that_nobody_has_seen_is_no_reason_to_refuse(self):
        world = World(answers_seen=3)
        request = world.request(timeout=2)
        request.prompt_token_count = 10
        world.expectations().expect(request, NOW)
        assert request.answer_token_count == 256
        assert world.refusal(request) is None

    def test_what_was_once_slow_is_not_believed_for_ever(self):
        world = World()
        assert world.observations.service_seconds(1000, NOW) > 5
        assert world.observations.service_seconds(1000, NOW + 10) == 0

    def test_headers_alone_are_refused_where_a_tenants_requests_are_all_alike(self):
        world = World()
        world.wait(100)
        request = world.request(timeout=5)
        assert world.admission.refusal_of_headers(request, world.conditions()) is None
        for _ in range(STEADY_COUNT):
            world.habits.see(request)
        refused = world.admission.refusal_of_headers(request, world.conditions())
        assert refused.reason is Reason.SERVER_IS_OVERLOADED
        world.habits.see(world.request(service_class=BATCH))
        assert world.admission.refusal_of_headers(request, world.conditions()) is None

    def test_a_brownout_leaves_a_class_out_and_says_so(self):
        world = World()
        world.brownout.step = 1
        refused = world.refusal(world.request(service_class=BATCH))
        assert "No batch requests are taken" in refused.message
        assert world.refusal(world.request()) is None

    def test_a_request_is_not_sent_to_a_replica_when_it_would_be_late_anyway(self):
        world = World()
        request = world.request(timeout=5)
        assert latest_start(request, NOW) == pytest.approx(NOW + 5 - 0.02 - 0.8 * request.expected_seconds)
        assert latest_start(world.request(), NOW) == NOW + 600


class TestObservations:
    def test_a_tenant_is_charged_for_what_it_got(self):
        lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(10, 10, 10)))
        observations = Observations(lanes, AnswerLengths(256))
        request = Request("r", "/", "", False, "t", 0.0, 0.0)
        observations.dispatch(request, "c", 500)
        observations.end(Ended("c", True, 0.1, 1.0, 10, 20), 1.0)
        observations.dispatch(request, "d", 500)
        observations.forget("d")
        queue = lanes.lane(STANDARD).queue
        assert queue._counters["t"] == 0

    def test_a_tenant_is_not_charged_for_what_of_its_prompt_was_there_already(self):
        lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(10, 10, 10)))
        observations = Observations(lanes, AnswerLengths(256))
        observations.dispatch(Request("r", "/", "", False, "t", 0.0, 0.0), "c", 10)
        observations.end(Ended("c", True, 0.1, 1.0, 100, 20, cached_token_count=80), 1.0)
        assert lanes.lane(STANDARD).queue._counters["t"] == (100 - 80) + 2 * 20 - 10
        assert observations.usual_cost == 100 + 2 * 20

    def test_of_the_lite_model_only_the_lengths_of_answers_are_learnt(self):
        world = World(answers_seen=30)
        before = (world.observations.first_token_seconds, world.observations.service_seconds(100, NOW))
        charged = dict(world.lanes.lane(STANDARD).queue._counters)
        request = world.request()
        request.model = "usual"
        for number in range(30):
            world.observations.dispatch_to_lite(request, f"lite-{number}", "small")
            world.observations.end(Ended(f"lite-{number}", True, 5.0, 9.0, 10, 8), NOW)
        world.observations.dispatch_to_lite(request, "left", "small")
        world.observations.forget("left")
        lengths = world.observations.lengths
        assert lengths.expected("t", "small", 1000, 0.9) <= 10
        assert lengths.expected("t", "", 1000, 0.5) >= 100
        assert world.observations.first_token_percentile(STANDARD, 0.95, NOW) == 0.01
        assert (world.observations.first_token_seconds, world.observations.service_seconds(100, NOW)) == before
        assert dict(world.lanes.lane(STANDARD).queue._counters) == charged

    def test_the_percentile_counts_the_queue_and_forgets(self):
        lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(10, 10, 10)))
        observations = Observations(lanes, AnswerLengths(256))
        request = Request("r", "/", "", False, "t", 0.0, 0.0)
        for number in range(100):
            request.queue_seconds = number / 100
            observations.dispatch(request, str(number), 1)
            observations.end(Ended(str(number), True, 0.5, 1.0, 1, 1), 1.0)
        assert observations.first_token_percentile(STANDARD, 0.95, 1.0) == pytest.approx(1.45)
        assert observations.first_token_percentile(REALTIME, 0.95, 1.0) is None
        assert observations.first_token_percentile(STANDARD, 0.95, 7.0) is None

    def test_an_outcome_that_nobody_waits_for_changes_nothing(self):
        lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(10, 10, 10)))
        observations = Observations(lanes, AnswerLengths(256))
        observations.end(Ended("x", True, 0.5, 1.0, 1, 1), 1.0)
        assert observations.first_token_seconds is None


TERMS = Terms(queue_delay_seconds=2, first_token_seconds=0.5, up_seconds=1, down_seconds=2)


class TestBrownout:
    def brownout(self):
        return Brownout(TERMS, 0.0)

    def run(self, brownout, signs, begin, seconds):
        """Looks four times a second."""
        for number in range(int(seconds * 4) + 1):
            brownout.look(signs, begin + number / 4)
        return brownout.step

    def test_no_class_is_cut_down_for_its_own_sake(self):
        late = Signs(queue_delay_seconds=60)
        assert self.run(self.brownout(), {BATCH: late}, 0, 60) == 0
        assert self.run(self.brownout(), {STANDARD: late, BATCH: late}, 0, 60) == 2
        assert self.run(self.brownout(), {REALTIME: late}, 0, 60) == 5

    def test_it_steps_back_by_itself_when_there_is_nothing_to_say(self):
        brownout = self.brownout()
        self.run(brownout, {REALTIME: Signs(queue_delay_seconds=9)}, 0, 20)
        assert brownout.step == 5
        assert self.run(brownout, {}, 20.25, 10) == 0

    def test_a_moment_is_not_enough(self):
        brownout = self.brownout()
        for second in range(20):
            brownout.look({REALTIME: Signs(queue_delay_seconds=9.0 * (second % 2))}, second * 0.7)
        assert brownout.step == 0

    def test_with_nothing_to_do_it_is_back_within_a_second(self):
        brownout, stale = self.brownout(), {REALTIME: Signs(0.01, first_token_seconds=9)}
        self.run(brownout, stale, 0, 20)
        assert brownout.step == 5
        for tick in range(5):
            brownout.look(stale, 20.25 + tick / 4, is_idle=True)
        assert brownout.step == 0

    def test_a_gap_in_a_load_is_not_the_end_of_it(self):
        brownout, stale = self.brownout(), {REALTIME: Signs(0.01, first_token_seconds=9)}
        self.run(brownout, stale, 0, 20)
        for tick in range(100):
            brownout.look(stale, 20.25 + tick / 10, is_idle=bool(tick % 2))
        assert brownout.step == 5

    def test_an_engine_that_is_slow_by_itself_is_no_reason(self):
        slow = Signs(0.01, first_token_seconds=1.2, unloaded_seconds=1.0)
        assert self.run(self.brownout(), {REALTIME: slow}, 0, 60) == 0
        queued = Signs(0.01, first_token_seconds=3.2, unloaded_seconds=1.0)
        assert self.run(self.brownout(), {REALTIME: queued}, 0, 60) == 5

    def test_first_tokens_of_a_load_that_is_gone_are_no_reason(self):
        brownout, stale = self.brownout(), {REALTIME: Signs(0.0, first_token_seconds=9)}
        assert self.run(brownout, stale, 0, 60) == 0
        self.run(brownout, {REALTIME: Signs(0.01, first_token_seconds=9)}, 60, 20)
        assert brownout.step == 5
        assert self.run(brownout, stale, 80, 20) == 0

    def test_what_each_step_does(self):
        brownout = self.brownout()
        table = []
        for step in (0, 1, 2, 3, 5):
            brownout.step = step
            refused = [one.label for one in ServiceClass if brownout.refuses(one)]
            shortened = [one.label for one in ServiceClass if brownout.shortens(one)]
            table.append((refused, shortened))
        assert table == [
            ([], []),
            (["batch"], []),
            (["batch"], ["batch"]),
            (["batch"], ["standard", "batch"]),
            (["standard", "batch"], ["standard", "batch"]),
        ]

    def test_the_step_for_the_lite_model_is_left_out_where_there_is_none(self):
        late, with_lite = {REALTIME: Signs(queue_delay_seconds=9)}, Brownout(TERMS, 0.0, has_lite=True)
        for brownout, expected in ((self.brownout(), [0, 1, 2, 3, 5]), (with_lite, [0, 1, 2, 3, 4, 5])):
            steps = {brownout.step: None}
            for number in range(100):
                brownout.look(late, number / 4)
                steps[brownout.step] = None
            assert list(steps) == expected
            down = {brownout.step: None}
            for number in range(100, 300):
                brownout.look({}, number / 4)
                down[brownout.step] = None
            assert list(down) == expected[::-1]
        with_lite.step = 4
        assert [one.label for one in ServiceClass if with_lite.prefers_lite(one)] == ["standard"]
        with_lite.step = 3
        assert not any(with_lite.prefers_lite(one) for one in ServiceClass)


class TestShares:
    def test_what_the_modest_leave_is_divided_between_the_others(self):
        shares = max_min_shares({"a": 10, "b": 100, "c": 100}, {"a": 1, "b": 1, "c": 1}, 100)
        assert shares == {"a": math.inf, "b": 45, "c": 45}

    def test_weights_divide(self):
        shares = max_min_shares({"a": 999, "b": 999, "c": 999}, {"a": 1, "b": 2, "c": 4}, 70)
        assert shares == {"a": 10, "b": 20, "c": 40}

    def test_with_enough_for_all_nobody_is_held(self):
        assert set(max_min_shares({"a": 10, "b": 20}, {"a": 1, "b": 1}, 31).values()) == {math.inf}

    def test_a_tenant_that_is_alone_is_never_held(self):
        shares = FairShares(lambda name: 1.0)
        for number in range(100):
            shares.ask("alone", 1000, number / 100)
            assert shares.is_within("alone", 10, number / 100)
            shares.admit("alone", 1000)

    @pytest.mark.parametrize("seed", range(3))
    def test_over_time_each_gets_its_share_whoever_asks_most_often(self, seed):
        chance, shares, got = random.Random(seed), FairShares(lambda name: 1.0), Counter()
        rates = {"loud": 100, "usual": 20, "quiet": 2}
        for step in range(3_000):
            for name, rate in rates.items():
                if chance.random() < rate * 0.01:
                    now = step * 0.01
                    shares.ask(name, 10, now)
                    if shares.is_within(name, 100, now):
                        shares.admit(name, 10)
                        got[name] += 10 * (now >= 5)
        assert got["quiet"] == pytest.approx(20 * 25, rel=0.4)
        assert got["loud"] == pytest.approx(got["usual"], rel=0.15)
        assert sum(got.values()) == pytest.approx(110 * 25, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"x-request-timeout-ms": "2500"}, 2.5),
        ({"grpc-timeout": "1S", "x-request-timeout-ms": "2500"}, 1.0),
        ({}, None),
    ],
)
def test_a_deadline_can_be_said_in_milliseconds(fields, seconds):
    request = request_from_headers(fields, 0.0)
    assert request.client_deadline == (None if seconds is None else pytest.approx(seconds, abs=0.03))


@pytest.mark.parametrize("text", ["soon", "-1", "1.5", "99999999999", "\u0661"])
def test_a_deadline_that_makes_no_sense_is_named(text):
    field, message = request_from_headers({"x-request-timeout-ms": text}, 0.0).header_fault
    assert field == "x-request-timeout-ms"
    assert text in message
