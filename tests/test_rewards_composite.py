"""rewards/composite.py: entries with their own device, precision and batch size, rewards that may fail, several at a time, prompts that can never be scored."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.composite import Entry, WeightedRewards, join_scores
from rewards.registry import FunctionReward
from rewards.remote import RemoteReward
from rewards.win_rate import WinRate

CPU = torch.device("cpu")
META = torch.device("meta")
NAN = float("nan")


class Planted:
    """A reward that gives the first pixel, or what it is told; it notes where it is loaded and moved."""

    def __init__(self, function: Callable[[SampleBatch], Scores] | None = None, **facts: object) -> None:
        self.info = dataclasses.replace(RewardInfo("planted", "for tests", 0.0, 1.0), **facts)  # type: ignore[arg-type]
        self.function = function
        self.loads: list[tuple[torch.device, torch.dtype]] = []
        self.places: list[str] = []
        self.sizes: list[int] = []
        self.closed = 0

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.loads.append((device, dtype))

    def to(self, device: torch.device) -> None:
        self.places.append(device.type)

    def close(self) -> None:
        self.closed += 1

    def score(self, batch: SampleBatch) -> Scores:
        self.sizes.append(len(batch))
        if self.function is not None:
            return self.function(batch)
        assert batch.images is not None
        values = batch.images[:, 0, 0, 0]
        return Scores(values, values.isfinite())


def batch_of(*values: float) -> SampleBatch:
    images = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
    return SampleBatch([Prompt(f"prompt {i}") for i in range(len(values))], images)


def loaded(*entries: Entry) -> WeightedRewards:
    weighted = WeightedRewards(entries)
    weighted.load(CPU)
    return weighted


# --- where and how


def test_each_is_loaded_where_its_entry_its_nature_or_the_run_says() -> None:
    own, engine, placed, typed = Planted(dtype="bfloat16"), Planted(runs_on="cpu", dtype="bfloat16"), Planted(dtype="bfloat16"), Planted()
    entries = [
        Entry("own", 1.0, own),
        Entry("engine", 1.0, engine),
        Entry("placed", 1.0, placed, device=CPU),
        Entry("typed", 1.0, typed, dtype=torch.float16),
    ]
    WeightedRewards(entries).load(META)
    assert own.loads == [(META, torch.bfloat16)]
    assert engine.loads == [(CPU, torch.float32)]  # half precision is for accelerators
    assert placed.loads == [(CPU, torch.float32)]
    assert typed.loads == [(META, torch.float16)]


def test_a_reward_that_others_have_loaded_is_not_loaded_again_and_scores() -> None:
    shared, own = Planted(), Planted()
    first = WeightedRewards([Entry("a", 1.0, shared)])
    second = WeightedRewards([Entry("b", 1.0, shared), Entry("c", 1.0, own)], beside=first)
    first.load(CPU)
    second.load(CPU)
    assert (len(shared.loads), len(own.loads)) == (1, 1)
    assert second.score(batch_of(0.5))["b"].values.tolist() == [0.5]


def test_networks_wait_on_the_cpu_between_batches() -> None:
    reward, still = Planted(), Planted()
    weighted = WeightedRewards([Entry("moves", 1.0, reward, offload=True), Entry("stays", 1.0, still)])
    weighted.load(META)
    assert reward.places == ["cpu"]
    weighted.score(batch_of(0.5))
    weighted.rest()
    assert reward.places == ["cpu", "meta", "cpu"]
    assert still.places == []


def test_the_batch_size_of_the_entry_wins() -> None:
    mine, own, group = Planted(batch_size=2), Planted(batch_size=2), Planted(scope="group")
    loaded(Entry("mine", 1.0, mine, batch_size=3), Entry("own", 1.0, own), Entry("group", 1.0, group, batch_size=1)).score(batch_of(1, 2, 3, 4))
    assert (mine.sizes, own.sizes, group.sizes) == ([3, 1], [2, 2], [4])


def short_of_memory(limit: int) -> Callable[[SampleBatch], Scores]:
    def score(batch: SampleBatch) -> Scores:
        if len(batch) > limit:
            raise torch.OutOfMemoryError("out of memory")
        assert batch.images is not None
        return Scores(batch.images[:, 0, 0, 0], torch.ones(len(batch), dtype=torch.bool))

    return score


def test_a_batch_that_does_not_fit_is_halved_for_good_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    reward = Planted(short_of_memory(2), batch_size=7)
    weighted = loaded(Entry("wide", 1.0, reward))
    values = [float(i) for i in range(9)]
    assert weighted.score(batch_of(*values))["wide"].values.tolist() == values
    assert reward.sizes == [7, 4, 2, 2, 2, 2, 1]
    weighted.score(batch_of(*values))
    assert reward.sizes[7:] == [2, 2, 2, 2, 1]
    assert "reward wide: out of memory, from now on with batch_size 2" in caplog.text


@pytest.mark.parametrize(("limit", "scope"), [(0, "sample"), (2, "group")])
def test_what_cannot_be_halved_says_what_would_help(limit: int, scope: str) -> None:
    with pytest.raises(UserError, match="reward wide: the memory of cpu does not hold it; set device: cpu, a smaller dtype, or offload: true"):
        loaded(Entry("wide", 1.0, Planted(short_of_memory(limit), scope=scope))).score(batch_of(1, 2, 3))


def test_a_raw_column_cannot_take_the_name_of_a_metric() -> None:
    reward = Planted(lambda batch: Scores(torch.ones(1), torch.ones(1, dtype=torch.bool), {"std": torch.ones(1)}))
    with pytest.raises(UserError, match="reward r returned a raw column called std, which is the name of a metric of its own"):
        loaded(Entry("r", 1.0, reward)).score(batch_of(1))


# --- what could not be scored


def test_a_reason_finds_its_sample_across_batches() -> None:
    def score(batch: SampleBatch) -> Scores:
        assert batch.images is not None
        values = batch.images[:, 0, 0, 0]
        bad = torch.nonzero(values > 5).flatten().tolist()
        return Scores(torch.where(values > 5, NAN, values), values <= 5, problems={i: f"{values[i]:g} is too bright" for i in bad})

    weighted = loaded(Entry("dim", 1.0, Planted(score, batch_size=2)), Entry("silent", 1.0, Planted()))
    found = weighted.score(batch_of(1, 9, 3, 4, NAN, 7))
    assert found["dim"].problems == {1: "9 is too bright", 4: "it gave no reason", 5: "7 is too bright"}
    assert found["silent"].problems == {4: "it gave no reason"}
    assert found["total"].problems == {
        1: "reward dim on the prompt 'prompt 1': 9 is too bright",
        4: "reward dim on the prompt 'prompt 4': it gave no reason",
        5: "reward dim on the prompt 'prompt 5': 7 is too bright",
    }
    twice = join_scores([found["dim"], found["dim"]])
    assert sorted(twice.problems) == [1, 4, 5, 7, 10, 11]
    assert len(twice.values) == 12


def test_a_reward_that_is_not_required_leaves_the_total_to_the_others() -> None:
    some = Planted(lambda batch: Scores(torch.tensor([1.0, NAN, NAN]), torch.tensor([True, False, False])))
    weighted = loaded(Entry("all", 2.0, Planted()), Entry("some", 10.0, some, required=False))
    total = weighted.score(batch_of(1, 2, NAN))["total"]
    assert total.valid.tolist() == [True, True, False]
    assert total.values[:2].tolist() == [12, 4]
    assert total.values[2].isnan()
    assert list(total.problems) == [2]


def test_a_sample_without_an_optional_score_has_the_mean_of_its_group_and_never_a_zero() -> None:
    some = Planted(lambda batch: Scores(torch.tensor([1.0, NAN, 3.0, NAN, NAN]), torch.tensor([True, False, True, False, False])))
    weighted = loaded(Entry("all", 2.0, Planted()), Entry("some", 10.0, some, required=False))
    batch = batch_of(1, 1, 1, 1, 2)
    total = weighted.score(SampleBatch(batch.prompts, batch.images, group=torch.tensor([7, 7, 7, 4, 4])))["total"]
    assert total.values.tolist() == [12, 22, 32, 2, 4]  # nobody of the second group has a score, so nobody gains or loses
    assert total.valid.all()


def test_a_reward_that_ends_the_program_is_an_error_like_any_other() -> None:
    def leave(batch: SampleBatch) -> Scores:
        raise SystemExit(3)

    with pytest.raises(UserError, match="^reward rude failed on the prompt 'prompt 0': SystemExit: 3; correct the reward"):
        loaded(Entry("rude", 1.0, Planted(leave))).score(batch_of(1, 2))


def test_a_sample_that_only_watched_rewards_could_score_is_invalid() -> None:
    nothing = Planted(lambda batch: Scores(torch.full((len(batch),), NAN), torch.zeros(len(batch), dtype=torch.bool)))
    total = loaded(Entry("watched", 0.0, Planted()), Entry("some", 1.0, nothing, required=False)).score(batch_of(1.0))["total"]
    assert (total.valid.tolist(), total.problems) == ([False], {0: "reward some on the prompt 'prompt 0': it gave no reason"})


# --- weights, several at a time


def test_weights_may_change() -> None:
    weighted = loaded(Entry("a", 1.0, Planted()), Entry("b", 0.0, Planted()))
    weighted.weights = {"a": 0.5, "b": 2.0}
    assert weighted.weights == {"a": 0.5, "b": 2.0}
    assert weighted.score(batch_of(4))["total"].values.tolist() == [10]


def test_rewards_in_the_background_give_what_they_give_in_the_foreground() -> None:
    weighted = loaded(Entry("far", 1.0, Planted(runs_on="network")), Entry("near", 1.0, Planted()), Entry("farther", 1.0, Planted(runs_on="network")))
    batches = [batch_of(*(float(i + 10 * n) for i in range(5))) for n in range(4)]
    pending = [weighted.submit(batch) for batch in batches]
    for batch, part in zip(batches, pending, strict=True):
        found, expected = part.result(), weighted.score(batch)
        assert list(found) == list(expected) == ["far", "near", "farther", "total"]
        for name in found:
            assert torch.equal(found[name].values, expected[name].values)
    weighted.close()


def test_rewards_on_this_machine_run_one_at_a_time_and_network_rewards_beside_them() -> None:
    inside, most, lock, meeting = [0], [0], threading.Lock(), threading.Barrier(2, timeout=20)

    def scores(batch: SampleBatch) -> Scores:
        return Scores(torch.zeros(len(batch)), torch.ones(len(batch), dtype=torch.bool))

    def local(batch: SampleBatch) -> Scores:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with lock:
            inside[0] -= 1
        return scores(batch)

    def network(batch: SampleBatch) -> Scores:
        meeting.wait()  # goes on when two batches are here at the same time
        return scores(batch)

    weighted = loaded(Entry("near", 1.0, Planted(local)), Entry("far", 1.0, Planted(network, runs_on="network")), Entry("near too", 1.0, Planted(local)))
    pending = [weighted.submit(batch_of(1.0)) for _ in range(4)]
    for part in pending:
        part.result()
    assert most == [1]
    weighted.close()


def test_an_error_in_the_background_comes_with_the_result() -> None:
    def fail(batch: SampleBatch) -> Scores:
        raise ZeroDivisionError("no red here")

    for where in ("device", "network"):
        pending = loaded(Entry("bad", 1.0, Planted(fail, runs_on=where))).submit(batch_of(1))
        with pytest.raises(UserError, match="reward bad failed on the prompt 'prompt 0': ZeroDivisionError: no red here"):
            pending.result()
    with pytest.raises(ValueError, match="cannot score an empty batch"):
        loaded(Entry("any", 1.0, Planted())).submit(SampleBatch([]))


def test_closing_closes_every_reward_that_can_be_closed() -> None:
    reward = Planted()
    weighted = loaded(Entry("a", 1.0, reward), Entry("b", 1.0, Planted()))
    weighted.submit(batch_of(1)).result()
    weighted.close()
    assert reward.closed == 1
    assert weighted.submit(batch_of(1)).result()["a"].values.tolist() == [1]
    weighted.close()


def test_it_says_whether_a_reward_compares_samples() -> None:
    assert not loaded(Entry("a", 1.0, Planted())).compares
    assert loaded(Entry("a", 1.0, Planted()), Entry("b", 1.0, Planted(scope="group"))).compares


# --- prompts that can never be scored


class Picky(Planted):
    """Refuses prompts without a question mark."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if "?" not in prompt.text:
                raise UserError(f"reward picky: '{prompt.text}' asks nothing")


