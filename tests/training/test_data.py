import torch

from training.data import Shuffled, StepBatches, labelled


class Numbers:
    """A task whose samples are their own index."""

    def __init__(self, length):
        from datasets import Dataset

        self.train = Dataset.from_dict({"labels": list(range(length))})

    def prepare(self, rows, generator, training):
        return {"labels": rows["labels"], "noise": torch.rand(1, generator=generator)}


def batches(length=10, **keys):
    task = Numbers(length)
    keys = {"batch_size": 4, "accumulate": 1, "transforms": [], "seed": 3} | keys
    return StepBatches(task, Shuffled(length, 3), **keys)


def seen(steps):
    return [int(i) for batch in steps for i in batch["labels"]]


def test_an_epoch_takes_every_sample_once():
    source = batches()
    order = seen(batch for step in range(5) for batch in source[step])
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]


def test_a_step_is_a_function_of_its_number_alone():
    first, second = batches(), batches()
    for step in range(7):
        first[step]
    for ours, theirs in zip(first[7], second[7]):
        assert all(ours[name].equal(theirs[name]) for name in ours)


def test_accumulation_and_processes_split_the_same_samples():
    whole = seen(batches()[2])
    micro = batches(accumulate=2)[2]
    assert len(micro) == 2
    assert seen(micro) == whole
    shards = [batches(accumulate=2, rank=rank, world=2)[2] for rank in (0, 1)]
    assert [len(shard) for shard in shards] == [2, 2]
    assert sorted(seen(shards[0] + shards[1])) == sorted(whole)


def test_shares_of_a_step_add_up_to_one():
    micro = batches(batch_size=5, accumulate=3)[0]
    assert [len(batch["labels"]) for batch in micro] == [2, 2, 1]
    torch.testing.assert_close(sum(batch["share"] for batch in micro), torch.tensor(1.0))


def test_workers_change_nothing():
    source = batches()
    alone = [seen(step) for step in source.loader(2, 6, 0, False)]
    helped = [seen(step) for step in source.loader(2, 6, 2, False)]
    assert alone == helped


def test_the_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(batches().loader(0, 3, 0, False))
    assert torch.get_rng_state().equal(before)


def test_labels_that_count():
    assert labelled({"labels": torch.tensor([[1, -100], [2, 3]])}) == 3
    assert labelled({"labels": torch.rand(3, 2)}) == 6
    assert labelled({"features": torch.rand(5, 2)}) == 5
