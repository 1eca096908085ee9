import pytest
import torch

from algorithms.weighting import ABSENT, UNWEIGHTED, Kind, KindWeights, cut_before_takeover, kind_of, wanted_parts
from fleet.robot import Source
from tests.batches import make_batch

P, O, S, D = Source.POLICY, Source.OPERATOR, Source.SCRIPT, Source.DEMO  # noqa: E741
TASKS = ("reach", "push")


def windows_of(source_B, takeover_in_B, horizon=4, task_B=None):
    """A batch of which nothing else matters."""
    num = len(source_B)
    fields = {"source_B": torch.tensor([int(s) for s in source_B], dtype=torch.uint8)}
    fields["takeover_in_B"] = torch.tensor(takeover_in_B)
    fields["task_B"] = torch.zeros(num, dtype=torch.long) if task_B is None else torch.tensor(task_B)
    return make_batch({}, torch.zeros(num, horizon, 1), **fields)


def reduced(weights, labels):
    """Stats as the engine gives them back: ``labels`` are (task, kind, number of labels)."""
    task_B, kind_B, num_B = (torch.tensor([row[i] for row in labels]) for i in range(3))
    stats = weights.stats(task_B, kind_B, num_B.float())
    return {name: float(top / weight) for name, (top, weight) in stats.items()}


def fed(weights, labels, times=1):
    for _ in range(times):
        weights.update(reduced(weights, labels))
    return weights


def table(weights, task=0):
    return weights.of(torch.full((len(Kind),), task), torch.arange(len(Kind))).tolist()


def test_kinds_and_their_borders():
    takeover_in = [-1, 0, 1, 3, 4, 5, 6, -1, -1, 2]
    batch = windows_of([P, O, P, P, P, P, P, D, S, D], takeover_in)
    names = [Kind(int(kind)).name for kind in kind_of(batch, 3)]
    before = ["BEFORE_TAKEOVER"] * 2
    assert names == ["POLICY", "OPERATOR", *before, "POLICY", "POLICY", "POLICY", "DEMO", "DEMO", "DEMO"]
    num_valid = cut_before_takeover(batch, 3).mask_BH.sum(1).tolist()
    assert num_valid == [4, 4, 1, 3, 1, 2, 3, 4, 4, 4]  # up to the takeover, or up to three steps before it
    assert cut_before_takeover(batch, 0).mask_BH.sum(1).tolist() == [4, 4, 1, 3, 4, 4, 4, 4, 4, 4]
    assert [Kind(int(kind)) for kind in kind_of(batch, 0)].count(Kind.BEFORE_TAKEOVER) == 0
    batch.mask_BH[6] = torch.tensor([True, True, False, False])
    assert cut_before_takeover(batch, 3).mask_BH[6].tolist() == [True, True, False, False]


def test_golden_values():
    part = [0.3, 0.5, 0.05, 0.15]
    assert wanted_parts("sirius", part) == pytest.approx([0.3, 0.198, 0.002, 0.5])
    assert wanted_parts("iwr", part) == pytest.approx([0.3 / 1.7, 0.5 / 1.7, 0.05 / 1.7, 0.5])
    labels = [(0, kind, 1000 * p) for kind, p in enumerate(part)]
    assert table(fed(KindWeights("sirius", TASKS), labels)) == pytest.approx([1, 0.396, 0.04, 10 / 3])
    assert table(fed(KindWeights("iwr", TASKS), labels)) == pytest.approx([1 / 1.7, 1 / 1.7, 1 / 1.7, 10 / 3])
    assert table(fed(KindWeights("none", TASKS), [])) == [1, 1, 0, 1]


@pytest.mark.parametrize("weighting", ["sirius", "iwr"])
def test_weights_sum_up_to_one_whatever_is_there(weighting):
    g = torch.Generator().manual_seed(0)
    num_without = 0
    for _ in range(300):
        part = torch.rand(len(Kind), generator=g) * (torch.rand(len(Kind), generator=g) < 0.7)
        if part.sum() == 0:
            continue
        part = (part / part.sum()).double().tolist()
        wanted = wanted_parts(weighting, part)
        if wanted is None:
            num_without += 1
            assert weighting == "sirius" and part[Kind.DEMO] > 0.49 and part[Kind.POLICY] > 0
            continue
        assert sum(wanted) == pytest.approx(1) and min(wanted) >= 0
        assert all(w == 0 for w, p in zip(wanted, part, strict=True) if p == 0)
        if part[Kind.OPERATOR] and (part[Kind.POLICY] or (weighting == "iwr" and part[Kind.OPERATOR] < 1)):
            assert wanted[Kind.OPERATOR] == 0.5
    assert (num_without > 0) == (weighting == "sirius")


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ([0.6, 0.4, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]),  # nobody took over: as drawn
        ([0.5, 0.0, 0.0, 0.5], [0.5, 0.0, 0.0, 0.5]),  # no success of the policy's own
        ([0.8, 0.0, 0.0, 0.2], [0.8 / 1.3, 0.0, 0.0, 0.5 / 1.3]),
        ([0.0, 0.7, 0.0, 0.3], [0.0, 0.5, 0.0, 0.5]),
        ([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]),
        ([0.497, 0.3, 0.1, 0.103], [0.497, 0.001, 0.002, 0.5]),
        ([0.499, 0.3, 0.1, 0.101], None),
        ([0.499, 0.4, 0.0, 0.101], [0.499, 0.001, 0.0, 0.5]),
    ],
)
def test_sirius_where_something_is_missing(part, wanted):
    found = wanted_parts("sirius", part)
    assert found is None if wanted is None else found == pytest.approx(wanted)