def test_prompts_are_looked_at_before_anything_is_loaded() -> None:
    weighted = WeightedRewards([Entry("a", 1.0, Planted(metadata=("answer",))), Entry("picky", 1.0, Picky())])
    good = [Prompt("2 + 2?", {"answer": "4"}), Prompt("3 + 3?", {"answer": "6"})]
    weighted.check_prompts(good)
    lacking = "reward a needs `answer` in the metadata of every prompt; 2 of 4 prompts lack it, the first is '4 \\+ 4\\?'"
    with pytest.raises(UserError, match=lacking):
        weighted.check_prompts([*good, Prompt("4 + 4?"), Prompt("5 + 5?", {"Answer": 1})])
    with pytest.raises(UserError, match="reward picky: 'hello' asks nothing"):
        weighted.check_prompts([*good, Prompt("hello", {"answer": ""})])


def test_only_a_reward_that_says_what_it_reads_is_refused_for_the_other_medium() -> None:
    class Reads(FunctionReward):
        def __init__(self, *reads: str) -> None:
            super().__init__("mine", lambda batch: [0.0] * len(batch.prompts))
            self.info = dataclasses.replace(self.info, reads=reads)

    for reads in ((), ("metadata",), ("images", "texts")):
        for made in ("images", "text"):
            WeightedRewards([("mine", 1.0, Reads(*reads))]).require_medium(made)
    assert (
        FunctionReward("f", lambda batch: []).info.reads == RemoteReward(url="http://localhost:1").info.reads == WinRate(reward="exact_match").info.reads == ()
    )
    for reads, made, judged in (("images", "text", "pictures, and a language model"), ("texts", "images", "texts, and an image generator")):
        WeightedRewards([("mine", 1.0, Reads("prompt", reads))]).require_medium("text" if made == "images" else "images")
        with pytest.raises(UserError, match=f"^reward mine judges {judged}"):
            WeightedRewards([("mine", 1.0, Reads("prompt", reads))]).require_medium(made)