def test_tasks_have_weights_of_their_own_and_their_weight_in_the_batch_stays():
    labels = [(0, Kind.DEMO, 10), (0, Kind.POLICY, 30), (0, Kind.OPERATOR, 20), (1, Kind.DEMO, 90), (1, Kind.OPERATOR, 10)]
    weights = fed(KindWeights("iwr", TASKS), labels)
    assert table(weights, 0) == pytest.approx([0.75, 0.75, 0, 1.5])
    assert table(weights, 1) == pytest.approx([5 / 9, 1, 0, 5])
    for task, total in ((0, 60), (1, 100)):
        assert sum(n * table(weights, task)[kind] for t, kind, n in labels if t == task) == pytest.approx(total)


def test_before_anything_is_known_and_where_nothing_remains_labels_count_alike():
    weights = KindWeights("sirius", TASKS)
    assert table(weights) == list(UNWEIGHTED) and weights.without == ()
    fed(weights, [(0, kind, n) for kind, n in enumerate([60, 20, 10, 10])] + [(1, Kind.DEMO, 5)])
    assert table(weights) == list(UNWEIGHTED) and weights.without == ("reach",)
    fed(weights, [(0, kind, n) for kind, n in enumerate([20, 40, 10, 30])], times=200)
    assert weights.without == () and table(weights) == pytest.approx([1, 0.298 / 0.4, 0.02, 5 / 3], rel=0.05)
    assert table(weights, 1) == [1, 1, 0, 1], "a task with demonstrations alone"


def test_frequencies_follow_and_begin_anew_when_a_kind_appears():
    weights = fed(KindWeights("iwr", TASKS), [(0, Kind.DEMO, 60), (0, Kind.POLICY, 40)], times=300)
    assert table(weights)[0] == 1
    fed(weights, [(0, Kind.DEMO, 40), (0, Kind.POLICY, 30), (0, Kind.OPERATOR, 30)])
    assert table(weights) == pytest.approx([5 / 7, 5 / 7, 0, 5 / 3]), "not 0.5 / (0.02 * 0.3)"
    fed(weights, [(0, Kind.DEMO, 20), (0, Kind.POLICY, 20), (0, Kind.OPERATOR, 60)])
    want = 0.5 / (0.98 * 0.3 + 0.02 * 0.6)
    assert table(weights)[Kind.OPERATOR] == pytest.approx(want)
    fed(weights, [(1, Kind.DEMO, 9)], times=500)
    assert table(weights)[Kind.OPERATOR] == pytest.approx(want), "a batch without this task says nothing of it"


def test_a_kind_that_hardly_occurs_has_no_weight_of_its_own():
    part = [0.5, 0.5 - ABSENT / 2, ABSENT / 2, 0.0]
    weights = fed(KindWeights("sirius", TASKS), [(0, kind, 1e5 * p) for kind, p in enumerate(part)])
    assert table(weights) == pytest.approx(UNWEIGHTED, rel=1e-3)


def test_state_goes_on_by_the_names_of_tasks():
    labels = [(0, Kind.POLICY, 30), (0, Kind.OPERATOR, 10), (1, Kind.DEMO, 90), (1, Kind.OPERATOR, 10)]
    weights = fed(fed(KindWeights("iwr", TASKS), labels), [(1, Kind.OPERATOR, 9)])
    other = KindWeights("iwr", ("new", *reversed(TASKS)))
    other.load_state_dict(weights.state_dict())
    assert table(other, 2) == table(weights, 0) and table(other, 1) == table(weights, 1)
    assert table(other, 0) == list(UNWEIGHTED)
    fed(weights, labels)
    fed(other, [(2 - task, kind, n) for task, kind, n in labels])
    assert table(other, 1) == pytest.approx(table(weights, 1))
